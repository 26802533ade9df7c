"""Cosine losses in plain PyTorch.

    loss_r = 1 - <y_r, z_r> / (sqrt(|y_r|^2 + eps) sqrt(|z_r|^2 + eps))        y = hidden W^T + b

in float32 or wider. eps is added to the squared norms: it keeps the gradient at a zero vector below
1 / sqrt(eps) = 1e4, which float16 can hold; `F.cosine_similarity`'s clamp gives nan there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-8


def _reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight is None:
        return loss.mean()
    total = weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1.0)


def _row_weight(mask: Tensor | None, sample_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
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
) -> Tensor:
    """`1 - cos(y, target)` per row, weighted and reduced.

    y, target [..., W]; mask [...] bool; sample_weight [...] floating. reduction "none" gives the weighted
    rows [...], "sum" their sum, "mean" the sum over the sum of the weights (0 when that is 0).
    Rows with mask False or weight 0 contribute exactly zero loss and zero gradient, whatever they hold."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    weight = _row_weight(mask, sample_weight, dtype)
    y, target = y.to(dtype), target.to(dtype)
    if weight is not None:
        # Before the cosine: a masked row may hold nan, and nan * 0 would reach the gradient.
        kept = (weight != 0).unsqueeze(-1)
        y, target = torch.where(kept, y, 0), torch.where(kept, target, 0)
    inner = (y * target).sum(-1)
    norms = torch.rsqrt(y.square().sum(-1) + eps) * torch.rsqrt(target.square().sum(-1) + eps)
    loss = 1 - inner * norms
    return _reduce(loss if weight is None else loss * weight, weight, reduction)


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
) -> Tensor:
    """`cosine_loss(hidden weight^T + bias, target)`: hidden [..., D], weight [W, D], bias [W], target [..., W]."""
    kept = _row_weight(mask, sample_weight, torch.promote_types(hidden.dtype, torch.float32))
    if kept is not None:
        # Before the Linear: its weight's gradient sums over rows, and 0 * nan of one row would spoil all of it.
        hidden = torch.where((kept != 0).unsqueeze(-1), hidden, 0)
    projected = F.linear(hidden, weight, bias)
    return cosine_loss(projected, target, mask=mask, sample_weight=sample_weight, reduction=reduction, eps=eps)
