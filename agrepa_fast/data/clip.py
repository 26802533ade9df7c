"""`Clip`: one sound of a manifest, and how a row of a manifest becomes one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


@dataclass(frozen=True)
class Clip:
    """One sound, with its text, domain and source."""

    path: Path  # audio file
    text: str  # transcript or caption, "" allowed
    domain: str  # "speech", "audio" or another lower-case word
    speaker: str | None
    tokens: Path | None  # pre-computed token file
    source: str  # where it was listed ("metadata.csv:17"), for messages


def clip_of_row(
    manifest: Path, number: int, row: Mapping[str, str], *, allow_outside: bool, audio_folder: str = ""
) -> Clip:
    """The clip of one row: audio_file, text and, if given, domain, speaker, tokens and start.

    audio_folder: the folder, relative to the manifest's, of file names without a folder.

    Raises:
        UserError: a value that does not fit; names the manifest and the line.
    """
    place = f"{manifest}:{number}"
    name, tokens = row["audio_file"], row.get("tokens")
    if not name:
        raise UserError(f"{place}: the name of the audio file is empty")
    if row.get("start") and not is_zero(row["start"]):
        raise UserError(
            f"{place}: the clip begins at {row['start'][:40]} of its file, and only whole files are read: "
            "cut the files into clips and list those"
        )
    domain = row.get("domain") or "speech"
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", domain):
        raise UserError(f"{place}: domain {domain!r} must be one lower-case word, like speech or audio")
    if audio_folder and "/" not in name:
        name = f"{audio_folder}/{name}"
    return Clip(
        path=path_inside(manifest, number, name, allow_outside),
        text=row["text"],
        domain=domain,
        speaker=row.get("speaker") or None,
        tokens=path_inside(manifest, number, tokens, allow_outside) if tokens else None,
        source=f"{manifest.name}:{number}",
    )


def is_zero(value: str) -> bool:
    try:
        return float(value) == 0
    except ValueError:
        return False


def path_inside(manifest: Path, number: int, name: str, allow_outside: bool) -> Path:
    """The path of a file that a manifest names. It must be in the manifest's folder, unless `allow_outside`."""
    try:
        if "\0" in name or len(name.splitlines()) > 1:
            what = "a zero character" if "\0" in name else "a line end: check the quotes in this line"
            raise UserError(f"{manifest}:{number}: the file name holds {what}")
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise UserError(f"{manifest}:{number}: the file name {name!r} holds half a surrogate pair") from error
    if not allow_outside and not _stays_inside(manifest.parent, name):
        raise UserError(
            f"{manifest}:{number}: {name} leaves the manifest's folder: "
            "use a path inside it, or set allow_outside if you trust this manifest"
        )
    return manifest.parent / name


def _stays_inside(folder: Path, name: str) -> bool:
    if not os.path.isabs(name):
        return os.path.normpath(name).split(os.sep)[0] != ".."
    if Path(os.path.normpath(name)).is_relative_to(os.path.abspath(folder)):
        return True
    # The same folder may be known by several paths.
    return Path(os.path.realpath(name)).is_relative_to(os.path.realpath(folder))
