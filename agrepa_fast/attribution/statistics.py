"""How reliable a ranking of layers is: rank correlation, and the bootstrap of the top K.

The functions read `LayerScores` [U units, N samples]. Samples of one clip are drawn together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scores import LayerScores, whole_number


@dataclass(frozen=True, eq=False)
class TopK:
    """The K highest units, and how often bootstrap resamples of the clips confirm them.

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
    # How often each clip is drawn [R, clips]; all samples of a clip are drawn with it.
    weights = torch.zeros(resamples, clips, dtype=sums.dtype)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=sums.dtype))
    means = (weights @ sums.T) / (weights @ counts.to(sums.dtype)).unsqueeze(1)
    top = _top(scores.mean.unsqueeze(0), k)[0]
    chosen = torch.zeros(resamples, units, dtype=torch.bool).scatter_(1, _top(means, k), True)
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype), dim=0)
    return TopK(
        tuple(scores.names[u] for u in top.tolist()),
        chosen.double().mean(0),
        chosen[:, top].all(1).double().mean().item(),
        low,
        high,
    )


@dataclass(frozen=True)
class TopKByClips:
    """How the K highest units fare when fewer clips, or more, are scored; entry i is for clips[i] of them.

    Attributes:
        clips: numbers of clips. agreement: share of the resamples whose K highest units are those of all clips.
        overlap: mean share of the K highest units of a resample that are among those of all clips.
    """

    clips: tuple[int, ...]
    agreement: tuple[float, ...]
    overlap: tuple[float, ...]


def top_k_by_clips(scores: LayerScores, k: int = 3, resamples: int = 500, seed: int = 0) -> TopKByClips:
    """How many clips are enough: the K highest units of n clips, drawn with replacement, against those of all N clips.

    n runs over the powers of two below 2 N, and N and 2 N. Beyond N it says what more clips of the same kind would do.

    Raises:
        ValueError: k or resamples do not fit, or there is a single clip.
    """
    _check_scores(scores)
    whole_number("k", k, 1, len(scores.names), "units")
    whole_number("resamples", resamples, 1)
    sums, counts = scores.by_clip()
    total = counts.numel()
    if total < 2:
        raise ValueError("top_k_by_clips: expected at least two clips, got 1")
    generator = torch.Generator().manual_seed(seed)
    reference = _top(scores.mean.unsqueeze(0), k)[0]
    sizes = sorted({2**n for n in range((2 * total).bit_length()) if 2**n < 2 * total} | {total, 2 * total})
    agreement, overlap = [], []
    for size in sizes:
        drawn = torch.randint(total, (resamples, size), generator=generator)
        means = sums[:, drawn].sum(2) / counts[drawn].sum(1)  # [U, R]
        shared = torch.isin(_top(means.T, k), reference).sum(1)
        agreement.append((shared == k).double().mean().item())
        overlap.append((shared.double() / k).mean().item())
    return TopKByClips(tuple(sizes), tuple(agreement), tuple(overlap))


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation rho of two vectors: Pearson's correlation of their ranks, ties sharing the mean rank.

    nan where one of them is constant, as one number is. Raises `ValueError` unless both are vectors of one length."""
    _check_pair(a, b)
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def kendall(a: Tensor, b: Tensor) -> float:
    """Rank correlation tau-b of two vectors (Kendall, 1945): concordant less discordant pairs, corrected for ties.

    nan where one of them is constant, as one number is. Raises `ValueError` unless both are vectors of one length."""
    _check_pair(a, b)
    x = (a.double().unsqueeze(0) - a.double().unsqueeze(1)).sign()
    y = (b.double().unsqueeze(0) - b.double().unsqueeze(1)).sign()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def rank_stability(before: LayerScores, after: LayerScores, k: int = 3) -> dict[str, float]:
    """Compare the rankings of two probes of the same units, by their mean scores.

    Returns:
        {"spearman": rank correlation, "kendall": tau-b, "overlap": share of the K highest units that both have}.

    Raises:
        ValueError, TypeError: the probes scored different units, or k does not fit.
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
    """The columns [R, k] of the k highest values of each row [R, U], highest first; if equal, the earlier first."""
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
    if a.dim() != 1 or a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"expected two vectors of one length, not empty, got {list(a.shape)} and {list(b.shape)}")
