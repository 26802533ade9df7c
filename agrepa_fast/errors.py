"""The one error that the command line shows as a single line (exit code 2) instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user gave is wrong. The message names the file, line, key or value and what to do, in one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(message: object) -> str:
    """The message with its line breaks and other characters that are not printable escaped.

    What a user gave is quoted in messages: a file's name may hold line breaks, terminal codes and bytes that are no
    UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names `path`: a full disk is noticed by `write`, which knows no name."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); check the folder and its free space") from error
