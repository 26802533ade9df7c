"""Exponential moving average of a module's parameters: average <- decay average + (1 - decay) parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """`module` is a copy that follows the original, and starts at its values.

    torch's AveragedModel reads from the device at every update how often it has averaged. That waits for the device,
    and cannot be captured in a CUDA graph.
    """

    def __init__(self, original: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(original).requires_grad_(False).eval()
        self._average: list[Tensor] = list(self.module.parameters())
        self._original: list[Tensor] = list(original.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Average with the original's present parameters."""
        torch._foreach_lerp_(self._average, self._original, 1 - self.decay)
