"""Data sets of the library `datasets`: `hf:NAME_OR_FOLDER:split`, from the hub, its cache, or a folder on disk."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .audio import import_soundfile
from .clip import Clip, check_domain
from .columns import CAPTIONS, find_columns
from .packs import Pack

HINT = "hf:NAME_OR_FOLDER:split, or hf:NAME:CONFIGURATION:split"


def read_hub(spec: str) -> list[Clip]:
    """The clips of one split, in order: a column of sounds, one of text, and domain and speaker where there are such.

    A sound is what a feature `Audio` stores (a file's bytes, or its path), or an object {array, sampling_rate}.

    Raises:
        UserError: no such data set or split, columns that do not fit, `datasets` is not installed.
    """
    table = _table(spec)
    clips = []
    rows = zip(*(table.words(name) for name in ("text", "domain", "speaker")))
    for number, (text, domain, speaker) in enumerate(rows):
        row = Row(spec, number, table.size(number), table.file)
        pack: Pack | None = row
        path = Path(spec) / f"{number:08d}"
        if not table.arrays and not row.size and (stored := table.sound(number)["path"]):
            pack, path = None, Path(stored)  # the table holds a path in place of the bytes
        place = f"{spec}:{number}"
        domain = check_domain(place, domain or table.domain)
        clips.append(Clip(path, text or "", domain, speaker or None, None, place, pack))
    return clips


@dataclass(frozen=True)
class Row:
    """A `Pack`: the sound of one row of a data set."""

    spec: str
    number: int
    size: int
    file: Path

    def read(self, start: int, count: int) -> bytes:
        """See `Pack`."""
        return bytes(_bytes(self.spec, self.number)[start : start + count])


class Table:
    """A split as its Arrow table, mapped from disk."""

    def __init__(self, spec: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{spec}: needs datasets: pip install 'agrepa-fast[datasets]'") from error
        data = _load(spec, datasets)
        # A selection of rows becomes a table of its own, so that row i is row i.
        if data._indices is not None:
            data = data.flatten_indices()
        self.spec = spec
        audio = [name for name, kind in data.features.items() if _is_sound(kind, datasets)]
        if len(audio) != 1:
            raise UserError(
                f"{spec}: expected one column of sounds (Audio, or objects with array and sampling_rate), "
                f"found {', '.join(audio) or 'none'} among {', '.join(data.column_names)}"
            )
        names = ["audio_file" if name == audio[0] else name for name in data.column_names]
        # Other columns may name the file that the sound came from; it is not looked at.
        known = find_columns([name if name == "audio_file" or not _is_path(name) else "" for name in names], spec)
        self.meanings = {meaning: data.column_names[at] for meaning, at in known.items()}
        self.domain = "audio" if self.meanings["text"].lower() in CAPTIONS else ""
        self.arrays = not isinstance(data.features[audio[0]], datasets.Audio)
        self.table = data.data.table if hasattr(data.data, "table") else data.data
        self.column = self.table.column(audio[0])
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.column.chunks)]).tolist()
        files = data.cache_files
        self.file = Path(files[0]["filename"]) if files else Path(os.devnull)

    def words(self, meaning: str) -> list[str | None]:
        """A column as text; empty where the table has none."""
        name = self.meanings.get(meaning)
        if name is None:
            return [None] * len(self.column)
        values = self.table.column(name).to_pylist()
        wrong = next((value for value in values if value is not None and not isinstance(value, (str, int))), None)
        if wrong is not None:
            raise UserError(f"{self.spec}: the column {name!r} holds {type(wrong).__name__}, expected text")
        return [None if value is None else str(value) for value in values]

    def _part(self, number: int) -> tuple[Any, int]:
        chunk = bisect_right(self.starts, number) - 1
        return self.column.chunk(chunk), number - self.starts[chunk]

    def sound(self, number: int) -> dict[str, Any]:
        """What a row stores, as Python objects."""
        chunk, at = self._part(number)
        return chunk[at].as_py() or {"bytes": None, "path": None}

    def size(self, number: int) -> int:
        """Bytes of a row's sound; 0 where the row has only a path."""
        chunk, at = self._part(number)
        if self.arrays:
            return len(_bytes(self.spec, number))
        value = chunk.field("bytes")[at] if chunk[at].is_valid else None
        return len(value.as_buffer()) if value is not None and value.is_valid else 0

    def bytes_of(self, number: int) -> memoryview:
        """The bytes of a row's sound file, without a copy where the table holds them."""
        chunk, at = self._part(number)
        if not self.arrays:
            return memoryview(chunk.field("bytes")[at].as_buffer())
        sound = self.sound(number)
        samples = np.asarray(sound.get("array") or [], np.float32)
        written = io.BytesIO()
        rate = int(sound.get("sampling_rate") or 0)
        if rate > 0 and samples.ndim in (1, 2):
            # Channels come first in such arrays; a sound file has them last. AU holds floats, and no time of writing:
            # the same row is the same file.
            import_soundfile().write(written, samples.T, rate, format="AU", subtype="FLOAT")
        return memoryview(written.getvalue())


@lru_cache(maxsize=16)
def _table(spec: str) -> Table:
    """One table of each split in each process."""
    return Table(spec)


@lru_cache(maxsize=8)
def _bytes(spec: str, number: int) -> memoryview:
    """The bytes of a row's sound file: those of the last rows, as a file is read in parts."""
    return _table(spec).bytes_of(number)


def _is_path(name: str) -> bool:
    return name.strip().lower() in ("file", "path", "audio_path", "file_name", "filename", "filepath", "audio_filepath")


def _is_sound(kind: Any, datasets: Any) -> bool:
    return isinstance(kind, datasets.Audio) or (isinstance(kind, dict) and {"array", "sampling_rate"} <= set(kind))


def _load(spec: str, datasets: Any) -> Any:
    name, *rest = spec.removeprefix("hf:").split(":")
    if len(rest) not in (1, 2) or not name or not all(rest):
        raise UserError(f"{spec}: expected {HINT}")
    split = rest[-1]
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise UserError(f"{spec}: the folder has the splits {', '.join(data)}")
                data = data[split]
            elif str(data.split or split) != split:
                raise UserError(f"{spec}: the folder holds the split {data.split}")
        elif folder.exists() or "/" in name:
            data = datasets.load_dataset(str(folder) if folder.exists() else name, *rest[:-1], split=split)
        else:
            raise UserError(f"{spec}: no such folder; for a data set of the hub give owner/name")
    except UserError:
        raise
    except Exception as error:
        # The library raises errors of many kinds, some of them of several lines.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{spec}: cannot be loaded ({reason})") from error
    if not isinstance(data, datasets.Dataset):
        raise UserError(f"{spec}: expected one split, got {type(data).__name__}")
    return data
