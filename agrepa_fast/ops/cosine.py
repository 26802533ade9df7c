"""Cosine alignment losses: of a projection (`projection_cosine_loss`) or of vectors at hand (`cosine_loss`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import cosine as reference
from ..reference.cosine import EPS


def _check(
    rows: torch.Size, width: int, target: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str
) -> None:
    if target.shape != (*rows, width):
        raise ValueError(f"target: expected {[*rows, width]}, got {list(target.shape)}")
    if mask is not None and (mask.shape != rows or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected bool {list(rows)}, got {mask.dtype} {list(mask.shape)}")
    if weight is not None and weight.shape != rows:
        raise ValueError(f"sample_weight: expected {list(rows)}, got {list(weight.shape)}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction: expected "none", "sum" or "mean", got {reduction!r}')


def cosine_loss(
    y: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = EPS,
) -> Tensor:
    """`1 - cos(y, target)` per row, safe in half precision.

    Args:
        y, target: [..., W], floating; need not be normalised.
        mask: [...] bool; a False row gives exactly zero loss and gradient, whatever it holds.
        sample_weight: [...] floating, multiplies the row's loss.
        reduction: "none" (weighted rows [...]), "sum", or "mean" over the sum of the weights
            (so it is a row mean: a token mean for [B, T, W], a sample mean for [B, W]).
        eps: added to each squared norm.

    Returns:
        float32 (float64 for float64 input).

    Raises:
        ValueError: when a shape or reduction does not fit.
    """
    _check(y.shape[:-1], y.shape[-1], target, mask, sample_weight, reduction)
    return reference.cosine_loss(y, target, mask=mask, sample_weight=sample_weight, reduction=reduction, eps=eps)


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
    """`1 - cos(hidden W^T + b, target)` per row: the last Linear of an alignment head and its loss in one op.

    Args:
        hidden: [..., D]; weight: [W, D]; bias: [W] or None; target: [..., W].
        mask, sample_weight, reduction, eps: as `cosine_loss`.

    Returns:
        float32 (float64 for float64 input).

    Raises:
        ValueError: when a shape or reduction does not fit.
    """
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected [teacher width, {hidden.shape[-1]}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    _check(hidden.shape[:-1], weight.shape[0], target, mask, sample_weight, reduction)
    return reference.projection_cosine_loss(
        hidden, weight, bias, target, mask=mask, sample_weight=sample_weight, reduction=reduction, eps=eps
    )
