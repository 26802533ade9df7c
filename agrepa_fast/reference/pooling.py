"""Reductions over time in plain PyTorch: pooling of hidden states, and the change between velocities."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over time: x [B, T, D], mask [B, T] bool -> [B, D] in x's dtype.

    A row without a single valid frame gives zeros (and zero gradient)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.to(dtype).mean(dim=1).to(x.dtype)
    # Selected, not multiplied: padding may hold inf or nan, and 0 * nan is nan.
    total = torch.where(mask.unsqueeze(-1), x, 0).sum(dim=1, dtype=dtype)
    return (total / mask.sum(dim=1, dtype=dtype).clamp_min(1).unsqueeze(-1)).to(x.dtype)


def velocity_delta(velocity: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean squared change of each stream against stream 0, and stream 0's mean square.

    velocity [S, B, T, M] (stream 0 is the baseline), mask [B, T] bool
    -> change [S - 1, B], energy [B], float32 (float64 for float64 input), means over valid frames and bins."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    baseline = velocity[0].to(dtype)
    change = velocity[1:].to(dtype) - baseline
    if mask is None:
        return change.square().mean(dim=(-2, -1)), baseline.square().mean(dim=(-2, -1))
    frames = mask.sum(dim=1, dtype=dtype).clamp_min(1) * velocity.shape[-1]
    # Selected before the square, whose gradient at a masked nan would be nan.
    valid = mask.unsqueeze(-1)
    return (
        torch.where(valid, change, 0).square().sum(dim=(-2, -1)) / frames,
        torch.where(valid, baseline, 0).square().sum(dim=(-2, -1)) / frames,
    )
