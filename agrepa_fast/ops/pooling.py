"""Reductions over time: the pooling of hidden states, and the change between velocities for FoG-A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import pooling as reference
from .arguments import check_floating, check_mask
from .dispatch import use_kernels
from .library import FusedOp


def _run_masked_mean(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from ..kernels import pooling as kernels

    return kernels.masked_mean(x, mask)


def _run_masked_mean_backward(grad: Tensor, mask: Tensor | None, count: Tensor, frames: int) -> Tensor:
    from ..kernels import pooling as kernels

    return kernels.masked_mean_backward(grad, mask, count, frames)


def _run_velocity_delta(velocity: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import pooling as kernels

    return kernels.velocity_delta(velocity, mask)


def _run_velocity_delta_backward(
    velocity: Tensor, mask: Tensor | None, count: Tensor, grad_change: Tensor | None, grad_energy: Tensor | None
) -> Tensor:
    from ..kernels import pooling as kernels

    return kernels.velocity_delta_backward(grad_change, grad_energy, velocity, mask, count)


def _fake_masked_mean(a: Any) -> tuple[Tensor, Tensor]:
    batch, _, width = a.x.shape
    dtype = torch.promote_types(a.x.dtype, torch.float32)
    return a.x.new_empty((batch, width)), a.x.new_empty((batch,), dtype=dtype)


def _fake_velocity_delta(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    streams, batch = a.velocity.shape[:2]
    dtype = torch.promote_types(a.velocity.dtype, torch.float32)
    shapes = ((streams - 1, batch), (batch,), (batch,))
    change, energy, count = (a.velocity.new_empty(shape, dtype=dtype) for shape in shapes)
    return change, energy, count


def _save_masked_mean(ctx: Any, a: Any, outputs: tuple[Tensor, Tensor]) -> None:
    _, count = outputs
    ctx.mark_non_differentiable(count)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.mask, count)
    ctx.frames = a.x.shape[1]


def _masked_mean_gradient(ctx: Any, grad: Tensor | None, _: Any) -> dict[str, Tensor | None]:
    return {} if grad is None else {"x": MASKED_MEAN_BACKWARD(grad, *ctx.saved_tensors, ctx.frames)}


def _save_velocity_delta(ctx: Any, a: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, count = outputs
    ctx.mark_non_differentiable(count)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.velocity, a.mask, count)


def _velocity_delta_gradient(
    ctx: Any, grad_change: Tensor | None, grad_energy: Tensor | None, _: Any
) -> dict[str, Tensor | None]:
    if grad_change is None and grad_energy is None:
        return {}
    return {"velocity": VELOCITY_DELTA_BACKWARD(*ctx.saved_tensors, grad_change, grad_energy)}


MASKED_MEAN = FusedOp(
    "masked_mean",
    _run_masked_mean,
    _fake_masked_mean,
    save=_save_masked_mean,
    gradient=_masked_mean_gradient,
)
MASKED_MEAN_BACKWARD = FusedOp(
    "masked_mean_backward",
    _run_masked_mean_backward,
    lambda a: a.grad.new_empty((a.grad.shape[0], a.frames, a.grad.shape[1])),
)
VELOCITY_DELTA = FusedOp(
    "velocity_delta",
    _run_velocity_delta,
    _fake_velocity_delta,
    save=_save_velocity_delta,
    gradient=_velocity_delta_gradient,
)
VELOCITY_DELTA_BACKWARD = FusedOp(
    "velocity_delta_backward",
    _run_velocity_delta_backward,
    lambda a: a.velocity.new_empty(a.velocity.shape),
)


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid frames.

    Args:
        x: [B, T, D], floating; masked frames may hold anything.
        mask: [B, T] bool, True = valid; None = all.

    Returns:
        [B, D] in x's dtype, accumulated in float32 or wider; zeros where no frame is valid.

    Raises:
        ValueError, TypeError: when a shape, dtype or device does not fit, naming it.
    """
    check_floating("x", x)
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [batch, time, width], got {list(x.shape)}")
    check_mask(mask, x.shape[:2], x.device)
    if use_kernels(x):
        return MASKED_MEAN(x, mask)[0]
    return reference.masked_mean(x, mask)


def velocity_delta(velocity: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean squares for FoG-A's score: the change of each stream's velocity, and the baseline's energy.

    Args:
        velocity: [S, B, T, M]; stream 0 is the baseline.
        mask: [B, T] bool, True = valid; None = all.

    Returns:
        change [S - 1, B]: mean over valid frames and bins of (v_s - v_0)^2;
        energy [B]: mean of v_0^2. float32, or float64 for float64 input.

    Raises:
        ValueError, TypeError: when a shape, dtype or device does not fit, naming it.
    """
    check_floating("velocity", velocity)
    if velocity.dim() != 4 or 0 in velocity.shape:
        raise ValueError(f"velocity: expected a non-empty [streams, batch, time, bins], got {list(velocity.shape)}")
    check_mask(mask, velocity.shape[1:3], velocity.device)
    if use_kernels(velocity):
        return VELOCITY_DELTA(velocity, mask)[:2]
    return reference.velocity_delta(velocity, mask)
