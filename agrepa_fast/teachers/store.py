"""A store of extracted features, read at random by the digest of a clip's sound. `shards` says what its files are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data.clip import Clip
from ..data.features import Frames, window
from ..errors import UserError
from .cache import import_safetensors
from .shards import Plan, Shard, StoreInfo, read_info


@lru_cache(maxsize=512)
def _opened(path: Path, info: StoreInfo) -> Shard:
    """A shard, opened once in each process."""
    return Shard(path, info)


class Store:
    """A store for reading. Safe to use in forked and in spawned worker processes.

    Attributes:
        broken: {file name: reason} of shards and plans that cannot be read.
        skipped: {digest: reason} of clips whose sound could not be read when they were extracted.

    Args:
        verify: read every shard whole and compare its checksum.

    Raises:
        UserError: the folder is no store.
    """

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        self.folder = folder
        self.info = read_info(folder)
        self.broken: dict[str, str] = {}
        self.skipped: dict[int, str] = {}
        self.plans = self._read_plans()
        self.lost: dict[int, str] = {}  # clips of shards that are broken
        self.complete: set[str] = set()  # names of the shards that can be read
        self._names: list[str] = []
        digests, shards, starts, ends = [], [], [], []
        planned = {name: clips for plan in self.plans for name, clips in plan.shards()}
        for path in sorted(folder.glob("*-*.safetensors")):
            try:
                shard = Shard(path, self.info)
                if verify:
                    shard.check()
            except UserError as error:
                self.broken[path.name] = str(error)
                self.lost.update(dict.fromkeys(planned.get(path.name, ()), str(error)))
                continue
            self.complete.add(path.name)
            self.skipped.update(shard.skipped)
            digests.append(shard.clips)
            shards.append(np.full(len(shard.clips), len(self._names), np.int32))
            starts.append(np.concatenate([[0], shard.ends[:-1]]) if len(shard.ends) else shard.ends)
            ends.append(shard.ends)
            self._names.append(path.name)
        empty = np.empty(0, np.int64)
        every = np.concatenate([empty, *digests])
        order = np.argsort(every, kind="stable")
        self._digests = every[order]
        self._shards = np.concatenate([empty, *shards])[order]
        self._starts, self._ends = np.concatenate([empty, *starts])[order], np.concatenate([empty, *ends])[order]

    def _read_plans(self) -> list[Plan]:
        library = import_safetensors()
        plans = []
        for path in sorted(self.folder.glob("*.plan.safetensors")):
            try:
                tensors = library.torch.load(path.read_bytes())
                plan = Plan(tensors["clips"].numpy(), tensors["ends"].numpy())
                if plan.name != path.name.partition(".")[0]:
                    raise ValueError("its name is not its digest")
            except (OSError, KeyError, ValueError, library.SafetensorError) as error:
                self.broken[path.name] = f"{path}: a broken plan ({error}); delete it and extract again"
                continue
            plans.append(plan)
        return plans

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, sound: int) -> bool:
        return self._place(sound) is not None

    def _place(self, sound: int) -> int | None:
        at = int(np.searchsorted(self._digests, sound))
        return at if at < len(self._digests) and self._digests[at] == sound else None

    def missing(self, sound: int) -> str:
        """Why the store has nothing for a sound."""
        return self.lost.get(sound) or self.skipped.get(sound) or f"not in {self.folder}: extract its features"

    def frames(self, sound: int) -> int:
        """Number of frames of a sound that is in the store; KeyError for another."""
        at = self._place(sound)
        if at is None:
            raise KeyError(sound)
        return int(self._ends[at] - self._starts[at])

    def read(self, sound: int, first: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Frames first to stop - 1 of a sound, [F, W] as stored, and the scales [F] of int8 ones.

        Raises:
            UserError: the store has nothing for the sound, or its shard is broken.
        """
        at = self._place(sound)
        if at is None:
            raise UserError(self.missing(sound))
        start, end = int(self._starts[at]), int(self._ends[at])
        first = min(start + first, end)
        last = end if stop is None else min(start + stop, end)
        path = self.folder / self._names[int(self._shards[at])]
        try:
            values, scale = _opened(path, self.info).read(first, max(first, last))
        except (OSError, import_safetensors().SafetensorError) as error:
            raise UserError(f"{path}: a broken shard ({error}); delete it and extract again") from error
        if not (values if scale is None else scale).isfinite().all():
            raise UserError(
                f"{path}: a broken shard (it holds features that are not finite); delete it and extract again"
            )
        return values, scale


class StoredFeatures:
    """A `data.features.FeatureSource`: a teacher's features from a store.

    domains: the domains that the teacher speaks for; empty: all.
    """

    def __init__(self, store: Store, domains: Sequence[str] = ()) -> None:
        self.store = store
        self.width = store.info.width
        self.rate = store.info.key.rate
        self.domains = frozenset(domains)

    def speaks_for(self, clip: Clip) -> bool:
        return not self.domains or clip.domain in self.domains

    def read(self, clip: Clip, sound: int | None, start: float, seconds: float) -> Frames | None:
        """See `FeatureSource.read`."""
        if not self.speaks_for(clip):
            return None
        if sound is None:
            raise ValueError(f"{clip.path}: features are found by the digest of the sound, which is not known")
        first, stop = window(start, seconds, self.rate) if self.rate else (0, 1)
        try:
            values, scale = self.store.read(sound, first, stop)
        except UserError as error:
            raise UserError(f"{clip.path}: no features: {error}") from error
        return Frames(values, scale, first)
