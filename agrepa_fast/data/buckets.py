"""The plan of batches: a few bucket lengths, balanced domains, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BucketBatches:
    """Says which clips make up batch number `step`, from (seed, step) alone.

    Args:
        lengths: frames of each clip. A clip goes into the shortest of `buckets` that holds it. Every batch of a bucket
            of T frames has B = max(1, frames_per_batch // T) clips, so there are as many shapes as buckets. An epoch
            covers every clip; the last batch of a bucket is filled up from the bucket's beginning.
        balance: draw every domain equally often over an epoch, and spread each evenly over the batches of a bucket.
            Clips of small domains then come several times. A batch holds clips of one bucket, so if all short clips are
            of one domain, the batches of short clips are too.
        domains: the domain of each clip.
        tokens: number of tokens of each clip. All batches of a bucket are padded to the largest of its clips, so that
            they have one shape.
        world_size: number of ranks. At each step all of them get the same bucket, and different parts of its order.

    Raises:
        ValueError: a clip is longer than the longest bucket, or a size makes no sense.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        buckets: Sequence[int],
        frames_per_batch: int,
        seed: int,
        domains: Sequence[str] | None = None,
        balance: bool = False,
        tokens: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not len(lengths):
            raise ValueError("lengths is empty")
        if not len(buckets) or min(buckets) < 1 or frames_per_batch < 1:
            raise ValueError(f"need positive buckets and frames_per_batch, got {buckets}, {frames_per_batch}")
        if max(lengths) > max(buckets):
            raise ValueError(f"a clip of {max(lengths)} frames fits no bucket, the longest is {max(buckets)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if balance and domains is None:
            raise ValueError("balance needs the domain of each clip")
        if domains is not None and len(domains) != len(lengths):
            raise ValueError(f"{len(domains)} domains for {len(lengths)} clips")
        if tokens is not None and len(tokens) != len(lengths):
            raise ValueError(f"{len(tokens)} token counts for {len(lengths)} clips")
        self.seed = seed
        self.frames_per_batch = frames_per_batch
        self.rank, self.world_size = rank, world_size
        names = np.array(domains if balance and domains is not None else ["all"] * len(lengths))
        largest = max(np.count_nonzero(names == name) for name in set(names))
        sizes = np.array(sorted(set(buckets)))
        bucket_of = np.searchsorted(sizes, np.asarray(lengths))
        # (frames, [(clips of one domain, how many to draw of them in an epoch)])
        self._buckets: list[tuple[int, list[tuple[np.ndarray, int]]]] = []
        for number, frames in enumerate(sizes.tolist()):
            groups = []
            for name in sorted(set(names)):
                members = np.flatnonzero((bucket_of == number) & (names == name))
                if len(members):
                    draws = round(len(members) * largest / np.count_nonzero(names == name))
                    groups.append((members, max(draws, len(members))))
            if groups:
                self._buckets.append((frames, groups))
        # {frames: tokens}
        self.tokens: dict[int, int] = {}
        if tokens is not None:
            counts = np.asarray(tokens)
            self.tokens = {f: max(int(counts[members].max()) for members, _ in g) for f, g in self._buckets}
        self.steps_per_epoch = sum(self.per_epoch.values())
        self._epoch = -1
        self._plan: list[tuple[int, np.ndarray]] = []

    @property
    def per_epoch(self) -> dict[tuple[int, int], int]:
        """{(clips per batch, frames): how many such batches an epoch has on this rank}."""
        counts = {}
        for frames, groups in self._buckets:
            size = self.batch_size(frames)
            counts[size, frames] = -(-sum(draws for _, draws in groups) // (size * self.world_size))
        return counts

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every (clips per batch, frames) that can occur."""
        return list(self.per_epoch)

    def batch_size(self, frames: int) -> int:
        """Clips of a batch of one rank in the bucket of `frames` frames."""
        return max(1, self.frames_per_batch // frames)

    def batch(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Batch number `step` of this rank: the frames of its bucket, and the indices of its clips."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._plan, self._epoch = self._plan_epoch(epoch), epoch
        frames, indices = self._plan[position]
        return frames, tuple(indices[self.rank :: self.world_size].tolist())

    def stand_ins(self, step: int, count: int = 16) -> list[int]:
        """Up to `count` other clips that fit batch number `step`, to replace clips that cannot be read.

        First those of its bucket, then those of shorter ones, in an order that depends on (seed, step, rank) alone.
        """
        frames, indices = self.batch(step)
        rng = np.random.default_rng([self.seed, step, self.rank])
        clips: list[int] = []
        for other, groups in reversed(self._buckets):
            if other <= frames and len(clips) < count:
                members = np.setdiff1d(np.concatenate([members for members, _ in groups]), indices)
                clips += rng.permutation(members)[: count - len(clips)].tolist()
        return clips

    def _plan_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The batches of all ranks together, in order; the same on every rank."""
        rng = np.random.default_rng([self.seed, epoch])
        plan = []
        for frames, groups in self._buckets:
            drawn, place = [], []
            for members, draws in groups:
                whole, rest = divmod(draws, len(members))
                extra = rng.permutation(members)[:rest]
                drawn.append(np.concatenate([*(rng.permutation(members) for _ in range(whole)), extra]))
                # Spread each domain evenly over 0 to 1, so that every part of the order has the same mix.
                place.append((np.arange(draws) + rng.random(draws)) / draws)
            order = np.concatenate(drawn)[np.argsort(np.concatenate(place), kind="stable")]
            size = self.batch_size(frames) * self.world_size
            batches = -(-len(order) // size)
            # np.resize repeats the array from its beginning.
            plan += [(frames, chunk) for chunk in np.resize(order, (batches, size))]
        return [plan[position] for position in rng.permutation(len(plan))]
