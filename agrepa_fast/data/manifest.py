"""Read manifests: a table (CSV), a JSONL file, a LibriSpeech tree or an AudioSet folder to a list of `Clip`.

Only the manifest is read here. Whether a sound file exists and can be decoded shows when it is read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .archives import read_archives
from .clip import Clip, clip_of_row
from .columns import CAPTIONS, EXPECTED, IDENTIFIER, find_columns, known
from .hub import read_hub
from .layouts import LABEL_NAMES, check_width, read_by_stem, read_librispeech, read_ljspeech, read_segments
from .rows import ARCHIVE, INSTEAD, TABLE, csv_rows, lines, read_text

__all__ = ["Clip", "read_manifest"]

DELIMITERS = ("|", "\t", ",", ";")
# What may stand before a path, with a colon.
LJSPEECH, UNQUOTED, ARCHIVES, HUB = "ljspeech", "unquoted", "wds", "hf"
_PACKED = (".parquet", ".tar", ".zip", ".tar.gz", ".tgz", ".arrow")


def read_manifest(spec: str | Path, *, allow_outside: bool = False) -> list[Clip]:
    """The clips that a manifest file or folder lists, in order.

    - A file: a table as Python's csv module writes it, with a header that names the columns (`columns.ALIASES`;
      separated by `|`, tabs, commas or semicolons, whichever fits the header), JSONL with the same keys, an AudioSet
      list, or a LibriSpeech transcript.
    - A folder: one that holds metadata.csv or metadata.jsonl, a LibriSpeech tree (`*.trans.txt`), or a single list.
    - `ljspeech:PATH`: a list without header, or its folder.
    - `unquoted:PATH`: a table in which double quotes are part of the text.
    - `wds:PATTERN`: a WebDataset (`archives`). `hf:NAME_OR_FOLDER:split`: a data set of the library datasets (`hub`).

    Paths are relative to the manifest's folder and must stay inside it, unless `allow_outside`.

    Raises:
        UserError: something is missing, empty, malformed or ambiguous; names the file and line.
    """
    kind, colon, rest = str(spec).partition(":")
    if colon and kind == ARCHIVES:
        return read_archives(rest)
    if colon and kind == HUB:
        return read_hub(str(spec), allow_outside)
    if not colon or kind not in (LJSPEECH, UNQUOTED):
        kind, rest = "", str(spec)
    path = Path(rest)
    if path.is_dir():
        path = _list_in(path, kind)
    elif not path.exists():
        raise UserError(f"{path}: no such manifest file or folder")
    if path.is_dir():
        transcripts = sorted(path.rglob("*.trans.txt"))
        clips = [clip for transcript in transcripts for clip in read_librispeech(transcript)]
    elif not path.is_file():
        raise UserError(f"{path}: a manifest must be a regular file or a folder")
    elif kind == LJSPEECH:
        clips = list(read_ljspeech(path, allow_outside))
    else:
        clips = _read_file(path, allow_outside, quoted=kind != UNQUOTED)
    if not clips:
        raise UserError(f"{path}: lists no clips")
    return clips


def _list_in(folder: Path, kind: str) -> Path:
    """The list in a folder; the folder itself if it is a LibriSpeech tree."""
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return folder / name
    if not kind and next(folder.rglob("*.trans.txt"), None):
        return folder
    for suffixes in ((".csv",), (".tsv", ".jsonl", ".json")):
        tables = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.name != LABEL_NAMES)
        if len(tables) > 1:
            names = ", ".join(path.name for path in tables[:10])
            raise UserError(f"{folder}: holds several lists ({names}): give the path of one of them")
        if tables:
            return tables[0]
    near = (path for pattern in ("*", "*/*") for path in folder.glob(pattern))
    packed = min((str(path.relative_to(folder)) for path in near if path.name.endswith(_PACKED)), default="")
    if packed:
        kinds = {".tar": ARCHIVE, ".parquet": TABLE, ".arrow": TABLE}
        instead = next((text for suffix, text in kinds.items() if packed.endswith(suffix)), INSTEAD)
        raise UserError(f"{folder}: holds {packed}, which is no manifest: {instead}")
    inner = sorted(path.parent.name for path in folder.glob("*/metadata.*") if path.suffix in (".csv", ".jsonl"))
    more = f"; its folders {', '.join(inner[:10])} hold one each: give one of them" if inner else ""
    wanted = "metadata.csv, metadata.jsonl, *.trans.txt (LibriSpeech) or single list (CSV, TSV, JSONL)"
    raise UserError(f"{folder}: holds no {wanted}{more}")


def _read_file(path: Path, allow_outside: bool, quoted: bool) -> list[Clip]:
    text = read_text(path)
    if path.name.endswith(".trans.txt"):
        return read_librispeech(path)
    first = next((line for _, line in lines(text)), None)
    if first is None:
        raise UserError(f"{path}: the manifest is empty")
    if path.suffix in (".jsonl", ".json"):
        return list(_read_jsonl(path, text, allow_outside))
    if first.lstrip().startswith("#"):
        return read_segments(path, text)
    return _read_table(path, text, first, allow_outside, quoted)


def _read_table(path: Path, text: str, first: str, allow_outside: bool, quoted: bool) -> list[Clip]:
    def header_by(delimiter: str) -> list[str]:
        try:
            return next(csv.reader([first], delimiter=delimiter, skipinitialspace=delimiter == ","))
        except csv.Error:
            return []

    delimiter = max(DELIMITERS, key=lambda delimiter: known(header_by(delimiter)))
    rows = csv_rows(path, text, delimiter, quoted=quoted)
    number, header = next(rows, (1, [""]))
    if not known(header):
        raise UserError(
            f"{path}:{number}: the first line {first.strip()[:60]!r} is not a header: it must name the columns "
            f"{EXPECTED}, like audio_file|text; for an LJSpeech list without header give ljspeech:PATH"
        )
    columns = find_columns(header, f"{path}:{number}")
    rows = check_width(path, rows, len(header), delimiter)
    audio, words = (header[columns[meaning]].lower() for meaning in ("audio_file", "text"))
    if audio == IDENTIFIER or (audio == "file_name" and words in CAPTIONS):
        return read_by_stem(path, rows, columns, labels=words == "labels")
    # Common Voice keeps its sounds in a folder clips beside its lists, which do not mention it.
    folder = "clips" if (audio, words) == ("path", "sentence") and (path.parent / "clips").is_dir() else ""
    clips = []
    for number, cells in rows:
        row = {meaning: cells[position] for meaning, position in columns.items()}
        if words in CAPTIONS:
            row["domain"] = row.get("domain") or "audio"
        clips.append(clip_of_row(path, number, row, allow_outside=allow_outside, audio_folder=folder))
    return clips


def _read_jsonl(path: Path, text: str, allow_outside: bool) -> Iterator[Clip]:
    layouts: dict[tuple[str, ...], dict[str, int]] = {}
    for number, line in lines(text):
        place = f"{path}:{number}"
        try:
            names, values = _json_object(line)
        except (ValueError, RecursionError) as error:
            array = line.lstrip().startswith("[")
            instead = "write one object per line, not an array" if array else "every line must be one object"
            raise UserError(f"{place}: not a JSON object ({error}): {instead}") from error
        if names not in layouts:
            layouts[names] = find_columns(names, place)
        row = {}
        for meaning, position in layouts[names].items():
            value = values[position]
            if value is None and meaning not in ("audio_file", "text"):
                continue
            if meaning in ("speaker", "start") and type(value) in (int, float):
                value = str(value)
            if not isinstance(value, str):
                shown = json.dumps(value)[:40]
                raise UserError(f"{place}: {names[position]} must be a string, not {shown}")
            row[meaning] = value
        if names[layouts[names]["text"]].lower() in CAPTIONS:
            row["domain"] = row.get("domain") or "audio"
        yield clip_of_row(path, number, row, allow_outside=allow_outside)


def _json_object(line: str) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and values of one JSON object, in order. A name that occurs twice is kept twice."""
    pairs = json.loads(line, object_pairs_hook=_Pairs)
    if not isinstance(pairs, _Pairs):
        raise ValueError(f"but {type(pairs).__name__}")
    return tuple(name for name, _ in pairs), tuple(value for _, value in pairs)


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object."""
