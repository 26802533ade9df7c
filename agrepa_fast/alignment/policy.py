"""Which layers to align: `select_layers` (FoG-A) and the policies it is compared with."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from .rows import described
from .selection import WEIGHTINGS, LayerSelection, checked_numbers

if TYPE_CHECKING:
    from ..attribution.scores import LayerScores


def check_weighting(weighting: str) -> None:
    """Refuse an unknown way from scores to weights."""
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")


def check_k(k: int) -> None:
    """Refuse a number of layers that is no integer."""
    if not isinstance(k, Integral) or isinstance(k, bool):
        raise TypeError(f"k: expected a number of layers, got {k!r:.60}")


def select_layers(scores: LayerScores, k: int = 3, weighting: str = "share") -> LayerSelection:
    """AG-REPA's choice: the k layers of the highest mean score.

    Scores of branches are added up by layer; of equal scores the lower layer wins. Where no layer stands
    above the floor (a network at its adaLN-zero initialisation) the scores say nothing: a warning, and all
    layers with equal weights.

    Args:
        scores: [U] units; see `LayerScores`. The scores of one domain: `scores.domain("speech")`.
        k: how many layers, at least 1 and at most as many as were scored.
        weighting: "share": score / sum over the chosen layers (the paper). "score": the score itself (the authors'
            release). "by-time": the k highest layers at each t of the scores, each sample weighted by their shares
            at its own t; where no layer stands above the floor at one t, the k of the highest mean score.

    Raises:
        ValueError, TypeError: k does not fit, `scores` are no `LayerScores`, or have no t for "by-time".
    """
    if not all(hasattr(scores, name) for name in ("layers", "mean", "above_floor")):
        raise TypeError(
            f"scores: expected LayerScores, as attribute_layers returns them, got a {type(scores).__name__}"
        )
    check_weighting(weighting)
    if getattr(scores, "sets", None) is not None:
        raise ValueError("scores: of sets of layers; choose from scores of single blocks (without sets= and spans=)")
    check_k(k)
    by_layer = mean_by_layer(scores)
    if not 1 <= k <= len(by_layer):
        raise ValueError(f"k: expected 1 to {len(by_layer)} layers, got {k}")
    t_grid = times_of(scores) if weighting == "by-time" else ()
    if not scores.above_floor.any():
        warnings.warn(
            "no layer's score is above the floor: falling back to equal weights on all layers; train before probing",
            stacklevel=2,
        )
        return LayerSelection.uniform(list(by_layer), FALLBACK, t_grid).named(block_names(scores))
    if weighting != "by-time":
        chosen = {layer: by_layer[layer] for layer in highest(by_layer, k)}
        return LayerSelection.from_scores(chosen, "foga", weighting).named(block_names(scores))
    columns = []
    for t in t_grid:
        there = scores.at(t)
        column = mean_by_layer(there) if there.above_floor.any() else by_layer
        columns.append({layer: column[layer] for layer in highest(column, k)})
    return selection_by_time(t_grid, columns, "foga").named(block_names(scores))


def block_names(scores: LayerScores) -> dict[int, str] | None:
    """{layer: its name in another model}; None where the scores carry numbers only, as those of a `DiT`."""
    names: dict[int, str] = {}
    branches = getattr(scores, "branches", None) or ("",) * len(scores.layers)
    for layer, name, branch in zip(scores.layers, getattr(scores, "names", ()), branches):
        names[layer] = name.removesuffix(f".{branch}") if branch else name
    return None if all(name == str(layer) for layer, name in names.items()) else names


def mean_by_layer(scores: LayerScores) -> dict[int, float]:
    """{layer: mean score}; the scores of a layer's branches are added up."""
    by_layer: dict[int, float] = {}
    for layer, mean in zip(scores.layers, scores.mean.tolist()):
        by_layer[layer] = by_layer.get(layer, 0.0) + mean
    return by_layer


def times_of(scores: LayerScores) -> tuple[float, ...]:
    """The distinct times of the scores' samples, ascending, to six digits (`LayerScores.at` tells no more apart)."""
    if scores.t is None:
        raise ValueError('scores: have no t, which weighting "by-time" needs: attribute with a t for each sample')
    return tuple(sorted({round(t, 6) for t in scores.t.tolist()}))


def highest(scores: Mapping[int, float], k: int) -> list[int]:
    """The k layers of the highest score, ascending; of equal scores the lower layer."""
    return sorted(sorted(scores, key=lambda layer: (-scores[layer], layer))[:k])


def selection_by_time(t_grid: Sequence[float], columns: Sequence[Mapping[int, float]], method: str) -> LayerSelection:
    """A "by-time" selection of the layers {layer: score} at each time of the grid; elsewhere their scores are 0."""
    layers = sorted({layer for column in columns for layer in column})
    return LayerSelection.by_time(t_grid, {n: [column.get(n, 0.0) for column in columns] for n in layers}, method)


FALLBACK = "uniform"  # the method of a selection of all layers, because no score stood above the floor


# What a policy needs beside the depth and k.
POLICIES = {
    "fixed": "layers",
    "even": "",
    "random": "",
    "deepest": "",
    "shallowest": "",
    "stored": "values",
    "gradient-norm": "values",
    "first-order": "values",
    "foga": "scores",
    "foga-soft": "scores",
}


def choose_layers(
    policy: str,
    depth: int,
    k: int = 3,
    *,
    layers: Sequence[int] = (),
    values: Sequence[float] | Tensor = (),
    scores: LayerScores | None = None,
    seed: int = 0,
    weighting: str = "share",
) -> LayerSelection:
    """AG-REPA's choice and the controls it is compared with, each in one line.

    Args:
        policy: "fixed" (`layers`); "even" (k layers in the middles of k equal parts of the depth); "random" (`seed`);
            "deepest"; "shallowest"; the k highest of `values`: "stored" (LASP), "gradient-norm" and "first-order"
            (`layer_sensitivity`); from `scores`: "foga" (`select_layers`) and "foga-soft" (every scored layer,
            weighted by its score). All but FoG-A's weigh their layers equally.
        depth: number of layers. k: how many to choose; "fixed" takes all of `layers`.
        values: [depth] what a layer stores, or how the loss reacts to it.
        weighting: as `select_layers`; all but FoG-A's policies have "share" alone.

    Raises:
        UserError: an unknown policy, a k or layer outside the depth, or what the policy needs is not given.
    """
    if policy not in POLICIES:
        raise UserError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    layers = checked_numbers("layers", layers, Integral, int)
    if isinstance(depth, bool) or not isinstance(depth, Integral) or depth < 1:
        raise ValueError(f"depth: expected a number of layers, an integer of at least 1, got {depth!r:.60}")
    if not isinstance(values, Iterable) or (isinstance(values, Tensor) and values.dim() != 1):
        raise ValueError(f"values: expected {depth} numbers, one a layer, got {described(values)}")
    values = list(values)
    given = {"layers": len(layers) > 0, "values": len(values) > 0, "scores": scores is not None, "": True}
    if not given[POLICIES[policy]]:
        raise UserError(f"policy {policy!r} needs {POLICIES[policy]}")
    check_k(k)
    if policy != "fixed" and not 1 <= k <= depth:
        raise UserError(f"k: expected 1 to {depth} layers, got {k}")
    check_weighting(weighting)
    if POLICIES[policy] == "scores":
        assert scores is not None
        selection = select_layers(scores, len(set(scores.layers)) if policy == "foga-soft" else k, weighting)
        if max(scores.layers) >= depth:
            raise UserError(f"scores: of layers up to {max(scores.layers)}, but the depth is {depth}")
        return selection if selection.method == FALLBACK else replace(selection, method=policy)
    if weighting != "share":
        raise UserError(f"weighting {weighting!r} needs policy foga or foga-soft: {policy!r} weighs its layers equally")
    if policy == "fixed":
        outside = [layer for layer in layers if not 0 <= layer < depth]
        if outside or len(set(layers)) != len(layers):
            raise UserError(f"layers: expected distinct layers from 0 to {depth - 1}, got {list(layers)}")
        chosen = list(layers)
    elif policy == "even":
        chosen = [(2 * i + 1) * depth // (2 * k) for i in range(k)]
    elif policy == "random":
        chosen = random.Random(seed).sample(range(depth), k)
    elif policy in ("deepest", "shallowest"):
        chosen = list(range(depth))[-k:] if policy == "deepest" else list(range(k))
    else:
        numbers = [float(value) for value in values]
        if len(numbers) != depth or not all(value == value for value in numbers):
            raise UserError(f"values: expected {depth} numbers, one a layer, got {numbers}")
        chosen = highest(dict(enumerate(numbers)), k)
    return LayerSelection.uniform(chosen, policy)


def layer_sensitivity(loss: Tensor, hidden: Sequence[Tensor], block_input: Tensor) -> tuple[Tensor, Tensor]:
    """How a loss reacts to each block, from one backward pass: ([L] gradient norms, [L] first-order scores).

    gradient norm: |dL/dh_l|. First order: |<dL/dh_l, h_l - h_{l-1}>|, the change of the loss that a linear expansion
    predicts when block l is switched off (m_l = 0 in FoG-A's gate view). FoG-A measures that change instead.

    Args:
        loss: a scalar on the graph of `hidden`.
        hidden: the outputs of all blocks in order, [B, T, D] each. block_input: what enters block 0 [B, T, D].
    """
    if isinstance(hidden, Mapping) or not all(isinstance(h, Tensor) for h in hidden):
        raise TypeError(
            f"hidden: expected the blocks' outputs in order, a list of tensors, got a {type(hidden).__name__}"
        )
    grads = torch.autograd.grad(loss, list(hidden), retain_graph=True)
    wide = [grad.detach().to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    steps = [h.detach() - before.detach() for h, before in zip(hidden, [block_input, *hidden])]
    norms = torch.stack([grad.norm() for grad in wide])
    return norms, torch.stack([(grad * step.to(grad.dtype)).sum().abs() for grad, step in zip(wide, steps)])
