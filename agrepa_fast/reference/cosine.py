"""Cosine losses in plain PyTorch.

    loss_r = 1 - <y_r, z_r> / (sqrt(|y_r|^2 + eps) sqrt(|z_r|^2 + eps))        y = hidden W^T + b

in float32 or wider; z is the target, times the scale of its row where there is one. eps is added to the squared
norms: it keeps the gradient at a zero vector below 1 / sqrt(eps) = 1e4, which float16 can hold;
`F.cosine_similarity`'s clamp gives nan there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-8


def reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weighted rows [...] to "none" (themselves), their "sum", or their "mean" over the sum of the weights."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight is None:
        return loss.mean()
    total = weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1.0)


def row_weight(mask: Tensor | None, sample_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The weight of each row [...], 0 where masked; None when every row counts once."""
    weight = None if sample_weight is None else sample_weight.to(dtype)
    if mask is not None:
        weight = mask.to(dtype) if weight is None else torch.where(mask, weight, 0)
    return weight


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
    """`1 - cos(y, target)` per row, weighted and reduced.

    y, target [..., W]; mask [...] bool; sample_weight [...] floating. reduction "none" gives the weighted
    rows [...], "sum" their sum, "mean" the sum over the sum of the weights (0 when that is 0).
    target_scale [...] multiplies the target's rows; normalized takes their length as 1.
    Rows with mask False or weight 0 contribute exactly zero loss and zero gradient, whatever they hold."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    weight = row_weight(mask, sample_weight, dtype)
    y, target = y.to(dtype), target.to(dtype)
    if target_scale is not None:
        target = target * target_scale.to(dtype).unsqueeze(-1)
    if weight is not None:
        # Before the cosine: a masked row may hold nan, and nan * 0 would reach the gradient.
        kept = (weight != 0).unsqueeze(-1)
        y, target = torch.where(kept, y, 0), torch.where(kept, target, 0)
    inner = (y * target).sum(-1)
    norms = torch.rsqrt(y.square().sum(-1) + eps)
    if not normalized:
        norms = norms * torch.rsqrt(target.square().sum(-1) + eps)
    loss = 1 - inner * norms
    return reduce(loss if weight is None else loss * weight, weight, reduction)


def cosine_rows(
    y: Tensor,
    target: Tensor,
    target_scale: Tensor | None,
    row_weight: Tensor | None,
    eps: float,
    normalized: bool,
    loss: Tensor | None,
    grad: Tensor | None,
) -> None:
    """The rows of `cosine_loss` and their gradient, written into loss [M] and grad [M, W] where given.

    y [M, W], target [M, W] (int8 with target_scale [M]), row_weight [M]. grad may be y itself. The same contract as
    the kernel's: d loss / d y = w / (|y| |z|) (y <y, z> / |y|^2 - z), exactly 0 where w is 0."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    wide, z = y.to(dtype), target.to(dtype)
    if target_scale is not None:
        z = z * target_scale.to(dtype).unsqueeze(-1)
    # A row that is left out may hold nan. It is overwritten at the end, which is cheaper than clean copies of y and z.
    left_out = None if row_weight is None else row_weight == 0
    inner = torch.linalg.vecdot(wide, z)
    square = torch.linalg.vecdot(wide, wide) + eps
    inverse = square.rsqrt()
    if not normalized:
        inverse = inverse * (torch.linalg.vecdot(z, z) + eps).rsqrt()
    if loss is not None:
        torch.sub(1, inner * inverse, out=loss)
        if row_weight is not None and left_out is not None:
            loss.mul_(row_weight).masked_fill_(left_out, 0)
    if grad is not None:
        factor = inverse if row_weight is None else inverse * row_weight
        along = (factor * inner / square).unsqueeze(-1)
        rows = torch.mul(wide, along, out=grad if grad.dtype == dtype else None)
        rows.addcmul_(z, factor.unsqueeze(-1), value=-1)
        if left_out is not None:
            rows.masked_fill_(left_out.unsqueeze(-1), 0)
        if rows is not grad:
            grad.copy_(rows)


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
) -> Tensor:
    """`cosine_loss(hidden weight^T + bias, target)`: hidden [..., D], weight [W, D], bias [W], target [..., W]."""
    kept = row_weight(mask, sample_weight, torch.promote_types(hidden.dtype, torch.float32))
    if kept is not None:
        # Before the Linear: its weight's gradient sums over rows, and 0 * nan of one row would spoil all of it.
        hidden = torch.where((kept != 0).unsqueeze(-1), hidden, 0)
    projected = F.linear(hidden, weight, bias)
    return cosine_loss(
        projected,
        target,
        mask=mask,
        sample_weight=sample_weight,
        reduction=reduction,
        eps=eps,
        target_scale=target_scale,
        normalized=normalized,
    )
