"""`cosine_rows`: the rows of a cosine loss and their gradient in one pass, for `cosine_loss` and
`projection_cosine_loss`.

    loss_r = w_r (1 - <y, z> / (sqrt(|y|^2 + eps) sqrt(|z|^2 + eps)))            y [M, W], z [M, W], w [M]
    dy_r   = w_r / (sqrt(|y|^2 + eps) sqrt(|z|^2 + eps)) (y <y, z> / (|y|^2 + eps) - z)

z is the target, or the int8 target times the scale of its row. With `normalized` its length is taken as 1. A row with
w = 0 is not read, and its loss and gradient are exactly 0. The gradient may overwrite y: a program reads its rows
completely before it writes them.
Bytes per row of W elements of b bytes (targets of c bytes): W (b + c) + 4 for the loss, W b more for the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, accumulator, alignment, configuration, launch, row_contiguous


@triton.jit(do_not_specialize=["y_row", "target_row", "rows"])
def _cosine_kernel(
    y_ptr,
    target_ptr,
    target_scale_ptr,
    weight_ptr,
    loss_ptr,
    grad_ptr,
    y_row,
    target_row,
    rows,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    Y_UNIT: tl.constexpr,
    TARGET_UNIT: tl.constexpr,
    EPS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ACC: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_D)
    if weight_ptr is None:
        w = (r < rows).to(ACC)
    else:
        w = tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(ACC)
    inside = (w != 0)[:, None] & (c < WIDTH)[None, :]
    y = tl.load(y_ptr + (Y_UNIT * (r * y_row))[:, None] + c[None, :], mask=inside, other=0.0).to(ACC)
    z = tl.load(target_ptr + (TARGET_UNIT * (r * target_row))[:, None] + c[None, :], mask=inside, other=0).to(ACC)
    if target_scale_ptr is not None:
        z *= tl.load(target_scale_ptr + r, mask=w != 0, other=0.0).to(ACC)[:, None]
    inner = tl.sum(y * z, axis=1)
    y_square = tl.sum(y * y, axis=1) + EPS
    norms = tl.sqrt(y_square)
    if not NORMALIZED:
        norms *= tl.sqrt(tl.sum(z * z, axis=1) + EPS)
    if loss_ptr is not None:
        tl.store(loss_ptr + r, tl.where(w != 0, w * (1.0 - inner / norms), 0.0), mask=r < rows)
    if grad_ptr is not None:
        grad = (w / norms)[:, None] * (y * (inner / y_square)[:, None] - z)
        grad = tl.where((w != 0)[:, None], grad, 0.0)
        tl.store(grad_ptr + (r * WIDTH)[:, None] + c[None, :], grad, mask=(r < rows)[:, None] & (c < WIDTH)[None, :])


def cosine_rows(
    y: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    row_weight: Tensor | None,
    eps: float,
    normalized: bool,
    loss: Tensor | None,
    grad: Tensor | None,
    config: LaunchConfig | None = None,
) -> None:
    """Write the weighted losses into `loss` [M] and the gradients of y into `grad` [M, W]; either may be None.

    y [M, W] floating; target [M, W] floating, or int8 with target_scale [M]; row_weight [M] or None for ones.
    loss is contiguous in the accumulator's dtype, grad contiguous in any dtype; grad may be y itself."""
    y, target = row_contiguous(y), row_contiguous(target)
    rows, width = y.shape
    config = config or configuration("cosine_rows", width, y.device)
    y_unit, target_unit = alignment(y.stride(0)), alignment(target.stride(0))
    launch(
        _cosine_kernel,
        y.device,
        triton.cdiv(rows, config.block_t),
        y,
        target,
        None if target_scale is None else target_scale.contiguous(),
        None if row_weight is None else row_weight.contiguous(),
        *(loss, grad, y.stride(0) // y_unit, target.stride(0) // target_unit, rows),
        num_warps=config.num_warps,
        WIDTH=width,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_T=config.block_t,
        Y_UNIT=y_unit,
        TARGET_UNIT=target_unit,
        EPS=eps,
        NORMALIZED=normalized,
        ACC=accumulator(y)[1],
    )
