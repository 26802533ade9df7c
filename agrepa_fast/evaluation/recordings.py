"""Sets of sound files that are compared: a list or folder of clips, each with its text and domain.

A clip's `key` says which recording it belongs to: the clips of two sets with one key are compared with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..data.audio import SILENCE, read_audio, read_header
from ..data.clip import check_domain
from ..data.layouts import AUDIO_SUFFIXES
from ..data.manifest import Clip, read_manifest
from ..errors import UserError

LISTS = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class Recording:
    """One clip of a set.

    text: what is said in it, "" where nobody knows. start, seconds: which part of the file is measured; None: up to
    its end. Recognisers hear the prompt before `start` too, because the text covers it. cut: the recording goes on
    after the part, so nobody knows which of its words are in it."""

    key: str
    path: Path
    text: str
    domain: str
    start: float = 0.0
    seconds: float | None = None
    cut: bool = False


@dataclass(frozen=True)
class Recordings:
    """A row of every table. kind: "reference", "resynthesised", "run" or "folder".

    left_out: why clips of the set are missing, {key: reason}."""

    name: str
    kind: str
    clips: tuple[Recording, ...]
    left_out: dict[str, str] = field(default_factory=dict)


def read_sound(clip: Recording, sample_rate: int, *, whole: bool = False) -> Tensor:
    """The measured part of a clip as mono float32 [S]; `whole` adds the prompt before it. A silent file is read too.

    UserError where the file cannot be decoded (see `read_audio`) or ends before the part begins."""
    waveform = read_audio(clip.path, sample_rate, silent=True)
    end = waveform.shape[0] if clip.seconds is None else round((clip.start + clip.seconds) * sample_rate)
    part = waveform[0 if whole else round(clip.start * sample_rate) : end]
    if part.numel() == 0:
        raise UserError(f"{clip.path}: ends before the measured part begins ({clip.start:g} s)")
    return part


def duration(clip: Recording) -> float:
    """Seconds of the measured part, by the file's header."""
    header = read_header(clip.path)
    length = header.frames / header.rate - clip.start
    return length if clip.seconds is None else min(length, clip.seconds)


def check_readable(recordings: Recordings) -> None:
    """UserError unless a sound of the set can be read: a table in which every clip is left out says nothing."""
    reason = ""
    for clip in recordings.clips:
        try:
            duration(clip)
        except UserError as error:
            reason = reason or str(error)
        else:
            return
    raise UserError(f"{recordings.name}: none of its {len(recordings.clips)} sound files can be read: {reason}")


def is_silent(waveform: Tensor) -> bool:
    """Whether no sample reaches -80 dB of full scale."""
    return bool(waveform.abs().max() < SILENCE)


def read_set(path: str | Path, domain: str) -> tuple[list[Clip], bool]:
    """The clips of a list, of a folder with a list, or of a folder of sound files; and whether a list names them.

    domain: of sound files without a list.

    Raises:
        UserError: no such path, a folder without sound, a list that does not fit."""
    path = Path(path)
    if path.is_file() or _has_list(path):
        return read_manifest(path), True
    if not path.is_dir():
        raise UserError(f"{path}: no such folder, list or run")
    check_domain("--domain", domain)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise UserError(f"{path}: holds no sound files ({', '.join(AUDIO_SUFFIXES)}) and no list of them")
    return [Clip(file, "", domain, None, None, str(file.relative_to(path))) for file in files], False


def _has_list(path: Path) -> bool:
    return path.is_dir() and (
        any(file.suffix in LISTS for file in path.iterdir() if file.is_file())
        or next(path.rglob("*.trans.txt"), None) is not None
    )


def file_key(path: Path) -> str:
    """A file's name without its suffix, with what cannot be printed replaced."""
    return "".join(c if c.isprintable() else "_" for c in path.stem)


def keyed(clips: Sequence[Clip]) -> dict[str, Clip]:
    """The clips by the names of their files without suffixes.

    UserError where two clips have one name: nobody could tell which recording belongs to which."""
    found: dict[str, Clip] = {}
    for clip in clips:
        key = file_key(clip.path)
        if key in found:
            raise UserError(f"{clip.path}: has the name of {found[key].path}; give every clip a name of its own")
        found[key] = clip
    return found


def whole_files(clips: dict[str, Clip], name: str, kind: str) -> Recordings:
    """Whole files as a set."""
    return Recordings(name, kind, tuple(Recording(key, c.path, c.text, c.domain) for key, c in clips.items()))


def matched(clips: dict[str, Clip], listed: bool, reference: dict[str, Recording] | None, name: str) -> Recordings:
    """A folder's clips with the text and domain of the recordings that bear their names.

    listed: the folder has a list of its own, whose text and domain go first."""
    rows = []
    for key, clip in clips.items():
        partner = (reference or {}).get(key)
        text, domain = clip.text, clip.domain
        if partner is not None and not listed:
            text, domain = partner.text, partner.domain
        rows.append(Recording(key, clip.path, text or (partner.text if partner else ""), domain))
    return Recordings(name, "folder", tuple(rows))
