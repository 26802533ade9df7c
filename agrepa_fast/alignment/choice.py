"""Which layers are aligned as training goes on: when they are scored, and what a new score changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attribution.scores import METRICS, LayerScores
from .policy import POLICIES
from .reselect import LayerChooser
from .selection import Selection, selection_from_state, selection_state, synchronised

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
    """The selection of a run under way: when a probe is due, and what it changes.

    Args:
        chooser: what chooses. plan: when to probe; None: never.
        selection: the layers from the start on; probes then change nothing.

    Attributes:
        selection: None before the first probe. given: it does not come from a probe.
        scores: of the last probe. probed: the step of the last probe, or -1.
    """

    def __init__(
        self, chooser: LayerChooser, plan: ProbePlan | None = None, selection: Selection | None = None
    ) -> None:
        self.chooser, self.plan, self.selection = chooser, plan, selection
        self.given = selection is not None
        self.scores: LayerScores | None = None
        self.probed = -1

    def due(self, step: int, stop: float = math.inf) -> bool:
        """Whether a probe is due after `step` steps: at the plan's start, then every so often until `stop`."""
        if self.plan is None or step < self.plan.start or step == self.probed:
            return False
        if self.probed < 0:
            return True
        again = self.plan.every > 0 and step - self.probed >= self.plan.every and step < stop
        return again and not self.given and bool(POLICIES[self.chooser.policy])

    def update(
        self,
        step: int,
        scores: LayerScores,
        values: Mapping[str, Sequence[float] | Tensor] | None = None,
        device: torch.device | None = None,
        group: ProcessGroup | None = None,
    ) -> Selection:
        """Take the scores of a probe after `step` steps, and return the layers that the chooser takes.

        They are the new selection, unless one was given. With several ranks it is the choice of the group's first one:
        every rank must call it.

        Args:
            values: what a policy goes by that does not go by the scores; see `LayerChooser.choose`.
            device: of this rank.

        Raises:
            ValueError, UserError: see `LayerChooser.choose`.
        """
        if POLICIES[self.chooser.policy] == "values" and values is None:
            raise ValueError(f"policy {self.chooser.policy!r} goes by values: give values=, one for each layer")
        chosen = self.chooser.choose(None if self.given else self.selection, scores, values)
        chosen = synchronised(chosen, device, group)
        self.scores, self.probed = scores, step
        if not self.given:
            self.selection = chosen
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings."""
        return {
            "selection": None if self.selection is None else selection_state(self.selection),
            "scores": None if self.scores is None else self.scores.state(),
            "averages": self.chooser.state_dict(),
            "probed": self.probed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is of other teachers or of another depth."""
        selection, scores = state["selection"], state["scores"]
        self.chooser.load_state_dict(state["averages"])
        self.selection = None if selection is None else selection_from_state(selection)
        self.scores = None if scores is None else LayerScores.from_state(scores)
        self.probed = state["probed"]
