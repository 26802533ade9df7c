"""How strong alignment is over training: off, ramp up, hold, decay. It helps early and can hurt late."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AlignmentSchedule:
    """Factor on the alignment loss by step.

    0 before `start`; then a linear ramp over `ramp` steps, 1 until `decay_start`, a cosine decay to 0 at `stop`.
    """

    start: int
    ramp: int
    decay_start: int
    stop: int

    def __post_init__(self) -> None:
        if self.ramp < 0 or not 0 <= self.start <= self.decay_start <= self.stop:
            raise ValueError(f"schedule: expected 0 <= start <= decay_start <= stop and ramp >= 0, got {self}")

    def __call__(self, step: int) -> float:
        """The factor in [0, 1] at a 0-based step."""
        if step < self.start or step >= self.stop:
            return 0.0
        ramped = min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0
        if step < self.decay_start:
            return ramped
        progress = (step - self.decay_start) / (self.stop - self.decay_start)
        return ramped * 0.5 * (1 + math.cos(math.pi * progress))
