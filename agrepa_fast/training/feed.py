"""Batches of a run as the step takes them: on the device, with the teachers' features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.buckets import BucketBatches
from ..data.features import FeatureSource
from ..data.loading import iterate
from ..errors import UserError
from ..graphs import Beside
from ..teachers.base import Teacher
from . import distributed
from .clips import RunData
from .config import RunConfig
from .log import RunLog
from .objective import StepInputs
from .targets import teacher_targets


class Feed:
    """The training batches of this rank.

    Attributes:
        clips: what an epoch goes through: the training clips, or their windows (data.long).
        plan: which of them make up which batch, for all ranks.

    Args:
        teachers: by name; domain_tables: {teacher: [number of domains] bool} on the device, as `domain_tables` gives.
        log: each clip that cannot be read is written to it once.
    """

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        teachers: Mapping[str, Teacher | FeatureSource],
        domain_tables: Mapping[str, Tensor],
        device: torch.device,
        bf16: bool,
        log: RunLog,
    ) -> None:
        self.config = config
        self.clips = data.train.in_windows() if config.data.long == "windows" else data.train
        self.recordings = len(data.train)
        self.teachers = teachers
        self.domain_tables = domain_tables
        self.device = device
        self.bf16 = bf16
        self.log = log
        self.unreadable: set[Path] = set()
        # The step before is still running when a batch is asked for: live teachers hear the batch meanwhile.
        live = any(isinstance(teacher, Teacher) for teacher in teachers.values())
        self.beside = Beside(device) if live and device.type == "cuda" else None
        self.plan = BucketBatches(
            self.clips.lengths,
            buckets=config.bucket_frames,
            frames_per_batch=config.data.frames_per_batch,
            seed=config.train.seed,
            domains=[clip.domain for clip in self.clips.clips],
            balance=config.data.balance_domains,
            tokens=self.clips.token_lengths,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def batches(self, step: int, notice: Callable[[str], None]) -> Iterator[Batch]:
        """The batches from `step` to the run's last step, `train.accumulate` for each step.

        notice: is told when a worker process has died.
        """
        train = self.config.train
        return iterate(
            self.clips,
            self.plan,
            start=step * train.accumulate,
            stop=train.steps * train.accumulate,
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
            notice=notice,
        )

    def inputs(self, batch: Batch, with_targets: bool) -> StepInputs:
        """The batch on the device, with the teachers' features of it if `with_targets`.

        Raises:
            UserError: more clips than data.unreadable_share cannot be read.
        """
        self._note_unreadable(batch)
        if with_targets and self.beside is not None:
            return self.beside(lambda: self._inputs(batch, with_targets), StepInputs.tensors)
        return self._inputs(batch, with_targets)

    def _inputs(self, batch: Batch, with_targets: bool) -> StepInputs:
        """As `inputs`, all of it on the current stream."""
        batch = batch.to(self.device, non_blocking=True)
        targets: dict[str, Tensor] = {}
        target_mask = batch.mask
        if with_targets:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                targets, target_mask = teacher_targets(self.teachers, batch, self.config)
        domains = {name: table[batch.domain] for name, table in self.domain_tables.items()}
        return StepInputs.of(batch, targets, target_mask, domains)

    def _note_unreadable(self, batch: Batch) -> None:
        for item in batch.skipped:
            if item.path not in self.unreadable:
                self.unreadable.add(item.path)
                self.log.write("skipped", path=str(item.path), source=item.source, reason=item.reason)
        allowed = self.config.data.unreadable_share
        if len(self.unreadable) / self.recordings > allowed:
            raise UserError(
                f"{len(self.unreadable)} of {self.recordings} clips cannot be read, at most "
                f"{allowed:.0%} may be (data.unreadable_share): {min(self.unreadable)}, ..."
            )
