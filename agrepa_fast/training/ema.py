"""Exponential moving average of a module's parameters: average <- decay average + (1 - decay) parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """`module` is a copy that follows the original; it starts at the original's values.

    (torch's AveragedModel asks the device how often it has averaged at every update, which waits for the device and
    cannot be captured in a CUDA graph.)
    """

    def __init__(self, original: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(original).requires_grad_(False).eval()
        self._average: list[Tensor] = list(self.module.parameters())
        self._original: list[Tensor] = list(original.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take the original's parameters in."""
        torch._foreach_lerp_(self._average, self._original, 1 - self.decay)
