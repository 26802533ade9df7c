"""Choosing layers again while training: scores averaged over probes, and no change for a small lead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .policy import FALLBACK, POLICIES, block_names, choose_layers, highest, mean_by_layer, selection_by_time, times_of
from .selection import LayerSelection, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from ..attribution.scores import LayerScores

ALL = ""  # in the place of a teacher's name: all teachers, which share one selection


def average_scores(before: Sequence[float] | None, scores: Sequence[float], momentum: float) -> list[float]:
    """Exponential moving average over probes: momentum `before` + (1 - momentum) `scores`; the first as it is."""
    if before is None:
        return list(scores)
    return [momentum * old + (1 - momentum) * new for old, new in zip(before, scores, strict=True)]


def reselect(
    current: LayerSelection, scores: Sequence[float], margin: float, weighted: bool, weighting: str = "share"
) -> LayerSelection:
    """The current layers, after every change that is worth it.

    The best layer outside takes the place of the worst one inside while its score is more than (1 + margin) times as
    high: hysteresis, so that two layers of nearly the same score do not take turns.

    Args:
        scores: one number >= 0 for each layer of the network. margin: >= 0; 0 is the plain top K.
        weighted: the weights follow the scores (FoG-A), else they are equal.
        weighting: "share" or "score", as `select_layers`; `reselect_by_time` is for "by-time".

    Raises:
        ValueError: fewer scores than the selection's layers need.
    """
    layers = sorted(_changed(set(current.layers), scores, margin))
    by_layer = {layer: scores[layer] for layer in layers}
    if not weighted or sum(by_layer.values()) == 0:
        return LayerSelection.uniform(layers, current.method)
    return LayerSelection.from_scores(by_layer, current.method, weighting)


def reselect_by_time(current: LayerSelection, scores: Sequence[Sequence[float]], margin: float) -> LayerSelection:
    """`reselect` at each time of a "by-time" selection's grid: scores [times][layers of the network]."""
    before = [[n for n, score in zip(current.layers, column) if score > 0] for column in zip(*current.scores)]
    k = max(map(len, before))
    columns = []
    for inside, column in zip(before, scores, strict=True):
        # A layer that had no score left at this time is not in `inside`: the best of the others takes its place.
        others = {layer: score for layer, score in enumerate(column) if layer not in inside}
        chosen = _changed({*inside, *highest(others, k - len(inside))}, column, margin)
        total = sum(column[layer] for layer in chosen)
        columns.append({layer: column[layer] if total else 1.0 for layer in chosen})
    return selection_by_time(current.t_grid, columns, current.method)


def _changed(inside: set[int], scores: Sequence[float], margin: float) -> set[int]:
    """The layers inside, after the exchanges with those outside that are worth it."""
    if max(inside) >= len(scores):
        raise ValueError(f"scores: {len(scores)} for layers up to {max(inside)}")
    outside = set(range(len(scores))) - inside
    while outside:
        # Of equal scores the lower layer wins, as in select_layers.
        best = min(outside, key=lambda layer: (-scores[layer], layer))
        worst = max(inside, key=lambda layer: (-scores[layer], layer))
        if scores[best] <= (1 + margin) * scores[worst]:
            break
        inside = inside - {worst} | {best}
        outside = outside - {best} | {worst}
    return inside


class LayerChooser:
    """Chooses layers at each probe, by one policy: for all teachers together, or for each teacher by itself.

    Args:
        policy, depth, k, layers, seed, weighting: as `choose_layers`.
        domains: {teacher: the domains it speaks for, none for all}: a selection for each teacher, from the scores of
            its domains' samples. None: one selection, from all samples.
        momentum, margin: of the scores' moving average over probes, and of `reselect`.
        below: {teacher or ALL: the first layer that may not be chosen}, where a self teacher's target layer is given.
    """

    def __init__(
        self,
        policy: str,
        depth: int,
        k: int = 3,
        *,
        layers: Sequence[int] = (),
        weighting: str = "share",
        domains: Mapping[str, Sequence[str]] | None = None,
        momentum: float = 0.5,
        margin: float = 0.1,
        seed: int = 0,
        below: Mapping[str, int] | None = None,
    ) -> None:
        self.policy, self.depth, self.k, self.layers = policy, depth, k, tuple(layers)
        self.weighting, self.momentum, self.margin, self.seed = weighting, momentum, margin, seed
        self.below = dict(below or {})
        self.per_teacher = domains is not None
        self.domains = {ALL: ()} if domains is None else {name: tuple(own) for name, own in domains.items()}
        # {teacher or ALL: [times][depth]}, over probes; one time unless the weights go by flow time.
        self.averages: dict[str, list[list[float]]] = {}
        self.latest: dict[str, list[list[float]]] = {}  # the same of the last probe alone

    @property
    def settings(self) -> dict[str, Any]:
        """{name: value} of the settings that decide a selection, given the scores; as plain values."""
        domains = {name: list(own) for name, own in self.domains.items()} if self.per_teacher else None
        return {"policy": self.policy, "k": self.k, "weighting": self.weighting, "domains": domains}

    def choose(
        self,
        current: Selection | None,
        scores: LayerScores,
        values: Mapping[str, Sequence[float] | Tensor] | None = None,
        targets: Mapping[str, int] | None = None,
    ) -> Selection:
        """The selection after a probe, on this rank: the first one, or what `reselect` makes of the current one.

        scores: of all layers. values: {teacher or ALL: [depth]}, where the policy chooses by values; see `POLICIES`.
        targets: {teacher or ALL: measured target layer} of self teachers. The layers are chosen before the target,
            which later selections keep.

        Raises:
            ValueError, UserError: scores that are not finite, without a sample of a teacher's domains, or without what
                the policy needs.
        """
        chosen = {}
        for number, name in enumerate(self.domains):
            own = self._scores_of(name, scores)
            by_value = None if values is None else [float(value) for value in values[name]]
            columns = [by_value] if by_value is not None else self._columns(own)
            self.latest[name] = columns
            if not all(math.isfinite(value) for column in columns for value in column):
                raise ValueError(f"scores that are not finite: {columns}")
            before = self.averages.get(name, [None] * len(columns))
            averages = [average_scores(*pair, self.momentum) for pair in zip(before, columns, strict=True)]
            self.averages[name] = averages
            present = current[name] if isinstance(current, Mapping) else current
            target = (targets or {}).get(name) if present is None else present.target
            limit = min(self.below.get(name, self.depth), self.depth if target is None else target)
            averages = [average[:limit] for average in averages]
            if present is not None and present.method != FALLBACK and POLICIES[self.policy] in ("values", "scores"):
                if self.weighting == "by-time":
                    selection = reselect_by_time(present, averages, self.margin)
                else:
                    weighted = POLICIES[self.policy] == "scores"
                    selection = reselect(present, averages[0], self.margin, weighted, self.weighting)
            else:
                selection = choose_layers(
                    self.policy,
                    limit,
                    self.k,
                    layers=self.layers,
                    values=(by_value or ())[:limit],
                    scores=own.before(limit),
                    seed=self.seed + number,  # so that random layers differ between teachers
                    weighting=self.weighting,
                )
            names = block_names(scores) or {}
            known = names if all(layer in names for layer in selection.layers) else None
            chosen[name] = replace(selection, target=target).named(known)
        return chosen if self.per_teacher else chosen[ALL]

    def _scores_of(self, name: str, scores: LayerScores) -> LayerScores:
        """The scores that count for a teacher: of its domains' samples."""
        domains = [domain for domain in self.domains[name] if domain in (scores.domains or ())]
        if self.domains[name] and not domains:
            of = ", ".join(self.domains[name])
            raise UserError(f"scores: none is of a domain of teacher {name!r} ({of}): score samples of each domain")
        return scores.domain(*domains) if domains else scores

    def _columns(self, scores: LayerScores) -> list[list[float]]:
        """The scores to average: [times][depth], 0 for a layer that was not scored."""
        parts = [scores.at(t) for t in times_of(scores)] if self.weighting == "by-time" else [scores]
        by_layer = [mean_by_layer(part) for part in parts]
        return [[column.get(layer, 0.0) for layer in range(self.depth)] for column in by_layer]

    def shown(self, scores: Mapping[str, list[list[float]]]) -> Any:
        """`averages` or `latest` for a log: [depth], by flow time [times][depth]; {teacher: that} for each teacher."""
        plain = {name: rows if self.weighting == "by-time" else rows[0] for name, rows in scores.items()}
        return plain if self.per_teacher else plain.get(ALL)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """{teacher or ALL: [times][depth]}: the averages over probes."""
        return {name: [list(row) for row in rows] for name, rows in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Go on with the averages of `state_dict`.

        Raises:
            ValueError: they are of other teachers, or of another depth.
        """
        if state and set(state) != set(self.domains):
            of, own = (
                sorted(names) if set(names) != {ALL} else "all teachers together" for names in (state, self.domains)
            )
            raise ValueError(f"averages are of {of}, this run chooses for {own}")
        wrong = [len(row) for rows in state.values() for row in rows if len(row) != self.depth]
        if wrong:
            raise ValueError(f"average has {wrong[0]} scores, the model {self.depth} layers")
        self.averages = {name: [list(row) for row in rows] for name, rows in state.items()}
