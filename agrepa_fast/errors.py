"""The one error that the command line shows as a single line (exit code 2) instead of a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong. The message names the file, line, key or value and what to do."""
