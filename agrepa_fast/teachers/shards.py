"""The files of a store of extracted features: what they hold, how they are written, and one shard read.

    store.json                 what the features were made with, and their form (`StoreInfo`)
    PLAN.plan.safetensors      which clips go into which shard: clips [N] int64 digests, ends [S] int64
    PLAN-00012.safetensors     a shard: clips [n] int64, ends [n] int64, features [F, W], and of int8 ones scale [F]

Frames ends[i - 1] to ends[i] of a shard are those of its clip i. A shard is built under another name, and renamed when
it is whole: what has its name is complete. A plan's name is the digest of what it says, and a shard's content
follows from its plan and the sounds, so a store that was extracted with interruptions, or by several processes, ends
with the bytes of an unbroken extraction.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, writing
from .cache import FeatureKey, import_safetensors, quantise

FORMAT = "agrepa-fast store 1"
SHARD_BYTES = 256 << 20
DAY = 86_400
DTYPES = {"float32": torch.float32, "int8": torch.int8, "int32": torch.int32}


@dataclass(frozen=True)
class StoreInfo:
    """What decides the features of a store.

    Attributes:
        key: of the teacher; its rate is 0 where each clip has one pooled vector.
        audio_rate: Hz at which the teacher was given the sound.
        weights: digest of the teacher's local files, "" where it has none.
        dtype: "float32", "int8" (with a scale for each frame) or, for tokens, "int32".
        width: channels of a frame; for tokens, streams.
    """

    key: FeatureKey
    audio_rate: int
    weights: str
    dtype: str
    width: int

    def folder_name(self) -> str:
        """Of the store, from what a run knows before the teacher is loaded."""
        return store_name(self.key, self.audio_rate, pooled=not self.key.rate)


def store_name(key: FeatureKey, audio_rate: int, *, pooled: bool) -> str:
    """The name of a store's folder; key.rate is not looked at."""
    facts = [key.teacher, key.revision, key.layer, key.preprocessing, audio_rate, pooled]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=5).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", key.teacher.rstrip("/").rpartition("/")[2])[:60].lstrip(".")
    return "-".join([stem or "teacher", *([f"layer{key.layer}"] if key.layer else []), digest])


@dataclass(frozen=True)
class Plan:
    """Which clips go into which shard."""

    clips: np.ndarray  # [N] int64 digests of sounds
    ends: np.ndarray  # [S] int64: shard s holds clips ends[s - 1] to ends[s]

    @property
    def name(self) -> str:
        return hashlib.blake2b(self.clips.tobytes() + self.ends.tobytes(), digest_size=6).hexdigest()

    def shards(self) -> Iterator[tuple[str, list[int]]]:
        """The name of each shard's file, and its clips."""
        name = self.name
        for number, (start, stop) in enumerate(zip([0, *self.ends[:-1]], self.ends)):
            yield f"{name}-{number:05d}.safetensors", self.clips[start:stop].tolist()


def make_plan(clips: Mapping[int, int]) -> Plan:
    """Consecutive clips, in the order of their digests, until a shard's expected bytes ({digest: bytes}) are enough."""
    order = sorted(clips)
    ends, filled = [], 0
    for number, digest in enumerate(order, start=1):
        filled += clips[digest]
        if filled >= SHARD_BYTES or number == len(order):
            ends.append(number)
            filled = 0
    return Plan(np.array(order, np.int64), np.array(ends, np.int64))


def create_store(root: Path, info: StoreInfo) -> Path:
    """The folder of the store below `root`; made where it is missing.

    Raises:
        UserError: it holds features of another form or made with other weights, or cannot be written.
    """
    folder = root / info.folder_name()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / "store.json"
    if not path.exists():
        _write(path, json.dumps({"format": FORMAT, **asdict(info)}, indent=2).encode() + b"\n")
    found = read_info(folder)
    if found != info:
        differ = [name for name in ("weights", "dtype", "width", "key") if getattr(found, name) != getattr(info, name)]
        name = differ[0] if differ else "audio_rate"
        raise UserError(
            f"{path}: the store was made with {name} {_plain(found, name)}, this extraction has {_plain(info, name)}: "
            "extract the same way, or delete the store"
        )
    return folder


def _plain(info: StoreInfo, name: str) -> Any:
    value = getattr(info, name)
    return asdict(value) if name == "key" else repr(value)


def read_info(folder: Path) -> StoreInfo:
    """UserError where `folder` is no store, or its store.json is damaged."""
    path = folder / "store.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a store of features (it has no store.json)")
    try:
        facts = json.loads(path.read_bytes())
        if facts.pop("format") != FORMAT:
            raise ValueError("format")
        info = StoreInfo(**{**facts, "key": FeatureKey(**facts["key"])})
        types = {"audio_rate": int, "weights": str, "dtype": str, "width": int}
        if any(type(getattr(info, name)) is not kind for name, kind in types.items()):
            raise ValueError("types")
        if info.dtype not in DTYPES or info.width < 1 or not 0 <= float(info.key.rate) < 1e6:
            raise ValueError("values")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); delete the folder and extract again") from error
    return info


def publish_plan(folder: Path, plan: Plan) -> None:
    """Write a plan. Processes that publish the same one at once write the same bytes."""
    library = import_safetensors()
    tensors = {"clips": torch.from_numpy(plan.clips), "ends": torch.from_numpy(plan.ends)}
    _write(folder / f"{plan.name}.plan.safetensors", library.torch.save(tensors))


def _write(path: Path, data: bytes) -> None:
    building = _building(path)
    with writing(path):
        try:
            with open(building, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(building, path)
        finally:
            building.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", platform.node())


def _building(path: Path) -> Path:
    """Where a file is built before it gets its name: another place in each process."""
    return path.with_name(f"{path.name}.{_host()}.{os.getpid()}.part")


def sweep(folder: Path) -> None:
    """Delete what killed processes of this machine have left half built; of other machines, what is a day old."""
    for path in folder.glob("*.part"):
        host, process = path.name.split(".")[-3:-1]
        try:
            if host == _host():
                os.kill(int(process), 0)
                continue
            if time.time() - path.stat().st_mtime < DAY:
                continue
        except ProcessLookupError:
            pass
        except (OSError, ValueError):  # somebody else's process, or somebody else's file
            continue
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Encoded = tuple[Tensor, Tensor | None]  # a clip's [frames, W] as stored, and the scales [frames] of int8


def encode(info: StoreInfo, row: Tensor) -> Encoded:
    """One clip's features [frames, W] in the store's form."""
    return quantise(row) if info.dtype == "int8" else (row.to(DTYPES[info.dtype]), None)


def write_shard(
    path: Path, info: StoreInfo, clips: Sequence[int], rows: Sequence[Encoded], skipped: Mapping[int, str]
) -> None:
    """Write one shard whole.

    Args:
        clips: digests. rows: what each has, as `encode` gives it. skipped: digests of the plan's other clips, with
            the reason why each has no features.

    Raises:
        UserError: it cannot be written, for instance because the disk is full.
    """
    values = [torch.empty(0, info.width, dtype=DTYPES[info.dtype]), *(values for values, _ in rows)]
    tensors = {
        "clips": torch.tensor(list(clips), dtype=torch.int64),
        "ends": torch.tensor([len(values) for values, _ in rows], dtype=torch.int64).cumsum(0),
        "features": torch.cat(values),
    }
    if info.dtype == "int8":
        tensors["scale"] = torch.cat([torch.empty(0), *(scale for _, scale in rows if scale is not None)])
    facts = {"format": FORMAT, "skipped": {str(digest): skipped[digest] for digest in sorted(skipped)}}
    facts["sum"] = _checksum(tensors)
    library = import_safetensors()
    building = _building(path)
    try:
        # One entry of metadata alone: safetensors writes several in no fixed order.
        library.torch.save_file(tensors, str(building), {"agrepa": json.dumps(facts)})
        with writing(path):
            descriptor = os.open(building, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(building, path)
            _sync_folder(path.parent)
    except (OSError, library.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    finally:
        building.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


class Shard:
    """One shard: `clips` and `ends` in memory, the features mapped from the file.

    Raises:
        UserError: not a whole shard of this form.
    """

    def __init__(self, path: Path, info: StoreInfo) -> None:
        self.path = path
        library = import_safetensors()
        try:
            self.file = library.safe_open(str(path), "pt")
            facts = json.loads((self.file.metadata() or {})["agrepa"])
            self.skipped = {int(digest): str(reason) for digest, reason in facts["skipped"].items()}
            self.sum = facts["sum"]
            self.clips, self.ends = self.file.get_tensor("clips").numpy(), self.file.get_tensor("ends").numpy()
            self.features = self.file.get_slice("features")
            self.scale = self.file.get_slice("scale") if info.dtype == "int8" else None
            shape, kind = self.features.get_shape(), self.features.get_dtype()
        except (OSError, KeyError, ValueError, TypeError, AttributeError, library.SafetensorError) as error:
            raise UserError(f"{path}: a broken shard ({error}); delete it and extract again") from error
        frames = int(self.ends[-1]) if len(self.ends) else 0
        wanted = {"float32": "F32", "int8": "I8", "int32": "I32"}[info.dtype]
        whole = (
            facts.get("format") == FORMAT
            and self.clips.dtype == self.ends.dtype == np.int64
            and self.clips.shape == self.ends.shape == (len(self.clips),)
            and shape == [frames, info.width]
            and kind == wanted
            and (np.diff(self.ends, prepend=0) >= 0).all()
            and (self.scale is None or self.scale.get_shape() == [frames])
        )
        if not whole:
            raise UserError(f"{path}: a broken shard (its parts do not fit); delete it and extract again")

    def check(self) -> None:
        """Read the whole shard. UserError where its bytes are not those that were written."""
        names = ["clips", "ends", "features", *(["scale"] if self.scale is not None else [])]
        if _checksum({name: self.file.get_tensor(name) for name in names}) != self.sum:
            raise UserError(f"{self.path}: a broken shard (its checksum does not fit); delete it and extract again")

    def read(self, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows of the shard, and their scales."""
        # Copies, so that no view of the mapped file is handed on.
        scale = None if self.scale is None else self.scale[first:stop].clone()
        return self.features[first:stop].clone(), scale
