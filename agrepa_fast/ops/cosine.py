"""Cosine alignment losses: of a projection (`projection_cosine_loss`) or of vectors at hand (`cosine_loss`).

The projection [M, W] is never kept: a chunk of rows at a time goes through one buffer, which the row kernel turns
from the projection into its gradient; the chunk's share of the Linear's gradients is taken right there, in the
forward pass. The backward pass only multiplies by the upstream gradient, on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import cosine as reference
from ..reference.cosine import EPS
from . import dispatch
from .library import FusedOp

# Rows per chunk: on a GPU enough to fill it with one GEMM, on a CPU a buffer that stays in its caches.
CUDA_CHUNK, CPU_CHUNK = 8192, 1024
_LINEAR = ("hidden", "weight", "bias")  # what a projection's loss is differentiated by


def _rows(y: Tensor, *arguments: Any) -> None:
    """`cosine_rows` of the kernels or of the reference; arguments as there."""
    if dispatch.use_kernels(y):
        from ..kernels.cosine import cosine_rows

        return cosine_rows(y, *arguments)
    with torch.autocast(y.device.type, enabled=False):
        reference.cosine_rows(y, *arguments)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad^T hidden, summed in total's dtype: [C, W], [C, D] -> [W, D]."""
    if grad.device.type == "cuda" and grad.dtype != total.dtype:
        total += torch.mm(grad.t(), hidden, out_dtype=total.dtype)
        return
    with torch.autocast(grad.device.type, enabled=False):
        total.addmm_(grad.to(total.dtype).t(), hidden.to(total.dtype))


def _run_projection(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_scale: Tensor | None,
    row_weight: Tensor | None,
    eps: float,
    normalized: bool,
    chunk: int,
    with_hidden: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted rows [M], their sum, and the sum's gradients of hidden [M, D], weight and bias (empty: not asked)."""
    rows, width = hidden.shape[0], weight.shape[0]
    dtype = _accumulator(hidden)
    loss = hidden.new_empty((rows,), dtype=dtype)
    grad_hidden = hidden.new_empty(hidden.shape if with_hidden else (0,))
    grad_weight = weight.new_zeros(weight.shape if with_weight else (0,), dtype=dtype)
    grad_bias = weight.new_zeros((width,) if with_weight and bias is not None else (0,), dtype=dtype)
    chunk = min(chunk, rows)
    buffer = hidden.new_empty((chunk, width))
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        x = hidden[part]
        y = buffer[: x.shape[0]]
        if bias is None:
            torch.mm(x, weight.t(), out=y)
        else:
            torch.addmm(bias, x, weight.t(), out=y)
        part_weight = None if row_weight is None else row_weight[part]
        part_scale = None if target_scale is None else target_scale[part]
        gradient = y if with_hidden or with_weight else None
        _rows(y, target[part], part_scale, part_weight, eps, normalized, loss[part], gradient)
        if with_hidden:
            torch.mm(y, weight, out=grad_hidden[part])
        if with_weight:
            if part_weight is not None:
                # A row that is left out may hold nan, and 0 * nan would spoil the sum over the rows.
                x = torch.where((part_weight != 0).unsqueeze(-1), x, 0)
            _add_outer(grad_weight, y, x)
            if bias is not None:
                grad_bias += y.sum(0, dtype=dtype)
    return loss, loss.sum(), grad_hidden, grad_weight, grad_bias


def _fake_projection(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, dtype = a.hidden, a.weight, _accumulator(a.hidden)
    return (
        hidden.new_empty(hidden.shape[:1], dtype=dtype),
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape if a.with_hidden else (0,)),
        weight.new_empty(weight.shape if a.with_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[:1] if a.with_weight and a.bias is not None else (0,), dtype=dtype),
    )


def _save_projection_sum(ctx: Any, a: Any, outputs: tuple[Tensor, ...]) -> None:
    loss, _, *grads = outputs
    ctx.mark_non_differentiable(loss, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)
    ctx.dtypes = {name: value.dtype for name in _LINEAR if (value := getattr(a, name)) is not None}


def _projection_sum_gradient(ctx: Any, _: Any, grad: Tensor | None, *others: Any) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    held = dict(zip(_LINEAR, ctx.saved_tensors))
    # In place unless the graph is kept for another backward: the gradient of hidden is the largest tensor here.
    last = not torch.compiler.is_compiling() and _last_backward(ctx)
    grads: dict[str, Tensor | None] = {}
    for name, dtype in ctx.dtypes.items():
        saved = held[name]
        if saved.numel():
            in_place = last and type(saved) is Tensor
            grads[name] = (saved.mul_(grad) if in_place else saved * grad).to(dtype)
    return grads


def _last_backward(ctx: Any) -> bool:
    """Whether the graph is not kept beyond this backward; its saved tensors then belong to whoever has read them."""
    ctx.maybe_clear_saved_tensors()
    try:
        _ = ctx.saved_tensors
    except RuntimeError:  # they have been let go of
        return True
    return False


def _save_projection_rows(ctx: Any, a: Any, outputs: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.hidden, a.weight, a.bias, a.target, a.target_scale, a.row_weight)
    ctx.options = a.eps, a.normalized, a.chunk


def _projection_rows_gradient(ctx: Any, grad: Tensor | None, *others: Any) -> dict[str, Tensor | None]:
    """A gradient per row arrives only now: the chunks run again, with it as the rows' weights."""
    if grad is None:
        return {}
    *tensors, row_weight = ctx.saved_tensors
    needed = dict(zip(PROJECTION_COSINE_ROWS.arguments._fields, ctx.needs_input_grad))
    row_weight = grad.contiguous() if row_weight is None else torch.where(row_weight != 0, row_weight * grad, 0)
    with_weight = needed["weight"] or needed["bias"]
    outputs = PROJECTION_COSINE_SUM(*tensors, row_weight, *ctx.options, needed["hidden"], with_weight)
    grads: dict[str, Tensor | None] = {}
    for name, value, grad in zip(_LINEAR, tensors, outputs[2:]):
        if value is not None and (needed["hidden"] if name == "hidden" else with_weight):
            grads[name] = grad.to(value.dtype)
    return grads


def _run_cosine(
    y: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    row_weight: Tensor | None,
    eps: float,
    normalized: bool,
) -> Tensor:
    loss = y.new_empty(y.shape[:1], dtype=_accumulator(y))
    _rows(y, target, target_scale, row_weight, eps, normalized, loss, None)
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
    _rows(y, target, target_scale, row_weight, eps, normalized, None, grad)
    return grad


def _save_cosine(ctx: Any, a: Any, loss: Tensor) -> None:
    ctx.save_for_backward(a.y, a.target, a.target_scale, a.row_weight)
    ctx.options = a.eps, a.normalized


def _cosine_gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    y, target, target_scale, row_weight = ctx.saved_tensors
    row_weight = grad.contiguous() if row_weight is None else torch.where(row_weight != 0, row_weight * grad, 0)
    return {"y": COSINE_LOSS_BACKWARD(y, target, target_scale, row_weight, *ctx.options)}


# One computation, differentiated in two ways: the sum brings its gradients along, the rows run again for theirs.
PROJECTION_COSINE_SUM = FusedOp(
    "projection_cosine_sum",
    _run_projection,
    _fake_projection,
    save=_save_projection_sum,
    gradient=_projection_sum_gradient,
)
PROJECTION_COSINE_ROWS = FusedOp(
    "projection_cosine_rows",
    _run_projection,
    _fake_projection,
    save=_save_projection_rows,
    gradient=_projection_rows_gradient,
)
COSINE_LOSS = FusedOp(
    "cosine_loss",
    _run_cosine,
    lambda a: a.y.new_empty(a.y.shape[:1], dtype=_accumulator(a.y)),
    save=_save_cosine,
    gradient=_cosine_gradient,
)
COSINE_LOSS_BACKWARD = FusedOp(
    "cosine_loss_backward",
    _run_cosine_backward,
    lambda a: a.y.new_empty(a.y.shape),
)


def _check(
    name: str,
    x: Tensor,
    width: int,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    target_scale: Tensor | None,
) -> None:
    rows = x.shape[:-1]
    if x.dim() == 0 or 0 in x.shape or width == 0:
        raise ValueError(f"{name}: expected at least one row and one column, got {list(x.shape)} (width {width})")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
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
    if mask is not None and (mask.shape != rows or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected bool {list(rows)}, got {mask.dtype} {list(mask.shape)}")
    if weight is not None and weight.shape != rows:
        raise ValueError(f"sample_weight: expected {list(rows)}, got {list(weight.shape)}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction: expected "none", "sum" or "mean", got {reduction!r}')
    others = {"target": target, "mask": mask, "sample_weight": weight, "target_scale": target_scale}
    for other, value in others.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{other}: expected on {name}'s device {x.device}, got {value.device}")


def _plain(*given: Tensor | None) -> bool:
    """Whether the differentiable reference is asked for, or needed: the fused ops give no gradient to these."""
    wanted = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in given)
    return dispatch.MODE == "reference" or wanted or dispatch.transformed()


def _flat(value: Tensor | None) -> Tensor | None:
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
        target: [..., W], floating; or int8, see target_scale. Need not be normalised.
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
    _check("y", y, y.shape[-1] if y.dim() else 0, target, mask, sample_weight, reduction, target_scale)
    if _plain(target, sample_weight, target_scale):
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
    width, rows = y.shape[-1], y.shape[:-1]
    weight = reference.row_weight(mask, sample_weight, _accumulator(y))
    loss = COSINE_LOSS(
        y.reshape(-1, width), target.reshape(-1, width), _flat(target_scale), _flat(weight), eps, normalized
    )
    return reference.reduce(loss.reshape(rows), weight, reduction)


def projection_cosine_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = EPS,
    target_scale: Tensor | None = None,
    normalized: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """`1 - cos(hidden W^T + b, target)` per row: the last Linear of an alignment head and its loss in one op.

    The projection is not kept; its extra memory is a chunk of rows and the gradient of hidden. With reduction
    "none" the chunks run again in the backward pass, where the gradients of the rows are known.

    Args:
        hidden: [..., D]; weight: [W, D]; bias: [W] or None, all of one dtype (autocast casts them);
            target: [..., W].
        mask, sample_weight, reduction, eps, target_scale, normalized: as `cosine_loss`.
        chunk: rows at a time; None for 8192 on a GPU and 1024 on a CPU.

    Returns:
        float32 (float64 for float64 input). A target or sample_weight that requires a gradient gets one, by the
        plain PyTorch form, which keeps the projection.

    Raises:
        ValueError, TypeError: when a shape, dtype, device or reduction does not fit.
    """
    if weight.dim() != 2 or hidden.dim() == 0 or weight.shape[1] != hidden.shape[-1]:
        expected = hidden.shape[-1] if hidden.dim() else "width of hidden"
        raise ValueError(f"weight: expected [teacher width, {expected}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least one row, got {chunk}")
    _check("hidden", hidden, weight.shape[0], target, mask, sample_weight, reduction, target_scale)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype != hidden.dtype or value.device != hidden.device):
            expected = f"{hidden.dtype} on {hidden.device}, like hidden"
            raise TypeError(f"{name}: expected {expected}, got {value.dtype} on {value.device}")
    if _plain(target, sample_weight, target_scale):
        return reference.projection_cosine_loss(
            hidden,
            weight,
            bias,
            target,
            mask=mask,
            sample_weight=sample_weight,
            reduction=reduction,
            eps=eps,
            target_scale=target_scale,
            normalized=normalized,
        )
    rows, width = hidden.shape[:-1], weight.shape[0]
    row_weight = reference.row_weight(mask, sample_weight, _accumulator(hidden))
    gradient = torch.is_grad_enabled() and reduction != "none"
    op = PROJECTION_COSINE_ROWS if reduction == "none" else PROJECTION_COSINE_SUM
    loss, total, *_ = op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1, width),
        _flat(target_scale),
        _flat(row_weight),
        eps,
        normalized,
        chunk or (CUDA_CHUNK if device == "cuda" else CPU_CHUNK),
        gradient and hidden.requires_grad,
        gradient and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )
    if reduction == "none":
        return loss.reshape(rows)
    if reduction == "sum":
        return total
    if row_weight is None:
        return total / loss.shape[0]
    # A float16 gradient of hidden is kept before this division, which could take it below what float16 can hold.
    share = row_weight.sum()
    return total / torch.where(share > 0, share, 1.0)
