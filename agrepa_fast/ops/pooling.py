"""Reductions over time: pooling of hidden states, and FoG-A's change between velocities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import pooling as reference


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid frames.

    Args:
        x: [B, T, D], floating; masked frames may hold anything.
        mask: [B, T] bool, True = valid; None = all.

    Returns:
        [B, D] in x's dtype, accumulated in float32 or wider; zeros where no frame is valid.

    Raises:
        ValueError: when shapes do not fit or the mask is not bool. TypeError: x is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [batch, time, width], got {list(x.shape)}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
    return reference.masked_mean(x, mask)


def velocity_delta(velocity: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How far each stream's velocity is from the baseline's (the two means in FoG-A's score).

    Args:
        velocity: [S, B, T, M]; stream 0 is the baseline.
        mask: [B, T] bool, True = valid; None = all.

    Returns:
        change [S - 1, B]: mean over valid frames and bins of (v_s - v_0)^2;
        energy [B]: mean of v_0^2. float32, or float64 for float64 input.

    Raises:
        ValueError: when shapes do not fit or the mask is not bool.
    """
    if velocity.dim() != 4 or 0 in velocity.shape:
        raise ValueError(f"velocity: expected a non-empty [streams, batch, time, bins], got {list(velocity.shape)}")
    if mask is not None and (mask.shape != velocity.shape[1:3] or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected bool {list(velocity.shape[1:3])}, got {mask.dtype} {list(mask.shape)}")
    return reference.velocity_delta(velocity, mask)
