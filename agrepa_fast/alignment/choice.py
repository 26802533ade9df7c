"""Which layers are aligned as training goes on: when they are scored, and what a new score changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attribution.scores import METRICS, LayerScores
from .policy import POLICIES, LayerSelection, choose_layers
from .reselect import average_scores, reselect

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ProbePlan:
    """When the layers are scored (FoG-A), on what, and when a new score changes the selection.

    Attributes:
        start: steps of training before the first probe, which makes the selection.
        every: steps between later probes, which choose again; 0: one probe.
        samples: how many of a batch's samples to score on, where the probe takes those of the last training step;
            None: all.
        t_grid: the flow times that a function given as `Aligner.step(inputs=...)` is asked for.
        momentum: of the scores' moving average over probes. margin: a layer replaces another when its average is
            higher by more than this share.
        options: further arguments of `attribute_layers`, such as metric or max_samples.
    """

    start: int
    every: int = 0
    samples: int | None = 16
    t_grid: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    momentum: float = 0.5
    margin: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "t_grid", tuple(self.t_grid))
        for name, least in (("start", 0), ("every", 0), ("samples", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least) and not (name == "samples" and value is None):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r:.60}")
        if not self.t_grid or not all(0 <= t <= 1 for t in self.t_grid):
            raise ValueError(f"t_grid: expected at least one time, each in [0, 1], got {list(self.t_grid)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum!r}")
        if not self.margin >= 0:
            raise ValueError(f"margin: expected a number of at least 0, got {self.margin!r}")
        if self.options.get("metric", METRICS[0]) not in METRICS:
            raise ValueError(f"options: metric: expected one of {', '.join(METRICS)}, got {self.options['metric']!r}")


class LayerChoice:
    """The selection of a run, and what it was made from.

    Args:
        depth: layers of the network. k, policy, seed: see `choose_layers`.
        plan: when to probe; None: never.
        selection: the layers from the start on; probes then change nothing.

    Attributes:
        selection: None before the first probe. given: it does not come from a probe.
        scores: of the last probe. average: of the scores over probes. probed: the step of the last probe, or -1.
    """

    def __init__(
        self,
        depth: int,
        k: int = 3,
        policy: str = "foga",
        plan: ProbePlan | None = None,
        selection: LayerSelection | None = None,
        seed: int = 0,
    ) -> None:
        self.depth, self.k, self.policy, self.plan, self.seed = depth, k, policy, plan, seed
        self.selection = selection
        self.given = selection is not None
        self.scores: LayerScores | None = None
        self.average: list[float] | None = None
        self.probed = -1

    def due(self, step: int, stop: float = math.inf) -> bool:
        """Whether a probe is due after `step` steps: at the plan's start, then every so often until `stop`."""
        if self.plan is None or step < self.plan.start or step == self.probed:
            return False
        if self.probed < 0:
            return True
        again = self.plan.every > 0 and step - self.probed >= self.plan.every and step < stop
        return again and not self.given and bool(POLICIES[self.policy])

    def choose(
        self,
        step: int,
        scores: LayerScores,
        values: Sequence[float] | Tensor | None = None,
        device: torch.device | None = None,
        group: ProcessGroup | None = None,
    ) -> LayerSelection:
        """The policy's layers by a probe's scores; from the second probe on, the present ones after what is worth it.

        Where the selection is given, what the policy would take. With several ranks, the choice of the group's first
        one: every rank must call it.

        Args:
            values: [layers], what a policy goes by that does not go by the scores. device: of this rank.

        Raises:
            ValueError: a number that is not finite; a policy that needs values.
        """
        numbers = [0.0] * self.depth  # 0 where a layer was not scored
        for layer, mean in zip(scores.layers, scores.mean.tolist()):
            numbers[layer] += mean
        if POLICIES[self.policy] == "values":
            if values is None:
                raise ValueError(f"policy {self.policy!r} goes by values: give step(..., values=[one for each layer])")
            numbers = [float(value) for value in values]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"scores that are not finite: {numbers}")
        momentum, margin = (self.plan.momentum, self.plan.margin) if self.plan else (0.0, 0.0)
        average = average_scores(self.average, numbers, momentum)
        # "uniform" is what is left where no score said anything: no choice yet.
        if self.selection is None or self.given or self.selection.method == "uniform":
            chosen = choose_layers(
                self.policy,
                self.depth,
                self.k,
                layers=() if self.selection is None else self.selection.layers,
                values=numbers if POLICIES[self.policy] == "values" else (),
                scores=scores,
                seed=self.seed,
            )
        else:
            chosen = reselect(self.selection, average, margin, weighted=POLICIES[self.policy] == "scores")
        chosen = chosen.synchronised(device, group)
        self.scores, self.average, self.probed = scores, average, step
        if not self.given:
            self.selection = chosen
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {
            "selection": None if self.selection is None else self.selection.state(),
            "scores": None if self.scores is None else self.scores.state(),
            "average": self.average,
            "probed": self.probed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        selection, scores = state["selection"], state["scores"]
        self.selection = None if selection is None else LayerSelection.from_state(selection)
        self.scores = None if scores is None else LayerScores.from_state(scores)
        self.average, self.probed = state["average"], state["probed"]
