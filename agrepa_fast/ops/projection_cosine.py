"""`projection_cosine_loss`: the last Linear of an alignment head and the cosine loss of its output, as one op.

The projection [M, W] is never kept. One buffer takes a chunk of its rows at a time, and the row kernel turns them into
their gradient in place. The forward pass adds the chunk's share to the gradients of the Linear at once, so that the
backward pass only multiplies them by the upstream gradient, on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import cosine as reference
from ..reference.cosine import EPS
from .arguments import check_floating
from .cosine import accumulator, check_arguments, flat, run_rows, uses_reference
from .library import FusedOp

# Rows per chunk: on a GPU enough to fill it with one GEMM, on a CPU a buffer that stays in its caches.
CUDA_CHUNK, CPU_CHUNK = 8192, 1024
LINEAR = ("hidden", "weight", "bias")  # the arguments that get gradients


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
    """The weighted losses of the rows [M], their sum, and its gradients for hidden [M, D], weight and bias.

    Gradients that are not needed are empty."""
    rows, width = hidden.shape[0], weight.shape[0]
    dtype = accumulator(hidden)
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
        run_rows(y, target[part], part_scale, part_weight, eps, normalized, loss[part], gradient)
        if with_hidden:
            torch.mm(y, weight, out=grad_hidden[part])
        if with_weight:
            if part_weight is not None:
                # A masked row may hold nan, and 0 * nan would make the sum over the rows nan.
                x = torch.where((part_weight != 0).unsqueeze(-1), x, 0)
            _add_outer(grad_weight, y, x)
            if bias is not None:
                grad_bias += y.sum(0, dtype=dtype)
    return loss, loss.sum(), grad_hidden, grad_weight, grad_bias


def _fake_projection(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, dtype = a.hidden, a.weight, accumulator(a.hidden)
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
    ctx.dtypes = {name: value.dtype for name in LINEAR if (value := getattr(a, name)) is not None}


def _projection_sum_gradient(ctx: Any, _: Any, grad: Tensor | None, *others: Any) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    saved_grads = dict(zip(LINEAR, ctx.saved_tensors))
    # Multiply in place unless the graph is kept for another backward: the gradient of hidden is a large tensor.
    last = not torch.compiler.is_compiling() and _last_backward(ctx)
    grads: dict[str, Tensor | None] = {}
    for name, dtype in ctx.dtypes.items():
        grad_of_sum = saved_grads[name]
        if grad_of_sum.numel():
            in_place = last and type(grad_of_sum) is Tensor
            grads[name] = (grad_of_sum.mul_(grad) if in_place else grad_of_sum * grad).to(dtype)
    return grads


def _last_backward(ctx: Any) -> bool:
    """Whether autograd frees the graph after this backward. Then its saved tensors may be overwritten."""
    ctx.maybe_clear_saved_tensors()
    try:
        _ = ctx.saved_tensors
    except RuntimeError:  # they were freed
        return True
    return False


def _save_projection_rows(ctx: Any, a: Any, outputs: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.hidden, a.weight, a.bias, a.target, a.target_scale, a.row_weight)
    ctx.options = a.eps, a.normalized, a.chunk


def _projection_rows_gradient(ctx: Any, grad: Tensor | None, *others: Any) -> dict[str, Tensor | None]:
    """Run the chunks again, with the gradient of each row, which is known only now, as the weight of the row."""
    if grad is None:
        return {}
    *tensors, row_weight = ctx.saved_tensors
    needed = dict(zip(PROJECTION_COSINE_ROWS.arguments._fields, ctx.needs_input_grad))
    row_weight = grad.contiguous() if row_weight is None else torch.where(row_weight != 0, row_weight * grad, 0)
    with_weight = needed["weight"] or needed["bias"]
    outputs = PROJECTION_COSINE_SUM(*tensors, row_weight, *ctx.options, needed["hidden"], with_weight)
    grads: dict[str, Tensor | None] = {}
    for name, value, grad in zip(LINEAR, tensors, outputs[2:]):
        if value is not None and (needed["hidden"] if name == "hidden" else with_weight):
            grads[name] = grad.to(value.dtype)
    return grads


# One computation is differentiated in two ways: the sum computes its gradients in the forward pass, the rows in the
# backward pass.
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
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None or name != "bias":
            check_floating(name, value)
    if weight.dim() != 2 or hidden.dim() == 0 or weight.shape[1] != hidden.shape[-1]:
        expected = hidden.shape[-1] if hidden.dim() else "width of hidden"
        raise ValueError(f"weight: expected [teacher width, {expected}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk: expected a whole number of rows, at least one, got {chunk!r}")
    check_arguments("hidden", hidden, weight.shape[0], target, mask, sample_weight, reduction, target_scale, eps)
    device = hidden.device.type
    if not hidden.is_meta and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype != hidden.dtype or value.device != hidden.device):
            expected = f"{hidden.dtype} on {hidden.device}, like hidden"
            raise TypeError(f"{name}: expected {expected}, got {value.dtype} on {value.device}")
    if uses_reference(target, sample_weight, target_scale):
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
    row_weight = reference.row_weight(mask, sample_weight, accumulator(hidden))
    gradient = torch.is_grad_enabled() and reduction != "none"
    op = PROJECTION_COSINE_ROWS if reduction == "none" else PROJECTION_COSINE_SUM
    loss, total, *_ = op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1, width),
        flat(target_scale),
        flat(row_weight),
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
    # The gradient of hidden was saved before this division, which might underflow in float16.
    share = row_weight.sum()
    return total / torch.where(share > 0, share, 1.0)
