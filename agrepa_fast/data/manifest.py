"""Lists of clips: a CSV, a JSONL file, a LibriSpeech tree or an AudioSet folder to a list of `Clip`.

Only the list is read here; whether a sound file exists and decodes is found out when it is read.
"""

from __future__ import annotations

import csv
import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

COLUMNS = ("audio_file", "text", "domain", "speaker", "tokens")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """One sound and what is known about it."""

    path: Path  # audio file
    text: str  # transcript or caption, "" allowed
    domain: str  # "speech", "audio" or another lower-case word
    speaker: str | None
    tokens: Path | None  # pre-computed token file
    source: str  # where it was listed ("metadata.csv:17"), for messages


def read_manifest(spec: str | Path, *, allow_outside: bool = False) -> list[Clip]:
    """The clips that a manifest file or folder lists, in order.

    A file: `audio_file|text[|domain|speaker|tokens]` with that header (columns in any order, no quoting),
    `.jsonl` with the same keys, or an AudioSet-like CSV beside its sound files
    (`# YTID, start_seconds, end_seconds, positive_labels`, or a header `id,labels` or `file_name,caption`).
    A folder: one that holds metadata.csv or metadata.jsonl, a LibriSpeech tree (`*.trans.txt`), or an
    AudioSet folder with one such CSV. Paths are relative to the manifest's folder and must stay inside it
    unless `allow_outside`.

    UserError, naming the file and line, for anything missing, empty, malformed or listed twice in a header.
    """
    path = Path(spec)
    if path.is_dir():
        clips = _read_folder(path, allow_outside)
    elif path.is_file():
        clips = _read_file(path, allow_outside)
    else:
        raise UserError(f"{path}: no such manifest file or folder")
    if not clips:
        raise UserError(f"{path}: lists no clips")
    return clips


def _read_folder(folder: Path, allow_outside: bool) -> list[Clip]:
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return _read_file(folder / name, allow_outside)
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if transcripts:
        return [clip for transcript in transcripts for clip in _read_librispeech(transcript)]
    tables = sorted(path for path in folder.glob("*.csv") if path.name != LABEL_NAMES)
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{folder}: holds several lists ({names}): give the path of one of them")
    if not tables:
        raise UserError(f"{folder}: holds no metadata.csv, metadata.jsonl, *.trans.txt (LibriSpeech) or AudioSet CSV")
    return _read_file(tables[0], allow_outside)


def _read_file(path: Path, allow_outside: bool) -> list[Clip]:
    lines = _lines(path)
    if path.name.endswith(".trans.txt"):
        return _read_librispeech(path)
    if not lines:
        raise UserError(f"{path}: the manifest is empty")
    if path.suffix in (".jsonl", ".json"):
        return list(_read_jsonl(path, lines, allow_outside))
    first = lines[0][1]
    if first.lstrip().startswith("#") or ("|" not in first and "," in first):
        return _read_audioset(path, lines)
    return list(_read_table(path, lines, allow_outside))


def _lines(path: Path) -> list[tuple[int, str]]:
    """The non-blank lines of a UTF-8 file with their 1-based numbers."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: save the manifest as UTF-8") from error
    numbered = enumerate(text.split("\n"), start=1)
    return [(number, line.rstrip("\r")) for number, line in numbered if line.strip()]


def _read_table(path: Path, lines: list[tuple[int, str]], allow_outside: bool) -> Iterator[Clip]:
    number, header = lines[0]
    columns = [name.strip() for name in header.split("|")]
    for index, name in enumerate(columns):
        if name not in COLUMNS:
            raise UserError(
                f"{path}:{number}: unknown column {name!r}{_nearest(name, COLUMNS)}; "
                "the first line must be audio_file|text with optional domain, speaker, tokens"
            )
        if name in columns[:index]:
            raise UserError(f"{path}:{number}: column {name!r} appears twice in the header")
    for name in ("audio_file", "text"):
        if name not in columns:
            raise UserError(f"{path}:{number}: the header lacks the column {name!r}")
    for number, line in lines[1:]:
        values = line.split("|")
        if len(values) != len(columns):
            raise UserError(
                f"{path}:{number}: {len(values)} columns where the header has {len(columns)} "
                f"({'|'.join(columns)}); a text cannot contain '|'"
            )
        row = {name: value.strip() for name, value in zip(columns, values)}
        yield _clip(path, number, row, allow_outside)


def _read_jsonl(path: Path, lines: list[tuple[int, str]], allow_outside: bool) -> Iterator[Clip]:
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object but {type(row).__name__}")
        for key, value in row.items():
            if key not in COLUMNS:
                raise UserError(f"{path}:{number}: unknown key {key!r}{_nearest(key, COLUMNS)}")
            optional = key not in ("audio_file", "text")
            if not isinstance(value, str) and not (optional and value is None):
                raise UserError(f"{path}:{number}: {key} must be a string, not {json.dumps(value)[:40]}")
        for key in ("audio_file", "text"):
            if key not in row:
                raise UserError(f"{path}:{number}: the key {key!r} is missing")
        yield _clip(path, number, {key: value or "" for key, value in row.items()}, allow_outside)


def _clip(manifest: Path, number: int, row: dict[str, str], allow_outside: bool) -> Clip:
    domain = row.get("domain") or "speech"
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", domain):
        raise UserError(f"{manifest}:{number}: domain {domain!r} must be one lower-case word, like speech or audio")
    if not row["audio_file"]:
        raise UserError(f"{manifest}:{number}: audio_file is empty")
    tokens = row.get("tokens")
    return Clip(
        path=_inside(manifest, number, row["audio_file"], allow_outside),
        text=row["text"],
        domain=domain,
        speaker=row.get("speaker") or None,
        tokens=_inside(manifest, number, tokens, allow_outside) if tokens else None,
        source=f"{manifest.name}:{number}",
    )


def _inside(manifest: Path, number: int, name: str, allow_outside: bool) -> Path:
    if "\0" in name:
        raise UserError(f"{manifest}:{number}: the file name holds a zero character")
    leaves = Path(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == ".."
    if leaves and not allow_outside:
        raise UserError(
            f"{manifest}:{number}: {name} leaves the manifest's folder: "
            "use a path inside it, or set allow_outside if you trust this manifest"
        )
    return manifest.parent / name


def _read_librispeech(transcript: Path) -> list[Clip]:
    """SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID TEXT`, beside ID.flac."""
    clips = []
    for number, line in _lines(transcript):
        name, _, text = line.strip().partition(" ")
        if not re.fullmatch(r"[\w-]+", name) or not text.strip():
            raise UserError(f"{transcript}:{number}: expected 'ID TEXT', like '84-121123-0000 GO ON'")
        clips.append(
            Clip(
                path=transcript.parent / f"{name}.flac",
                text=text.strip(),
                domain="speech",
                speaker=transcript.resolve().parent.parent.name,
                tokens=None,
                source=f"{transcript.name}:{number}",
            )
        )
    return clips


# AudioSet's own table from label ids (/m/09x0r) to names (Speech).
LABEL_NAMES = "class_labels_indices.csv"
_HEADERS = {("id", "labels"), ("id", "caption"), ("file_name", "labels"), ("file_name", "caption")}


def _read_audioset(path: Path, lines: list[tuple[int, str]]) -> list[Clip]:
    """Rows of ids and labels, matched to the sound files beside the table by stem: ID, YID or ID_start."""
    segments = lines[0][1].lstrip().startswith("#")
    if segments:
        titles = [line.lstrip("# ").replace(" ", "") for _, line in lines if line.lstrip().startswith("#")]
        if "YTID,start_seconds,end_seconds,positive_labels" not in titles:
            raise UserError(
                f"{path}:{lines[0][0]}: the comment lines lack '# YTID, start_seconds, end_seconds, positive_labels'"
            )
        rows = [(number, line) for number, line in lines if not line.lstrip().startswith("#")]
        width = 4
    else:
        number, header = lines[0]
        titles = [name.strip().strip('"') for name in header.split(",")]
        if tuple(titles) not in _HEADERS:
            raise UserError(
                f"{path}:{number}: header {header.strip()!r} is not known: use audio_file|text, "
                "id,labels or file_name,caption"
            )
        rows = lines[1:]
        width = 2
    names = _label_names(path.parent / LABEL_NAMES)
    files = _by_stem(path.parent)
    clips, missing = [], 0
    for number, line in rows:
        values = _comma_row(path, number, line, width)
        name, start = values[0], values[1] if segments else None
        found = _match(files, name, start)
        if len(found) > 1:
            shown = ", ".join(file.name for file in found[:3])
            raise UserError(f"{path}:{number}: {name} fits several files ({shown})")
        if not found:
            missing += 1
            continue
        labels = [names.get(label.strip(), label.strip()) for label in values[-1].split(",")]
        clips.append(
            Clip(
                path=found[0],
                text=", ".join(label for label in labels if label),
                domain="audio",
                speaker=None,
                tokens=None,
                source=f"{path.name}:{number}",
            )
        )
    if missing and not clips:
        raise UserError(
            f"{path}: none of its {missing} rows has a sound file in {path.parent} "
            f"(looked for ID, YID and ID_start with {', '.join(AUDIO_SUFFIXES)})"
        )
    if missing:
        _log.warning("%s: %d of %d rows have no sound file and are left out", path, missing, len(rows))
    return clips


def _comma_row(path: Path, number: int, line: str, width: int) -> list[str]:
    try:
        values = next(csv.reader([line], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{number}: {error}") from error
    if len(values) != width:
        raise UserError(
            f"{path}:{number}: {len(values)} columns where {width} are expected: "
            "put text that contains commas in double quotes"
        )
    values = [value.strip() for value in values]
    if not values[0]:
        raise UserError(f"{path}:{number}: the first column is empty")
    return values


def _label_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = [_comma_row(path, number, line, 3) for number, line in _lines(path)[1:]]
    return {label: name for _, label, name in rows}


def _by_stem(folder: Path) -> dict[str, list[tuple[Path, str | None]]]:
    """Sound files under `folder` by each stem they may be asked for, with the start that was split off."""
    files: dict[str, list[tuple[Path, str | None]]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in AUDIO_SUFFIXES:
            continue
        files.setdefault(path.stem, []).append((path, None))
        # ID_start or ID_start_end, in seconds or milliseconds; an id may hold underscores and digits itself.
        for pattern in (r"(.+)_(\d+(?:\.\d+)?)", r"(.+)_(\d+(?:\.\d+)?)_\d+(?:\.\d+)?"):
            split = re.fullmatch(pattern, path.stem)
            if split:
                files.setdefault(split[1], []).append((path, split[2]))
    return files


def _match(files: dict[str, list[tuple[Path, str | None]]], name: str, start: str | None) -> list[Path]:
    suffix = Path(name).suffix.lower()
    if suffix in AUDIO_SUFFIXES:
        name = Path(name).name[: -len(suffix)]
    found = [*files.get(name, []), *files.get(f"Y{name}", [])]
    exact = [path for path, at in found if at is None]
    if exact or start is None:
        return list(dict.fromkeys(exact or [path for path, _ in found]))
    try:
        seconds = float(start)
    except ValueError:
        return []
    return list(dict.fromkeys(path for path, at in found if at is not None and float(at) in (seconds, seconds * 1000)))


def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
