"""Data sets known by their layout of files: LibriSpeech, LJSpeech, and sounds found by their stem (AudioSet)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError
from .clip import Clip, clip_of_row
from .rows import csv_rows, lines, read_text

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
# AudioSet's own table from label ids (/m/09x0r) to names (Speech).
LABEL_NAMES = "class_labels_indices.csv"
SEGMENTS = {"audio_file": 0, "start": 1, "text": 3}

_log = logging.getLogger(__name__)


def read_librispeech(transcript: Path) -> list[Clip]:
    """Read SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt: lines `ID TEXT`, each with its ID.flac beside the file."""
    clips = []
    for number, line in lines(read_text(transcript)):
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


def read_ljspeech(path: Path, allow_outside: bool) -> Iterator[Clip]:
    """Read lines `ID|TEXT` or `ID|TEXT|NORMALISED TEXT`, without a header and without quoting.

    The sound file is wavs/ID.wav. An ID with a folder or with a sound file's suffix is a path. The last cell is the
    text.
    """
    width = 0
    for number, cells in csv_rows(path, read_text(path), "|", quoted=False):
        width = width or len(cells)
        if len(cells) not in (2, 3) or len(cells) != width:
            wanted = width if width in (2, 3) else "2 or 3"
            raise UserError(
                f"{path}:{number}: expected {wanted} cells (ID|TEXT or ID|TEXT|NORMALISED), got {len(cells)}"
            )
        name = cells[0]
        if name and "/" not in name and Path(name).suffix.lower() not in AUDIO_SUFFIXES:
            name = f"wavs/{name}.wav"
        yield clip_of_row(path, number, {"audio_file": name, "text": cells[-1]}, allow_outside=allow_outside)


def read_segments(path: Path, text: str) -> list[Clip]:
    """Read AudioSet's own lists: `# YTID, start_seconds, end_seconds, positive_labels`, then such rows."""
    comments = [(number, line) for number, line in lines(text) if line.lstrip().startswith("#")]
    titles = [line.lstrip("# ").replace(" ", "") for _, line in comments]
    if "YTID,start_seconds,end_seconds,positive_labels" not in titles:
        raise UserError(
            f"{path}:{comments[0][0]}: the comment lines lack '# YTID, start_seconds, end_seconds, positive_labels'"
        )
    rows = csv_rows(path, re.sub(r"(?m)^[ \t]*#.*$", "", text), ",")
    return read_by_stem(path, check_width(path, rows, 4), SEGMENTS, labels=True)


def check_width(
    path: Path, rows: Iterable[tuple[int, list[str]]], width: int, delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """The rows; a UserError if one does not have `width` cells."""
    for number, cells in rows:
        if len(cells) != width:
            raise UserError(
                f"{path}:{number}: {len(cells)} cells where {width} are expected: "
                f"put a text that contains {delimiter!r} in double quotes"
            )
        yield number, cells


def read_by_stem(
    path: Path, rows: Iterable[tuple[int, list[str]]], columns: dict[str, int], *, labels: bool
) -> list[Clip]:
    """Match rows to the sound files in the table's folder by stem: ID, YID, ID_start or ID_start_end.

    A name that is the path of a file means that file. Rows without a file are left out with a warning. labels: the text
    is a list of labels, separated by commas.

    Raises:
        UserError: no row has a file, or several files fit one row.
    """
    names = _label_names(path.parent / LABEL_NAMES) if labels else {}
    files = _by_stem(path.parent)
    by_path = {str(file.relative_to(path.parent)) for group in files.values() for file, _ in group}
    clips, missing = [], 0
    for number, cells in rows:
        row = {meaning: cells[position] for meaning, position in columns.items()}
        name, start = row["audio_file"], row.pop("start", None)
        if not name:
            raise UserError(f"{path}:{number}: the first column is empty")
        fitting = [path.parent / name] if name in by_path else _match(files, name, start)
        if len(fitting) > 1:
            shown = ", ".join(file.name for file in fitting[:3])
            raise UserError(f"{path}:{number}: {name} fits several files ({shown})")
        if not fitting:
            missing += 1
            continue
        row["audio_file"] = str(fitting[0].relative_to(path.parent))
        row["domain"] = row.get("domain") or "audio"
        if labels:
            each = [names.get(label.strip(), label.strip()) for label in row["text"].split(",")]
            row["text"] = ", ".join(label for label in each if label)
        clips.append(clip_of_row(path, number, row, allow_outside=False))
    if missing and not clips:
        raise UserError(
            f"{path}: none of its {missing} rows has a sound file in {path.parent} "
            f"(looked for ID, YID and ID_start with {', '.join(AUDIO_SUFFIXES)})"
        )
    if missing:
        _log.warning("%s: %d of %d rows have no sound file and are left out", path, missing, missing + len(clips))
    return clips


def _label_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = list(check_width(path, csv_rows(path, read_text(path), ","), 3))
    return {label: name for _, (_, label, name) in rows[1:]}


def _by_stem(folder: Path) -> dict[str, list[tuple[Path, str | None]]]:
    """Sound files under `folder` by each stem that a row may name, with the start that was split off."""
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
    candidates = [*files.get(name, []), *files.get(f"Y{name}", [])]
    exact = [path for path, at in candidates if at is None]
    if exact or start is None:
        return list(dict.fromkeys(exact or [path for path, _ in candidates]))
    try:
        seconds = float(start)
    except ValueError:
        return []
    return list(
        dict.fromkeys(path for path, at in candidates if at is not None and float(at) in (seconds, seconds * 1000))
    )
