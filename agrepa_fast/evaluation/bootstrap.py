"""Confidence intervals by the bootstrap (Efron and Tibshirani, 1993), with clips as the unit that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 1000
BLOCK = 1 << 22  # clips drawn at once: 32 MiB of indices


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; low and high are None where there is no interval (a single clip, say)."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def ratio(numerator: Tensor, denominator: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """sum(numerator) / sum(denominator) over clips, both [N] float64, with its percentile interval.

    With a denominator of ones this is a mean; with errors and words it is the word error rate."""
    return _percentiles([(numerator, denominator)], seed, resamples)


def ratio_difference(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The ratio of the first system less that of the second, on the same clips: all tensors [N], in one order.

    Both systems take the same clips in every resample, so what makes a clip hard for both of them cancels."""
    return _percentiles([first, second], seed, resamples)


def _percentiles(pairs: list[tuple[Tensor, Tensor]], seed: int, resamples: int) -> Estimate:
    """pairs: one ratio, or two whose difference is estimated."""

    def difference(ratios: list[Tensor]) -> Tensor:
        return ratios[0] - ratios[1] if len(ratios) == 2 else ratios[0]

    clips = pairs[0][0].numel()
    value = difference([n.double().sum() / d.double().sum() for n, d in pairs]).item()
    if clips < 2:
        return Estimate(value)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    rows = max(1, BLOCK // clips)
    for start in range(0, resamples, rows):
        index = torch.randint(clips, (min(rows, resamples - start), clips), generator=generator)
        drawn.append(difference([n.double()[index].sum(1) / d.double()[index].sum(1) for n, d in pairs]))
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.cat(drawn).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def nested_mean(groups: Sequence[Tensor], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean over groups of each group's mean, groups [N_g] float64, with its percentile interval.

    Hierarchical: a resample draws groups (the seeds of a study), then clips of each drawn group. With one group only
    its clips are drawn; without a second clip or group there is no interval."""
    means = torch.stack([group.double().mean() for group in groups])
    value = means.mean().item()
    if len(groups) < 2 and groups[0].numel() < 2:
        return Estimate(value)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(groups), (resamples, len(groups)), generator=generator)
    totals = torch.zeros(resamples, dtype=torch.float64)
    for number, group in enumerate(groups):
        # A group that is drawn several times in a resample gets other clips each time.
        rows = (drawn == number).nonzero()[:, 0]
        block = max(1, BLOCK // group.numel())
        for part in rows.split(block):
            index = torch.randint(group.numel(), (len(part), group.numel()), generator=generator)
            totals.index_add_(0, part, group.double()[index].mean(1))
    tail = (1 - CONFIDENCE) / 2
    low, high = (totals / len(groups)).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)
