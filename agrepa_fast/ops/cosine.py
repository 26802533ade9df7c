"""`cosine_loss`: the cosine distance of each row to its target; and what `projection_cosine_loss` shares with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import cosine as reference
from ..reference.cosine import EPS
from . import dispatch
from .arguments import check_eps, check_floating, check_mask, check_tensor
from .library import FusedOp


def run_rows(y: Tensor, *arguments: Any) -> None:
    """Call `cosine_rows` of the kernels or of the reference, with its arguments."""
    if dispatch.use_kernels(y):
        from ..kernels.cosine import cosine_rows

        return cosine_rows(y, *arguments)
    with torch.autocast(y.device.type, enabled=False):
        reference.cosine_rows(y, *arguments)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _run_cosine(
    y: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    row_weight: Tensor | None,
    eps: float,
    normalized: bool,
) -> Tensor:
    loss = y.new_empty(y.shape[:1], dtype=accumulator(y))
    run_rows(y, target, target_scale, row_weight, eps, normalized, loss, None)
    return loss


def _run_cosine_backward(
    y: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    row_weight: Tensor,
    eps: float,
    normalized: bool,
) -> Tensor:
    grad = y.new_empty(y.shape)
    run_rows(y, target, target_scale, row_weight, eps, normalized, None, grad)
    return grad


def _save_cosine(ctx: Any, a: Any, loss: Tensor) -> None:
    ctx.save_for_backward(a.y, a.target, a.target_scale, a.row_weight)
    ctx.options = a.eps, a.normalized


def _cosine_gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    y, target, target_scale, row_weight = ctx.saved_tensors
    row_weight = grad.contiguous() if row_weight is None else torch.where(row_weight != 0, row_weight * grad, 0)
    return {"y": COSINE_LOSS_BACKWARD(y, target, target_scale, row_weight, *ctx.options)}


COSINE_LOSS = FusedOp(
    "cosine_loss",
    _run_cosine,
    lambda a: a.y.new_empty(a.y.shape[:1], dtype=accumulator(a.y)),
    save=_save_cosine,
    gradient=_cosine_gradient,
)
COSINE_LOSS_BACKWARD = FusedOp(
    "cosine_loss_backward",
    _run_cosine_backward,
    lambda a: a.y.new_empty(a.y.shape),
)


def check_arguments(
    name: str,
    x: Tensor,
    width: int,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    target_scale: Tensor | None,
    eps: float,
) -> None:
    """Check the rows x [..., D] of the argument `name` against targets [..., width], and the arguments beside them."""
    check_floating(name, x)
    rows = x.shape[:-1]
    if x.dim() == 0 or 0 in x.shape or width == 0:
        raise ValueError(f"{name}: expected at least one row and one column, got {list(x.shape)} (width {width})")
    check_eps(eps)
    others: dict[str, Any] = {"target": target, "sample_weight": weight, "target_scale": target_scale}
    for other, value in others.items():
        if value is None and other != "target":
            continue
        check_tensor(other, value)
        if value.device != x.device:
            raise ValueError(f"{other}: expected on {name}'s device {x.device}, got {value.device}")
    check_mask(mask, rows, x.device)
    if target.shape != (*rows, width):
        raise ValueError(f"target: expected {[*rows, width]}, got {list(target.shape)}")
    if target.dtype == torch.int8:
        if target_scale is None or target_scale.shape != rows or not target_scale.is_floating_point():
            got = "None" if target_scale is None else f"{target_scale.dtype} {list(target_scale.shape)}"
            raise ValueError(f"target_scale: int8 targets need the scale of each row, floating {list(rows)}, got {got}")
    elif not target.is_floating_point():
        raise TypeError(f"target: expected a floating dtype or int8, got {target.dtype}")
    elif target_scale is not None:
        raise ValueError(f"target_scale: only for int8 targets, got a {target.dtype} target")
    if weight is not None and (weight.shape != rows or weight.is_complex()):
        raise ValueError(f"sample_weight: expected real {list(rows)}, got {weight.dtype} {list(weight.shape)}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction: expected "none", "sum" or "mean", got {reduction!r}')


def uses_reference(*targets: Tensor | None) -> bool:
    """Whether to run the reference: it is chosen, or one of these needs a gradient, which the fused ops do not give."""
    needs_gradient = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in targets)
    return dispatch.MODE == "reference" or needs_gradient or dispatch.transformed()


def flat(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.reshape(-1)


def cosine_loss(
    y: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = EPS,
    target_scale: Tensor | None = None,
    normalized: bool = False,
) -> Tensor:
    """`1 - cos(y, target)` per row, safe in half precision.

    Args:
        y: [..., W], floating.
        target: [..., W], floating; or int8, see target_scale. It need not be normalised.
        mask: [...] bool; a False row gives exactly zero loss and gradient, whatever it holds.
        sample_weight: [...] floating, multiplies the row's loss.
        reduction: "none" (weighted rows [...]), "sum", or "mean" over the sum of the weights
            (so it is a row mean: a token mean for [B, T, W], a sample mean for [B, W]).
        eps: added to each squared norm.
        target_scale: [...] floating: an int8 target's row stands for target * scale.
        normalized: the target's rows have length 1; their norm is not taken.

    Returns:
        float32 (float64 for float64 input). A target or sample_weight that requires a gradient gets one, by the
        plain PyTorch form.

    Raises:
        ValueError, TypeError: when a shape, dtype, device or reduction does not fit.
    """
    check_floating("y", y)
    width = y.shape[-1] if y.dim() else 0
    check_arguments("y", y, width, target, mask, sample_weight, reduction, target_scale, eps)
    if uses_reference(target, sample_weight, target_scale):
        return reference.cosine_loss(
            y,
            target,
            mask=mask,
            sample_weight=sample_weight,
            reduction=reduction,
            eps=eps,
            target_scale=target_scale,
            normalized=normalized,
        )
    rows = y.shape[:-1]
    weight = reference.row_weight(mask, sample_weight, accumulator(y))
    loss = COSINE_LOSS(
        y.reshape(-1, width), target.reshape(-1, width), flat(target_scale), flat(weight), eps, normalized
    )
    return reference.reduce(loss.reshape(rows), weight, reduction)
