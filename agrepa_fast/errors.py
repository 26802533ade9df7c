"""The error that the command line shows as a single line (exit code 2) instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something that the user gave is wrong. The message is one line: the file, line, key or value, and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(message: object) -> str:
    """The message with line breaks and other unprintable characters escaped.

    Messages quote what a user gave; a file's name may hold line breaks, terminal codes and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))


class NotFiniteError(ValueError):
    """A velocity or a score is nan or infinite: one bad batch, or weights that have diverged."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names `path`: `write` finds a full disk, but knows no name."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); check the folder and its free space") from error
