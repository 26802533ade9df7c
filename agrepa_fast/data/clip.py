"""`Clip`: one sound of a manifest, and how a row of a manifest becomes one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .packs import Pack


@dataclass(frozen=True)
class Clip:
    """One sound, with its text, domain and source."""

    path: Path  # audio file; with a pack, a name for it
    text: str  # transcript or caption, "" allowed
    domain: str  # "speech", "audio" or another lower-case word
    speaker: str | None
    tokens: Path | None  # pre-computed token file
    source: str  # where it was listed ("metadata.csv:17"), for messages
    pack: Pack | None = None  # the larger file that holds the audio file
    token_pack: Pack | None = None  # the larger file that holds the token file
    latents: Path | None = None  # file of latents of a codec
    latent_pack: Pack | None = None  # the larger file that holds the file of latents

    def __hash__(self) -> int:
        # A start hashes each clip many times, and hashing all fields is slow. Two clips rarely share a source.
        return hash(self.source)


def clip_of_row(
    manifest: Path, number: int, row: Mapping[str, str], *, allow_outside: bool, audio_folder: str = ""
) -> Clip:
    """The clip of one row: audio_file, text and, if given, domain, speaker, tokens, latents and start.

    audio_folder: the folder, relative to the manifest's, of file names without a folder.

    Raises:
        UserError: a value that does not fit; names the manifest and the line.
    """
    place = f"{manifest}:{number}"
    name, tokens, latents = row["audio_file"], row.get("tokens"), row.get("latents")
    if not name:
        raise UserError(f"{place}: the name of the audio file is empty")
    check_start(place, row.get("start"))
    domain = check_domain(place, row.get("domain"))
    if audio_folder and "/" not in name:
        name = f"{audio_folder}/{name}"
    return Clip(
        path=path_inside(manifest.parent, place, name, allow_outside),
        text=row["text"],
        domain=domain,
        speaker=row.get("speaker") or None,
        tokens=path_inside(manifest.parent, place, tokens, allow_outside) if tokens else None,
        source=f"{manifest.name}:{number}",
        latents=path_inside(manifest.parent, place, latents, allow_outside) if latents else None,
    )


def check_domain(place: str, domain: str | None) -> str:
    """The domain of a clip, speech where none is given. UserError, beginning with `place`, for what is no word."""
    domain = domain or "speech"
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", domain):
        raise UserError(f"{place}: domain {domain!r} must be one lower-case word, like speech or audio")
    return domain


def check_start(place: str, start: str | None) -> None:
    """UserError, beginning with `place`, for a clip that does not begin with its file."""
    try:
        whole = not start or float(start) == 0
    except ValueError:
        whole = False
    if not whole:
        raise UserError(
            f"{place}: the clip begins at {str(start)[:40]} of its file, and only whole files are read: "
            "cut the files into clips and list those"
        )


def path_inside(folder: Path, place: str, name: str, allow_outside: bool) -> Path:
    """The path of a file that a list names, which must be in the list's folder unless `allow_outside`.

    UserError, beginning with `place`, for one that is not.
    """
    try:
        if "\0" in name or len(name.splitlines()) > 1:
            what = "a zero character" if "\0" in name else "a line end: check the quotes in this line"
            raise UserError(f"{place}: the file name holds {what}")
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the file name {name!r} holds half a surrogate pair") from error
    if not allow_outside and not _stays_inside(folder, name):
        raise UserError(
            f"{place}: {name} leaves the manifest's folder: "
            "use a path inside it, or set allow_outside if you trust this manifest"
        )
    return folder / name


def _stays_inside(folder: Path, name: str) -> bool:
    if not os.path.isabs(name):
        return ".." not in name or os.path.normpath(name).split(os.sep)[0] != ".."
    if Path(os.path.normpath(name)).is_relative_to(os.path.abspath(folder)):
        return True
    # The same folder may be known by several paths.
    return Path(os.path.realpath(name)).is_relative_to(os.path.realpath(folder))
