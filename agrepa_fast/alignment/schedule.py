"""How strong alignment is over training: off, ramp up, hold, decay.

It decays because HASTE (arXiv 2505.16792) reports that alignment helps early in training and can hurt late.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from ..buffers import FixedBuffers
from ..errors import UserError
from .rows import check_kind, check_tensor, check_times, described

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class AlignmentSchedule:
    """Factor on the alignment loss by step.

    0 before `start`; then a linear ramp over `ramp` steps, 1 until `decay_start`, a decay to 0 at `stop`, along a
    cosine or a line. decay_start == stop is a hard stop.
    """

    start: int
    ramp: int
    decay_start: int
    stop: int
    decay: str = "cosine"  # or "linear"

    def __post_init__(self) -> None:
        for name in ("start", "ramp", "decay_start", "stop"):
            if not isinstance(getattr(self, name), Real):
                raise TypeError(f"{name}: expected a number of steps, got {described(getattr(self, name))}")
        if self.ramp < 0 or not 0 <= self.start <= self.decay_start <= self.stop:
            raise ValueError(f"schedule: expected 0 <= start <= decay_start <= stop and ramp >= 0, got {self}")
        if self.decay not in ("cosine", "linear"):
            raise UserError(f'decay: expected "cosine" or "linear", got {self.decay!r}')

    @classmethod
    def constant(cls, start: int = 0, ramp: int = 0) -> AlignmentSchedule:
        """After the ramp 1 for ever."""
        return cls(start, ramp, sys.maxsize, sys.maxsize)

    def __call__(self, step: int) -> float:
        """The factor in [0, 1] at a 0-based step."""
        if step < self.start or step >= self.stop:
            return 0.0
        ramped = min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0
        if step < self.decay_start:
            return ramped
        progress = (step - self.decay_start) / (self.stop - self.decay_start)
        return ramped * (1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


class SimilarityStop(FixedBuffers):
    """1 until the running mean of the cosine has reached a threshold, 0 from then on; all of it on the device.

    In a process group (None: of all ranks) the cosine is the mean over the ranks that have one, so that all stop at the
    same step: every rank must call it.

    Args:
        threshold: the mean cosine at which alignment has done its work.
        momentum: of the running mean, which starts at the first cosine.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, threshold: float, momentum: float = 0.99, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        check_kind("threshold", threshold, Real, "a cosine")
        check_kind("momentum", momentum, Real, "a number")
        if not (-1 <= threshold <= 1 and 0 <= momentum < 1):
            raise UserError(f"expected threshold in [-1, 1] and momentum in [0, 1), got {threshold} and {momentum}")
        self.threshold, self.momentum, self.process_group = threshold, momentum, process_group
        for name, value in self.constants().items():
            self.register_buffer(name, value)

    def constants(self) -> dict[str, Tensor]:
        """The buffers before the first cosine."""
        return {"mean": torch.tensor(torch.nan), "factor": torch.tensor(1.0)}

    @torch.no_grad()
    def forward(self, cosine: Tensor) -> Tensor:
        """Take a step's mean cosine (a scalar; nan is passed over) and return the factor for the next, a scalar."""
        check_kind("cosine", cosine, Tensor, "a tensor, []")
        check_tensor("cosine", cosine, [])
        cosine = cosine.to(self.mean.dtype)
        if distributed.is_available() and distributed.is_initialized():
            found = ~cosine.isnan()
            both = torch.stack([torch.where(found, cosine, 0), found.to(cosine.dtype)])
            distributed.all_reduce(both, group=self.process_group)
            cosine = both[0] / both[1]  # 0 / 0 where no rank has a sample: nan, passed over
        moved = torch.where(self.mean.isnan(), cosine, self.mean.lerp(cosine, 1 - self.momentum))
        self.mean.copy_(torch.where(cosine.isnan(), self.mean, moved))
        self.factor.mul_(~(self.mean >= self.threshold))
        return self.factor.clone()


TIMESTEP_WEIGHTS = ("uniform", "data", "noise", "middle")


def timestep_weight(t: Tensor, kind: str = "uniform") -> Tensor:
    """A weight for each sample by its time, mean 1 over t ~ U(0, 1): [B] -> [B].

    t 0 is noise and 1 is data. "data": 2 t; "noise": 2 (1 - t); "middle": 6 t (1 - t).

    Raises:
        ValueError: a time outside [0, 1], such as a number of 1000 steps; only on the CPU, where reading it is free.
    """
    if kind not in TIMESTEP_WEIGHTS:
        raise UserError(f"timestep weighting: expected one of {', '.join(TIMESTEP_WEIGHTS)}, got {kind!r}")
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"t: expected a floating point tensor [batch], got {described(t)}")
    check_times(t)
    if kind == "uniform":
        return torch.ones_like(t)
    return {"data": 2 * t, "noise": 2 * (1 - t), "middle": 6 * t * (1 - t)}[kind]
