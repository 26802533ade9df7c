"""Which layers are aligned as training goes on: when they are scored, and what a new score changes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from ..attribution.joined import join_scores
from ..attribution.runner import attribute_layers
from ..attribution.scores import METRICS, LayerScores
from ..errors import NotFiniteError
from .policy import POLICIES
from .reselect import LayerChooser
from .rows import check_kind, grouped_ranks
from .selection import Selection, by_teacher, described, selection_from_state, selection_state, synchronised

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# The arguments of `attribute_layers` that a plan may give. The `Aligner` gives the others, and needs scores of blocks.
GIVEN = ("model", "inputs", "blocks", "block_list", "domains", "clips", "branches", "sets", "spans")
OPTIONS = tuple(name for name in inspect.signature(attribute_layers).parameters if name not in GIVEN)


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
        targets: whether the first probe also brings the target layers of self teachers that have none
            (`Aligner.step(targets=...)`).
    """

    start: int
    every: int = 0
    samples: int | None = 16
    t_grid: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    momentum: float = 0.5
    margin: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.t_grid, str) or not isinstance(self.t_grid, Iterable):
            raise TypeError(f"t_grid: expected times, got {self.t_grid!r:.60}")
        object.__setattr__(self, "t_grid", tuple(self.t_grid))
        for name, least in (("start", 0), ("every", 0), ("samples", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least) and not (name == "samples" and value is None):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r:.60}")
        if not self.t_grid or not all(0 <= t <= 1 for t in self.t_grid):
            raise ValueError(f"t_grid: expected at least one time, each in [0, 1], got {list(self.t_grid)}")
        if not isinstance(self.momentum, Real) or not 0 <= float(self.momentum) < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum!r}")
        if not isinstance(self.margin, Real) or not float(self.margin) >= 0:
            raise ValueError(f"margin: expected a number of at least 0, got {self.margin!r}")
        check_kind("options", self.options, Mapping, "{argument of attribute_layers: value}")
        for name in self.options:
            if name not in OPTIONS:
                raise ValueError(f"options: expected some of {', '.join(OPTIONS)}, got {name!r}")
        metric = self.options.get("metric", METRICS[0])
        if not callable(metric) and metric not in METRICS:
            raise ValueError(f"options: metric: expected one of {', '.join(METRICS)}, got {metric!r}")


def scores_of_all_ranks(scores: LayerScores | Exception, group: ProcessGroup | None = None) -> LayerScores:
    """The scores of all ranks' samples, joined. Every rank of the group must call it.

    scores: of this rank's samples, or the exception that its probe raised.

    Raises:
        That exception. RuntimeError, NotFiniteError: the probe of another rank failed; names the rank.
    """
    parts: list[Any] = [None]
    if grouped_ranks() and distributed.get_world_size(group) > 1:
        parts *= distributed.get_world_size(group)
        own = scores.state() if isinstance(scores, LayerScores) else (isinstance(scores, NotFiniteError), str(scores))
        distributed.all_gather_object(parts, own, group=group)
    failed = [(*part, rank) for rank, part in enumerate(parts) if isinstance(part, tuple)]
    # A rank whose batch is not finite could go on, but not where another one has failed for good.
    for not_finite, message, rank in sorted(failed):
        if not isinstance(scores, Exception) or (not not_finite and isinstance(scores, NotFiniteError)):
            raise (NotFiniteError if not_finite else RuntimeError)(f"the probe of rank {rank} failed: {message}")
    if isinstance(scores, Exception):
        raise scores
    return scores if len(parts) == 1 else join_scores([LayerScores.from_state(part) for part in parts])


def check_settings(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a setting is another one in a state than here; names it and both values."""
    for name, value in own.items():
        if name in state and state[name] != value:
            raise ValueError(
                f"state: {name}: {state[name]!r:.90} in the state, {value!r:.90} here: make the Aligner with that of "
                "the state"
            )


def aligned_metrics(metrics: Mapping[str, T], selection: Selection | None, teachers: Iterable[str]) -> dict[str, T]:
    """The metrics without those of layers that are not aligned; such names end in "<teacher>/<layer>" or "<layer>"."""
    chosen = by_teacher(selection, teachers) if selection else {}
    aligned = {f"{name}/{layer}" for name, own in chosen.items() for layer in own.layers}
    aligned |= {pair.rpartition("/")[2] for pair in aligned}
    kept = {}
    for name, value in metrics.items():
        _, _, of = name.partition("/")  # "cosine/speech/3" and "gradient_cosine/3"
        if not of.rpartition("/")[2].isdigit() or of in aligned:
            kept[name] = value
    return kept


class LayerChoice:
    """The selection of a run under way: when a probe is due, and what it changes.

    Args:
        chooser: what chooses. plan: when to probe; None: never.
        selection: the layers from the start on; probes then change nothing.

    Attributes:
        selection: None before the first probe. given: it does not come from a probe.
        scores: of the last probe. probed: the step of the last probe, or -1.
        settings: what a state must agree in: how the layers were chosen. Plain values.
        chosen: what the chooser took at the last probe of this process; the selection, unless one was given.
    """

    def __init__(
        self, chooser: LayerChooser, plan: ProbePlan | None = None, selection: Selection | None = None
    ) -> None:
        self.chooser, self.plan, self.selection = chooser, plan, selection
        self.given = selection is not None
        chosen = {"selection": described(selection)} if selection else {"selection": None, **chooser.settings}
        self.settings: dict[str, Any] = {"depth": chooser.depth, **chosen}
        self.scores: LayerScores | None = None
        self.probed = -1
        self.chosen: Selection | None = None

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
        targets: Mapping[str, int] | None = None,
    ) -> None:
        """Take the scores of a probe after `step` steps, and choose layers by them.

        They are the new selection, unless one was given. With several ranks it is the choice of the group's first one:
        every rank must call it.

        Args:
            values: what a policy goes by that does not go by the scores; see `LayerChooser.choose`.
            device: of this rank.
            targets: measured target layers of self teachers; see `LayerChooser.choose`.

        Raises:
            ValueError, UserError: see `LayerChooser.choose`.
        """
        if POLICIES[self.chooser.policy] == "values" and values is None:
            raise ValueError(f"policy {self.chooser.policy!r} goes by values: give values=, one for each layer")
        chosen = self.chooser.choose(None if self.given else self.selection, scores, values, targets)
        self.chosen = synchronised(chosen, device, group)
        self.scores, self.probed = scores, step
        if not self.given:
            self.selection = self.chosen

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings."""
        return {
            "selection": None if self.selection is None else selection_state(self.selection),
            "scores": None if self.scores is None else self.scores.state(),
            "averages": self.chooser.state_dict(),
            "probed": self.probed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Where it has no selection, a given one stays.

        Raises:
            ValueError: it is of other teachers or of another depth."""
        selection, scores = state["selection"], state["scores"]
        self.chooser.load_state_dict(state["averages"])
        if selection is not None or not self.given:
            self.selection = None if selection is None else selection_from_state(selection)
        self.scores = None if scores is None else LayerScores.from_state(scores)
        self.probed = state["probed"]
