"""Distances between two sets of rows that compare how the rows relate, not the rows themselves; z-scored targets.

y [..., N, W], target [..., N, E], mask [..., N] -> [...]; the rows are the frames of a clip or the clips of a batch.
All of it in float32 or wider, also under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.cosine import EPS
from .rows import comparable


def standardise(features: Tensor, mask: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Each channel to mean 0 and variance 1 over the valid frames of its clip: iREPA's normalisation.

        z' = (z - mean_t z) / sqrt(var_t z + eps)        (arXiv 2512.10794, with the whole mean taken off)

    features [B, T, W], mask [B, T] bool -> [B, T, W] in float32 or wider; invalid frames are 0, whatever they hold."""
    x, count = _valid(features, mask)
    x = _centred(x, mask, count)
    return x * torch.rsqrt(x.square().sum(-2, keepdim=True) / count + eps)


def relation_distance(y: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of the two matrices of cosines between the rows (token similarity).

        mean_ij (cos(y_i, y_j) - cos(z_i, z_j))^2        over the pairs of valid rows

    As VideoREPA's token relation distillation (arXiv 2505.23656), with the square of similarity-preserving
    distillation (arXiv 1907.09682) in place of its margin. Rows without a length are similar to none. 0 for no row."""
    with torch.autocast(y.device.type, enabled=False):
        (y, count), (z, _) = _valid(y, mask), _valid(target, mask)
        difference = _cosines(y) - _cosines(z)
        return difference.square().sum((-2, -1)) / count.square().squeeze((-2, -1))


def cka_distance(y: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - linear CKA of the valid rows (Kornblith et al., arXiv 1905.00414), from the N x N kernels.

        1 - <Y Y^T, Z Z^T> / (|Y Y^T|_F |Z Z^T|_F)        Y, Z: y and target, each channel centred over the rows

    Unchanged by rotation and scale of either side. Without two different rows on a side it is 1, without a gradient."""
    with torch.autocast(y.device.type, enabled=False):
        kernels = []
        for rows in (y, target):
            x, count = _valid(rows, mask)
            x = _centred(x, mask, count)
            # To length 1 as a whole first: the kernel's squares below would leave float32 for large features.
            x = x * torch.rsqrt(x.square().sum((-2, -1), keepdim=True) + count * EPS)
            kernels.append(x @ x.mT)
        first, second = kernels
        norms = (first.square().sum((-2, -1)) + EPS) * (second.square().sum((-2, -1)) + EPS)
        return 1 - (first * second).sum((-2, -1)) * torch.rsqrt(norms)


OBJECTIVES = ("cosine", "relation", "cka")
RELATIONAL = {"relation": relation_distance, "cka": cka_distance}


def related(objective: str, y: Tensor, target: Tensor, rows: Tensor | None) -> Tensor:
    """The distance of each set of rows by "relation" or "cka"; 0 for a set without two rows to compare."""
    distances = RELATIONAL[objective](y, target, rows)
    sets = comparable(rows)
    return distances if sets is None else torch.where(sets, distances, 0)


def _valid(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x with invalid rows set to 0 before anything is computed from them, and the number of valid rows [..., 1, 1]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x, x.new_full((1, 1), x.shape[-2])
    return torch.where(mask.unsqueeze(-1), x, 0), mask.sum(-1).clamp_min(1)[..., None, None].to(x.dtype)


def _centred(x: Tensor, mask: Tensor | None, count: Tensor) -> Tensor:
    x = x - x.sum(-2, keepdim=True) / count
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)


def _cosines(x: Tensor) -> Tensor:
    x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
    return x @ x.mT
