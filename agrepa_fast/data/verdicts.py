"""Remember files that were valid at an earlier start, by path, size and time of change, so that none is read twice.

The file of verdicts begins with a digest of its content. A damaged one is ignored and written anew; if it cannot be
written, the next start only takes longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Raise this when something else is remembered or refused.
VERSION = 1
# A file can change twice within one tick of its time of change, so very fresh files are not remembered.
SETTLED_NS = 2_000_000_000


def cache_folder() -> Path | None:
    """The cache folder: $AGREPA_CACHE, or agrepa-fast in the user's cache.

    None if the user has no such folder.
    """
    chosen = os.environ.get("AGREPA_CACHE")
    try:
        return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agrepa-fast")
    except RuntimeError:
        return None


def verdict_file(paths: Iterable[Path]) -> Path | None:
    """The file that keeps the verdicts on files below one folder, in `cache_folder`.

    None if there is no such folder, or if the files have no folder in common.
    """
    folder = cache_folder()
    try:
        common = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    except ValueError:
        return None
    return folder and folder / f"clips-{hashlib.blake2b(os.fsencode(common), digest_size=12).hexdigest()}.json"


class Verdicts:
    """Numbers by file and kind of check. Several threads may share one; several processes may write one file."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._known = _load(file)
        self._new: dict[str, list[int]] = {}

    def find(self, path: Path, kind: str, count: int, file: Path | None = None) -> tuple[int, ...] | None:
        """The `count` numbers that were remembered, if the file (or `file`, which holds it) is still the same."""
        entry = self._known.get(_key(path, kind)) if self._known else None
        stamp = _stamp(file or path) if entry is not None else None
        if entry is None or stamp is None or len(entry) != 2 + count or tuple(entry[:2]) != stamp:
            return None
        return tuple(entry[2:])

    def remember(self, path: Path, kind: str, *numbers: int, file: Path | None = None) -> None:
        """Remember numbers about a valid file. They must be of the file as it is now."""
        stamp = _stamp(file or path) if self.file is not None else None
        if stamp is not None and stamp[1] < time.time_ns() - SETTLED_NS:
            self._new[_key(path, kind)] = [*stamp, *numbers]

    def save(self) -> None:
        """Write new entries, and keep those that other processes have written meanwhile."""
        if self.file is None or not self._new:
            return
        save_checked(self.file, {"version": VERSION, "files": {**_load(self.file), **self._new}})
        self._new = {}


def _load(file: Path | None) -> dict[str, list[int]]:
    known = load_checked(file)
    try:
        return known["files"] if known["version"] == VERSION else {}
    except (KeyError, TypeError):
        return {}


def save_checked(file: Path, value: Any) -> None:
    """Write a digest and JSON. A failed write is ignored."""
    content = json.dumps(value).encode()
    building = file.with_name(f".{file.name}.{os.getpid()}.{time.time_ns()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        building.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        os.replace(building, file)
    except OSError:
        with contextlib.suppress(OSError):
            building.unlink()


def load_checked(file: Path | None) -> Any:
    """Read what `save_checked` wrote; None if the file is missing or damaged."""
    try:
        if file is None or not file.is_file():
            return None
        digest, _, content = file.read_bytes().partition(b"\n")
        return json.loads(content) if digest == hashlib.sha256(content).hexdigest().encode() else None
    except (OSError, ValueError, RecursionError):
        return None


def _key(path: Path, kind: str) -> str:
    return f"{kind}:{os.path.abspath(path)}"


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_size, facts.st_mtime_ns
