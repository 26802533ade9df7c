"""Choosing layers again while training: scores averaged over probes, and no change for a small lead."""

from __future__ import annotations

from collections.abc import Sequence

from .policy import LayerSelection


def average_scores(before: Sequence[float] | None, scores: Sequence[float], momentum: float) -> list[float]:
    """Exponential moving average over probes: momentum `before` + (1 - momentum) `scores`; the first as it is."""
    if before is None:
        return list(scores)
    return [momentum * old + (1 - momentum) * new for old, new in zip(before, scores, strict=True)]


def reselect(current: LayerSelection, scores: Sequence[float], margin: float, weighted: bool) -> LayerSelection:
    """The current layers, after every change that is worth it.

    The best layer outside takes the place of the worst one inside while its score is more than (1 + margin) times as
    high: hysteresis, so that two layers of nearly the same score do not take turns.

    Args:
        scores: one number >= 0 for each layer of the network. margin: >= 0; 0 is the plain top K.
        weighted: the weights are the scores' shares (FoG-A), else equal.

    Raises:
        ValueError: fewer scores than the selection's layers need.
    """
    if current.layers[-1] >= len(scores):
        raise ValueError(f"scores: {len(scores)} for layers up to {current.layers[-1]}")
    inside = set(current.layers)
    outside = set(range(len(scores))) - inside
    while outside:
        # Of equal scores the lower layer wins, as in select_layers.
        best = min(outside, key=lambda layer: (-scores[layer], layer))
        worst = max(inside, key=lambda layer: (-scores[layer], layer))
        if scores[best] <= (1 + margin) * scores[worst]:
            break
        inside = inside - {worst} | {best}
        outside = outside - {best} | {worst}
    layers = tuple(sorted(inside))
    total = sum(scores[layer] for layer in layers)
    if not weighted or total == 0:
        return LayerSelection.uniform(layers, current.method)
    return LayerSelection(layers, tuple(scores[layer] / total for layer in layers), current.method)
