"""How far a ranking of layers can be trusted: rank correlation, and the bootstrap of the top K.

They read `LayerScores` [U units, N samples]; samples of one clip are drawn together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scores import LayerScores, whole_number


@dataclass(frozen=True, eq=False)
class TopK:
    """The K highest units, and how they fared over bootstrap resamples of the clips.

    Attributes:
        names: the K units of the highest mean, highest first; of equal means the earlier unit comes first.
        frequency: [U] share of the resamples in which a unit is among the K highest, in order of the scores' units.
        agreement: share of the resamples whose K highest are exactly `names` (in any order).
        low, high: [U] bounds of the mean's percentile interval.
    """

    names: tuple[str, ...]
    frequency: Tensor
    agreement: float
    low: Tensor
    high: Tensor


def bootstrap_top_k(
    scores: LayerScores, k: int = 3, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> TopK:
    """Percentile bootstrap (Efron and Tibshirani, 1993) of the K highest units, over clips.

    Raises:
        ValueError: k, confidence or resamples do not fit, or there is a single clip.
    """
    _check_scores(scores)
    units = len(scores.names)
    whole_number("k", k, 1, units, "units")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    whole_number("resamples", resamples, 1)
    whole_number("seed", seed, -(2**63), 2**64 - 1)
    sums, counts = scores.by_clip()
    clips = counts.numel()
    if clips < 2:
        raise ValueError("bootstrap: expected at least two clips, got 1")
    drawn = torch.randint(clips, (resamples, clips), generator=torch.Generator().manual_seed(seed))
    # How often each clip is drawn [R, clips]; a clip brings all of its samples.
    weights = torch.zeros(resamples, clips, dtype=sums.dtype)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=sums.dtype))
    means = (weights @ sums.T) / (weights @ counts.to(sums.dtype)).unsqueeze(1)
    own = _top(scores.mean.unsqueeze(0), k)[0]
    chosen = torch.zeros(resamples, units, dtype=torch.bool).scatter_(1, _top(means, k), True)
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype), dim=0)
    return TopK(
        tuple(scores.names[u] for u in own.tolist()),
        chosen.double().mean(0),
        chosen[:, own].all(1).double().mean().item(),
        low,
        high,
    )


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation rho of two vectors: Pearson's correlation of their ranks, ties sharing the mean rank.

    nan where one of them is constant. Raises `ValueError` unless both are vectors of one length, at least 2."""
    _check_pair(a, b)
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def kendall(a: Tensor, b: Tensor) -> float:
    """Rank correlation tau-b of two vectors (Kendall, 1945): concordant less discordant pairs, corrected for ties.

    nan where one of them is constant. Raises `ValueError` unless both are vectors of one length, at least 2."""
    _check_pair(a, b)
    x = (a.double().unsqueeze(0) - a.double().unsqueeze(1)).sign()
    y = (b.double().unsqueeze(0) - b.double().unsqueeze(1)).sign()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def rank_stability(before: LayerScores, after: LayerScores, k: int = 3) -> dict[str, float]:
    """{"spearman", "kendall", "overlap"} of two probes of the same units; overlap is the shared part of the top K.

    Raises:
        ValueError: the probes scored other units, or k does not fit.
    """
    _check_scores(before)
    _check_scores(after)
    if before.names != after.names:
        raise ValueError(f"expected two probes of the same units, got {before.names} and {after.names}")
    whole_number("k", k, 1, len(before.names), "units")
    tops = [set(_top(scores.mean.unsqueeze(0), k)[0].tolist()) for scores in (before, after)]
    return {
        "spearman": spearman(before.mean, after.mean),
        "kendall": kendall(before.mean, after.mean),
        "overlap": len(tops[0] & tops[1]) / k,
    }


def _top(means: Tensor, k: int) -> Tensor:
    """[R, U] -> the columns of the k highest of each row [R, k], highest first, the earlier of equals first."""
    return means.argsort(dim=1, descending=True, stable=True)[:, :k]


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value from 1, equal values sharing the mean of theirs."""
    _, group, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def _check_scores(scores: LayerScores) -> None:
    if not isinstance(scores, LayerScores):
        raise TypeError(f"scores: expected LayerScores, got {type(scores).__name__}")


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.dim() != 1 or a.shape != b.shape or a.numel() < 2:
        raise ValueError(f"expected two vectors of one length, at least 2, got {list(a.shape)} and {list(b.shape)}")
