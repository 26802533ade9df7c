"""Score batch after batch until the K highest layers are separated; layers that cannot reach them are dropped.

Successive elimination (Even-Dar, Mannor and Mansour, 2006) on paired differences between layers' scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from .plan import AblationPlan
from .runner import attribute_layers
from .scores import LayerScores, whole_number


@dataclass(frozen=True, eq=False)
class AdaptiveScores:
    """The result of `adaptive_scores`, and what it saved.

    Attributes:
        scores: the layers that were never dropped, on all clips.
        dropped: {layer: number of clips after which it was dropped}, in order of dropping.
        separated: whether exactly K layers are left; False when the batches or the budget ran out before.
        block_evaluations: cost in evaluations of a block on one sample.
        saved: the share of the cost of scoring all layers on the same batches that dropping layers saved.
    """

    scores: LayerScores
    dropped: dict[int, int]
    separated: bool
    block_evaluations: float
    saved: float


def adaptive_scores(
    model: nn.Module,
    batches: Iterable[Any],
    k: int = 3,
    confidence: float = 0.95,
    budget: float | None = None,
    t_points: int = 1,
    minimum_clips: int = 8,
    **options: Any,
) -> AdaptiveScores:
    """Find the K layers of the highest FoG-A score without scoring every layer on every clip.

    After each batch a layer is dropped when its mean is below that of each of the K highest layers by more than
    Student's interval of their paired difference. The error 1 - `confidence` is divided among the K (L - 1) pairs of
    one of the true K highest and another layer, and among the rounds (round r gets 6 / (pi r)^2 of it).

    Args:
        model, options: as in `attribute_layers` (without `blocks`, `branches`, `domains` and `clips`).
        batches: inputs of `attribute_layers`, each with new clips drawn like the others.
        k: layers wanted.
        confidence: probability that no layer of the true K highest is dropped, if the differences are nearly normal.
        budget: stop before a batch that would bring the cost above so many block evaluations on one sample.
        t_points: length of the grid of t folded into each batch, t-major as `flow.probe_inputs` folds it.
        minimum_clips: clips seen before anything is dropped; below about 8 the interval relies on normality.

    Raises:
        ValueError: k or confidence does not fit, a batch does not hold whole grids of t, or there is no batch at all
            (also when the budget is too small for the first).
    """
    if isinstance(batches, Mapping | Tensor):
        raise TypeError(f"batches: expected an iterable of batches, [inputs] for one, got {type(batches).__name__}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    whole_number("t_points", t_points, 1)
    whole_number("minimum_clips", minimum_clips, 2)
    whole_number("k", k, 1)
    if budget is not None and not budget > 0:
        raise ValueError(f"budget: expected a number of block evaluations above 0, got {budget}")
    taken = {"blocks", "branches", "domains", "clips"} & set(options)
    if taken:
        raise ValueError(f"{sorted(taken)[0]}: not for the adaptive probe, which chooses the layers itself")
    remaining: Sequence[int] | None = None
    parts: list[LayerScores] = []
    dropped: dict[int, int] = {}
    cost = full = 0.0
    depth = pairs = 0
    for inputs in batches:
        if parts and budget is not None:
            next_cost = AblationPlan.build(depth, remaining).block_evaluations * parts[-1].by_sample.shape[1]
            if cost + next_cost > budget:
                break
        part = attribute_layers(model, inputs, remaining, **options)
        samples = part.by_sample.shape[1]
        if samples % t_points:
            raise ValueError(f"t_points: {samples} samples are no whole number of grids of {t_points}")
        if remaining is None:
            depth = len(part.layers)
            remaining = part.layers
            pairs = k * max(1, depth - 1)
            whole_number("k", k, 1, depth, "layers")
        full += AblationPlan.build(depth).block_evaluations * samples
        cost += AblationPlan.build(depth, remaining).block_evaluations * samples
        parts.append(part)
        clips = torch.cat([_clip_means(part, remaining, t_points) for part in parts], dim=1)
        if clips.shape[1] >= minimum_clips and len(remaining) > k:
            error = (1 - confidence) * 6 / (torch.pi * len(parts)) ** 2 / pairs
            keep = _not_beaten(clips, k, error)
            dropped.update({layer: clips.shape[1] for layer, kept in zip(remaining, keep) if not kept})
            remaining = [layer for layer, kept in zip(remaining, keep) if kept]
        if len(remaining) == k:
            break
    if remaining is None:
        raise ValueError("batches: expected at least one")
    return AdaptiveScores(_joined(parts, remaining, t_points), dropped, len(remaining) == k, cost, 1 - cost / full)


def _clip_means(part: LayerScores, layers: Sequence[int], t_points: int) -> Tensor:
    """Mean of each clip's scores over the grid of t: [layers, clips]."""
    rows = part.by_sample[[part.layers.index(layer) for layer in layers]]
    return rows.unflatten(1, (t_points, -1)).mean(1)


def _not_beaten(clips: Tensor, k: int, error: float) -> list[bool]:
    """Which layers could still be among the k highest: not surely below every one of the k highest means."""
    quantile = student_quantile(1 - error, clips.shape[1] - 1)
    means = clips.mean(1)
    top = means.argsort(descending=True, stable=True)[:k]
    difference = clips[top].unsqueeze(1) - clips.unsqueeze(0)  # [k, layers, clips]
    lead = difference.mean(2) - quantile * difference.std(2) / clips.shape[1] ** 0.5
    beaten = (lead > 0).all(0)
    beaten[top] = False
    return (~beaten).tolist()


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion about the normal's (Abramowitz and Stegun, 26.7.5).

    It is within 1 % for 0.5 < p < 0.998 and 7 or more degrees of freedom, and too small beyond."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _joined(parts: list[LayerScores], layers: Sequence[int], t_points: int) -> LayerScores:
    """The remaining layers on the samples of all batches."""
    counts = [part.by_sample.shape[1] // t_points for part in parts]
    clips = [
        first + i
        for first, count in zip([sum(counts[:n]) for n in range(len(counts))], counts)
        for _ in range(t_points)
        for i in range(count)
    ]
    times = [part.t for part in parts if part.t is not None]
    noises = [part.noise_by_sample for part in parts if part.noise_by_sample is not None]
    floors = [part.floor_by_sample for part in parts if part.floor_by_sample is not None]
    return LayerScores(
        tuple(layers),
        torch.cat([part.by_sample[[part.layers.index(layer) for layer in layers]] for part in parts], dim=1),
        parts[0].metric,
        floor_by_sample=torch.cat(floors),
        t=torch.cat(times) if len(times) == len(parts) else None,
        clips=tuple(clips),
        noise_by_sample=torch.cat(noises) if len(noises) == len(parts) else None,
    )
