"""Data sets of the library `datasets`: `hf:NAME_OR_FOLDER:split`, from the hub, its cache, or a folder on disk."""

from __future__ import annotations

import io
import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .clip import Clip, check_domain, check_start, path_inside
from .columns import CAPTIONS, find_columns
from .libraries import first_line
from .packs import Pack

SOUND = "audio_file"
NUMBERS = {"tokens": "integers", "latents": "floating numbers"}  # what the lists of these columns hold
AU_FLOAT = 6  # the encoding of an AU file of 32-bit floats
MOST_RATE = 2**32 - 1
HINT = "hf:NAME_OR_FOLDER:split, or hf:NAME:CONFIGURATION:split"


def read_hub(spec: str, allow_outside: bool = False) -> list[Clip]:
    """The clips of one split, in order, from the columns that a list of clips has (`columns.ALIASES`).

    A sound is what a feature `Audio` stores (a file's bytes, or its path), or an object {array, sampling_rate}. Tokens
    are lists of integers and latents lists of frames, or the names of files in the data set's folder.

    Raises:
        UserError: the data set or split does not exist, its columns do not fit, or `datasets` is not installed.
    """
    table = _table(spec)
    folder = Path(spec.removeprefix("hf:").split(":")[0]).expanduser()
    clips = []
    rows = zip(*(table.words(name) for name in ("text", "domain", "speaker", "start")))
    for number, (text, domain, speaker, start) in enumerate(rows):
        cell = Cell(spec, number, SOUND, table.sound_size(number), table.file)
        pack: Pack | None = cell
        path = Path(spec) / f"{number:08d}"
        place = f"{spec}:{number}"
        if not table.arrays and not cell.size and (stored := table.value(number, SOUND)["path"]):
            pack, path = None, Path(stored)  # the table holds a path instead of the bytes
            check_start(place, start)
        tokens, token_pack = _side_file(table, number, "tokens", folder, allow_outside)
        latents, latent_pack = _side_file(table, number, "latents", folder, allow_outside)
        domain = check_domain(place, domain or table.domain)
        speaker = speaker or None
        clips.append(Clip(path, text or "", domain, speaker, tokens, place, pack, token_pack, latents, latent_pack))
    return clips


def _side_file(
    table: Table, number: int, meaning: str, folder: Path, allow_outside: bool
) -> tuple[Path | None, Pack | None]:
    """The tokens or latents of a row: a file that it names, or a pack of the numbers that it holds."""
    value = table.value(number, meaning) if meaning in table.meanings else None
    if value is None or value == "":
        return None, None
    place = f"{table.spec}:{number}"
    if isinstance(value, str):
        if not folder.is_dir() and not Path(value).is_absolute():
            raise UserError(
                f"{place}: {value} is the name of a file, and a data set of the hub has no folder of files: "
                f"put the numbers into the column {table.meanings[meaning]!r}"
            )
        return path_inside(folder, place, value, allow_outside), None
    size = len(_bytes(table.spec, number, meaning))
    return Path(table.spec) / f"{number:08d}.{meaning}.npy", Cell(table.spec, number, meaning, size, table.file)


@dataclass(frozen=True)
class Cell:
    """A `Pack`: the sound, tokens or latents of one row of a data set, as the bytes of a file."""

    spec: str
    number: int
    meaning: str
    size: int
    file: Path

    def read(self, start: int, count: int) -> bytes:
        """See `Pack`."""
        return bytes(_bytes(self.spec, self.number, self.meaning)[start : start + count])


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
        names = [SOUND if name == audio[0] else name for name in data.column_names]
        # Other columns may name the file that the sound came from; it is not looked at.
        known = find_columns([name if name == SOUND or not _is_path(name) else "" for name in names], spec)
        self.meanings = {meaning: data.column_names[at] for meaning, at in known.items()}
        self.domain = "audio" if self.meanings["text"].lower() in CAPTIONS else ""
        self.arrays = not isinstance(data.features[audio[0]], datasets.Audio)
        self.features = data.features
        table = data.data.table if hasattr(data.data, "table") else data.data
        self.columns = {meaning: table.column(name) for meaning, name in self.meanings.items()}
        kind = self.columns[SOUND].type
        if self.arrays and not (_holds(kind.field("array").type) and _holds(kind.field("sampling_rate").type, depth=0)):
            raise UserError(f"{spec}: the column {audio[0]!r} holds {kind}, expected an array of numbers and its rate")
        for meaning, numbers in NUMBERS.items():
            kind = self.columns[meaning].type if meaning in self.columns else None
            if kind is not None and not _is_text(kind) and not _holds(kind, numbers):
                raise UserError(
                    f"{spec}: the column {self.meanings[meaning]!r} holds {kind}, expected lists of {numbers}, or the "
                    "names of files"
                )
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.columns[SOUND].chunks)]).tolist()
        files = data.cache_files
        self.file = Path(files[0]["filename"]) if files else Path(os.devnull)

    def words(self, meaning: str) -> list[str | None]:
        """A column as text; empty where the table has none. A class label is its name, a list of words is joined."""
        if meaning not in self.columns:
            return [None] * len(self.columns[SOUND])
        name = self.meanings[meaning]
        kind = self.features[name]
        labels = getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)

        def word(value: Any) -> str | None:
            if value is None or (labels and value == -1):
                return None
            if labels:
                return labels[value]
            if type(value) in (str, int) or (meaning == "start" and isinstance(value, float)):
                return str(value)
            raise UserError(f"{self.spec}: the column {name!r} holds {type(value).__name__}, expected text")

        def words(value: Any) -> str | None:
            several = meaning == "text" and isinstance(value, list) and (labels or all(type(x) is str for x in value))
            return ", ".join(filter(None, map(word, value))) if several else word(value)

        return [words(value) for value in self.columns[meaning].to_pylist()]

    def _part(self, number: int, meaning: str = SOUND) -> tuple[Any, int]:
        column = self.columns[meaning]
        chunk = bisect_right(self.starts, number) - 1
        return column.chunk(chunk), number - self.starts[chunk]

    def value(self, number: int, meaning: str) -> Any:
        """What a row stores, as Python objects."""
        chunk, at = self._part(number, meaning)
        value = chunk[at].as_py()
        return value or {"bytes": None, "path": None} if meaning == SOUND else value

    def sound_size(self, number: int) -> int:
        """Bytes of a row's sound; 0 where the row has only a path."""
        if self.arrays:
            return len(_bytes(self.spec, number, SOUND))
        chunk, at = self._part(number)
        value = chunk.field("bytes")[at] if chunk[at].is_valid else None
        return len(value.as_buffer()) if value is not None and value.is_valid else 0

    def bytes_of(self, number: int, meaning: str) -> memoryview:
        """The bytes of a row's sound file, without a copy where the table holds them; numbers as a .npy file."""
        if meaning != SOUND:
            written = io.BytesIO()
            np.save(written, self._numbers(number, meaning), allow_pickle=False)
            return memoryview(written.getvalue())
        if not self.arrays:
            chunk, at = self._part(number)
            return memoryview(chunk.field("bytes")[at].as_buffer() if self.sound_size(number) else b"")
        return memoryview(self._sound_of_array(number))

    def _sound_of_array(self, number: int) -> bytes:
        """An array as an AU file, which holds floats and no time of writing: the same row is the same file.

        soundfile cannot write it: it waits for itself where it is called while it reads.
        """
        sound = self.value(number, SOUND)
        try:
            samples = np.array(sound.get("array") or [], ">f4")
            rate = min(max(int(sound.get("sampling_rate") or 0), 0), MOST_RATE)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{self.spec}:{number}: the sound is no array of numbers ({first_line(error)})") from error
        if samples.ndim not in (1, 2):
            raise UserError(f"{self.spec}:{number}: expected a sound [S] or [channels, S], got {list(samples.shape)}")
        channels = len(samples) if samples.ndim == 2 else 1
        # Channels come first in such arrays; a sound file has them last.
        return struct.pack(">4sIIIII", b".snd", 24, samples.nbytes, AU_FLOAT, rate, channels) + samples.T.tobytes()

    def _numbers(self, number: int, meaning: str) -> np.ndarray:
        value = self.value(number, meaning)
        try:
            return np.array(value, np.int64 if NUMBERS[meaning] == "integers" else np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{self.spec}:{number}: the {meaning} are no array of {NUMBERS[meaning]} ({first_line(error)})"
            ) from error


@lru_cache(maxsize=16)
def _table(spec: str) -> Table:
    """The table of a split; each process loads it once."""
    return Table(spec)


@lru_cache(maxsize=8)
def _bytes(spec: str, number: int, meaning: str) -> memoryview:
    """The bytes of a cell as a file, cached for the last ones, because a file is read in parts."""
    return _table(spec).bytes_of(number, meaning)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


def _holds(kind: Any, numbers: str = "", depth: int = 1) -> bool:
    """Whether a column's type is lists, at least `depth` deep, of integers, of floating numbers, or of any of both."""
    import pyarrow.types as types

    kind, levels = getattr(kind, "storage_type", kind), 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, levels = kind.value_type, levels + 1
    integers, floating = types.is_integer(kind), types.is_floating(kind)
    fits = {"integers": integers, "floating numbers": floating, "": integers or floating or types.is_null(kind)}
    return fits[numbers] and (levels >= depth if depth else levels == 0)


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
        # The library raises errors of many types, and some have several lines.
        raise UserError(f"{spec}: cannot be loaded ({first_line(error)})") from error
    if not isinstance(data, datasets.Dataset):
        raise UserError(f"{spec}: expected one split, got {type(data).__name__}")
    return data
