"""Exponential moving average of a module's parameters: average <- decay average + (1 - decay) parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .sharding import local


class Ema:
    """`module` is a copy of the original that follows it, and starts at its values.

    Args:
        module: the copy, if there is one: both are sharded alike.

    torch's AveragedModel reads from the device at every update how often it has averaged. That waits for the device,
    and cannot be captured in a CUDA graph.
    """

    def __init__(self, original: nn.Module, decay: float, module: nn.Module | None = None) -> None:
        self.decay = decay
        self.module = (copy.deepcopy(original) if module is None else module).requires_grad_(False).eval()
        self._average: list[Tensor] = list(self.module.parameters())
        self._original: list[Tensor] = list(original.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Average with the original's present parameters."""
        average, original = ([local(p) for p in parameters] for parameters in (self._average, self._original))
        torch._foreach_lerp_(average, original, 1 - self.decay)
