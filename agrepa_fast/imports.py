"""Modules that a user names, imported from the current directory too. Whatever their code raises becomes one line."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from .errors import UserError


@contextlib.contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Turn everything that the user's own code raises, also SystemExit, into a UserError that begins with `what`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines()
        kind = "" if isinstance(error, ValueError | TypeError | ModuleNotFoundError) else f"{type(error).__name__}: "
        raise UserError(f"{what}: {kind}{lines[0] if lines else type(error).__name__}") from error


def import_module(name: str, what: str) -> ModuleType:
    """Import `name` as `python -m` does, so that it may be a module of the current directory.

    Raises:
        UserError: begins with `what`; it is no dotted name, there is no such module, or its code fails.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{what}: expected the name of a module, such as package.module, got {name!r}")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        with foreign_code(what):
            importlib.invalidate_caches()
            return importlib.import_module(name)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
