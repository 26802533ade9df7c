"""All that decides alignment while training, in one object that any trainer can hold: `Aligner`.

Which layers are aligned, how strongly, when they are scored, when they are chosen again and when alignment stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..attribution.foreign.hidden import HiddenStates
from ..attribution.foreign.lists import state_width
from ..attribution.scores import LayerScores
from .averaging import GradientAverage, copy_from_first_rank
from .choice import LayerChoice, ProbePlan, aligned_metrics, check_settings
from .loss import AlignmentLoss
from .policy import POLICIES, check_k, choose_layers
from .probes import Probe
from .reselect import ALL, LayerChooser
from .rows import Domains, check_kind, check_weight, described
from .schedule import AlignmentSchedule, SimilarityStop
from .selection import LayerSelection, Selection, by_teacher
from .self_targets import SelfTargets, widths_of
from .step import AlignmentStep, States, Targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
FORMAT = 1


class Aligner(AlignmentStep):
    """Representation alignment for a trainer: hidden states, loss, schedule, probes and choice of layers.

        aligner = ag.Aligner(model, teachers={"hubert": 1024}, pool=None, probe=ag.ProbePlan(start=5000, every=1000))
        optimizer = torch.optim.AdamW([{"params": model.parameters()}, *aligner.param_groups(weight_decay=0.01)])
        with aligner:
            for step, batch in enumerate(batches, start=1):
                loss = flow_loss(model(**batch.inputs), batch) + aligner.loss({"hubert": batch.features}, batch.mask)
                loss.backward()
                optimizer.step()
                aligner.step(step)

    The model is called as before and may be compiled, wrapped or sharded; see `HiddenStates`. With several ranks means
    are over the rows of all ranks, the heads start alike and their gradients are averaged (the model's own are its
    wrapper's work), scores are of all ranks' samples, and all ranks choose the same layers.

    A model that returns its hidden states need not be attached: ask it for those of `layers`, and give them to `loss`.
    For a training step that is compiled or recorded as one function see `AlignmentStep`.

    Args:
        model: a `DiT`, or any module whose forward runs a list of blocks and returns the velocity.
        teachers: {name: width of its features}, anything with a `width`, or the model itself: `LayerSync(12)`.
        k, policy, seed, weighting: see `choose_layers`. Without `probe`, a policy that needs no scores chooses at once.
            With weighting "by-time" the probes are of inputs on the plan's t_grid, and `loss` takes t.
        domains: {teacher: the domains it speaks for}, for a selection of its own for each teacher, from the samples of
            these domains (`step(domains=...)` names those of the probe's samples); None: one selection.
        selection: these layers, in place of a policy's choice: a `LayerSelection`, one for each teacher, or layers to
            weigh alike, by number or name.
        layers: the layers that get heads, among which the selection moves; None: all, or those of `selection`.
        width: D of the hidden states; None: read from an attribute of the model or its config.
        pool, head, objective, standardise_targets, process_group: see `AlignmentLoss`.
        weight: factor on the loss. schedule: a factor by step; None: 1 from the selection on. probe: see `ProbePlan`.
        stop_similarity: alignment ends once the running mean of the raw cosine is there; see `SimilarityStop`.
        state, block_list, copy, inputs: see `HiddenStates`.
        every_head: frame by frame, run the heads of all candidates, so that a compiled step is compiled only once;
            False: run only those of the selected layers, and a compiled step is compiled for each new selection.
        average: the moving average of the model, where `SelfFlow` is a teacher: its hidden states are the targets. Run
            its forward without gradient, at a cleaner time, before `loss`; or give `loss` its states.
        average_gradients: False where `loss_fn` is part of a module whose wrapper averages gradients over the ranks.

    Attributes:
        loss_fn: the `AlignmentLoss` with the heads. states: the `HiddenStates`.
        choice: the `LayerChoice`: selection, scores of the last probe, average over probes.
    """

    def __init__(
        self,
        model: nn.Module,
        teachers: Mapping[str, Any],
        *,
        k: int = 3,
        policy: str = "foga",
        seed: int = 0,
        weighting: str = "share",
        domains: Mapping[str, Sequence[str]] | None = None,
        selection: Selection | Sequence[int | str] | None = None,
        layers: Sequence[int | str] | None = None,
        width: int | None = None,
        pool: str | None = "mean",
        head: str = "mlp",
        objective: str = "cosine",
        standardise_targets: bool = False,
        process_group: ProcessGroup | None = None,
        weight: float = 0.5,
        schedule: AlignmentSchedule | None = None,
        probe: ProbePlan | None = None,
        stop_similarity: float | None = None,
        state: str | int | None = None,
        block_list: str | Sequence[str] | None = None,
        copy: bool = False,
        inputs: Any = None,
        every_head: bool = True,
        average: nn.Module | None = None,
        average_gradients: bool = True,
    ) -> None:
        check_k(k)
        if policy not in POLICIES:
            choose_layers(policy, k)  # which names the policies
        if selection is None and probe is None and POLICIES[policy]:
            raise ValueError(f"policy {policy!r} needs probe=ProbePlan(...), or give selection=")
        check_weight("weight", weight)
        check_kind("teachers", teachers, Mapping, "{name: width}")
        check_kind("domains", domains, Mapping | None, "{teacher: its domains}")
        if domains is not None and set(domains) != set(teachers):
            raise ValueError(f"domains: expected those of the teachers {list(teachers)}, got {list(domains)}")
        check_kind("schedule", schedule, AlignmentSchedule | None, "an AlignmentSchedule")
        check_kind("probe", probe, ProbePlan | None, "a ProbePlan")
        plan = probe or ProbePlan(0)
        self.weight = weight
        self.schedule = schedule or AlignmentSchedule.constant()
        self.process_group = process_group
        self.states = HiddenStates(model, layers, state, block_list, copy, inputs)
        self.model = self.states.model
        depth = len(self.states.names)
        names = None if self.states.block_list is None else self.states.names
        self_targets = SelfTargets(teachers, depth)
        self_targets.check(plan.targets)
        below = self_targets.below(domains is not None)
        self.average_states: HiddenStates | None = None
        if average is not None:
            averaged = self_targets.wanted(averaged=True)
            if not averaged:
                raise ValueError("average: none of the teachers is a SelfFlow, which takes its hidden states")
            self.average_states = HiddenStates(average, averaged, state, block_list, copy, inputs)
        self._taps = [taps for taps in (self.states, self.average_states) if taps is not None]
        if selection is None and probe is None:
            selection = choose_layers(policy, below.get(ALL, depth), k, seed=seed).named(names)
        if selection is not None and not isinstance(selection, LayerSelection | Mapping):
            selection = choose_layers("fixed", depth, layers=self.states.numbers(selection)).named(names)
        given = [] if selection is None else list(by_teacher(selection, teachers).values())
        if layers is None:
            readable = [layer for layer in self.states.layers if layer < below.get(ALL, depth)]
            self.states.select(sorted({layer for own in given for layer in own.layers}) or readable)
        candidates = self.states.layers
        if selection is None and not 1 <= k <= len(candidates):
            raise ValueError(f"k: expected 1 to {len(candidates)} layers, got {k}")
        chooser = LayerChooser(
            policy,
            depth,
            min(k, len(candidates)),
            layers=given[0].layers if given else (),
            weighting=weighting,
            domains=domains,
            momentum=plan.momentum,
            margin=plan.margin,
            seed=seed,
            below=below,
        )
        self.choice = LayerChoice(chooser, probe, selection)
        self._probe = Probe(self.states, plan, process_group)
        options = (pool, head, objective, standardise_targets)
        trained = zip(("pool", "head", "objective", "standardise_targets"), options)
        self._settings = {**dict(trained), **self.choice.settings}  # what a state must agree in
        t_grid = given[0].t_grid if given else sorted(set(plan.t_grid)) if weighting == "by-time" else ()
        width = width or state_width(self.model)
        widths, every = widths_of(teachers, width), LayerSelection.uniform(candidates, t_grid=t_grid)
        loss_fn = AlignmentLoss(width, widths, every, *options, process_group, every_head)
        self._averaging = GradientAverage(loss_fn.parameters(), process_group) if average_gradients else None
        stop = None if stop_similarity is None else SimilarityStop(stop_similarity, process_group=process_group)
        super().__init__(loss_fn, self_targets, stop)
        self.to(next(self.model.parameters()).device)
        self.position = 0
        self._heads_alike = False  # the heads of all ranks have the same values
        self._metrics: dict[str, Tensor] = {}
        self._observed = True
        if selection is not None:
            self.select(selection)
        self.align(self.strength_at(0))

    @property
    def selection(self) -> Selection | None:
        """The layers and their weights, for all teachers or for each; None before the first probe."""
        return self.choice.selection

    def select(self, selection: Selection) -> None:
        """Align these layers from now on, with these weights.

        Raises:
            ValueError, UserError: a layer that does not exist, has no head or does not come before a self teacher's
                target; other teachers; or weights by flow time at other times than the loss has.
        """
        depth = len(self.states.names)
        last = max(own.layers[-1] for own in by_teacher(selection, self.loss_fn.teachers).values())
        if last >= depth:
            raise ValueError(f"selection: layer {last} does not exist, the model has layers 0 to {depth - 1}")
        self.self_targets.select(selection, list(self.loss_fn.teachers))
        self.loss_fn.select(selection)
        self.choice.selection = selection
        for taps, layers in zip(self._taps, (self.layers, self.averaged_layers)):
            if taps.layers != layers:
                taps.select(layers)
        if not self.loss_fn.every_head:
            self.require_gradients(self.loss_fn.active_heads)
        self.align(self.strength_at(self.position))

    def strength_at(self, step: int) -> float:
        """Weight x schedule after `step` steps; 0 without a selection."""
        return self.weight * self.schedule(step) if self.selection is not None else 0.0

    def align(self, strength: float) -> None:
        """Multiply the loss by `strength` from now on; at 0 run no head. `step` does it by weight and schedule."""
        super().align(strength)
        for taps in self._taps:
            if taps.on != self.on:
                taps.on = self.on

    def attach(self) -> Aligner:
        """Take part in the model's forward from now on; also entered by `with`. Every rank must call it."""
        if not self.states.attached:
            self.to(next(self.model.parameters()).device)
            if not self._heads_alike:
                copy_from_first_rank(self.loss_fn, self.process_group)
                self._heads_alike = True
            for taps in self._taps:
                taps.attach()
            if self.choice.plan is not None:
                self._probe.capture.install()
        return self

    def detach(self) -> None:
        """Leave the model as it was."""
        if self.states.attached:
            for taps in self._taps:
                taps.detach()
            if self._probe.capture.installed:
                self._probe.capture.remove()
            self._probe.capture.last = None

    def __enter__(self) -> Aligner:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def to(self, device: torch.device | str) -> Aligner:
        """Move the heads; the optimizer keeps its parameters."""
        if next(self.loss_fn.parameters()).device != torch.device(device):
            self.loss_fn.to(device)
        if self.stop is not None:
            self.stop.to(device)
        self.strength = self.strength.to(device)
        return self

    def loss(
        self,
        targets: Targets | None = None,
        mask: Tensor | None = None,
        domains: Domains = None,
        sample_weight: Tensor | None = None,
        t: Tensor | None = None,
        *,
        hidden: States | None = None,
        averaged: States | None = None,
    ) -> Tensor:
        """The scalar to add to the loss: weight x schedule x alignment loss of the last forward's hidden states.

        0 in steps without alignment, which run no head and call no function of `targets`.

        Args:
            targets, mask, domains, sample_weight, t: see `evaluate`.
            hidden: the states of `layers` where the model returned them; None: those of the last forward.
            averaged: the same of `averaged_layers` from the model's moving average.

        Raises:
            ValueError: no forward since the last call; shapes that do not fit.
        """
        if self.averaged_layers and averaged is None and self.average_states is None:
            raise ValueError("SelfFlow needs hidden states of the average: give Aligner(average=) or loss(averaged=)")
        if not self.on:
            return self.strength.new_zeros(())
        if hidden is None:
            hidden = self.states.read()
        if averaged is None and self.average_states is not None:
            with torch.no_grad():
                averaged = self.average_states.read()
        loss, cosines = self.evaluate(hidden, targets, mask, domains, sample_weight, t, averaged=averaged)
        self._metrics = {"align_loss": loss.detach(), **cosines}
        self._observed = not torch.is_grad_enabled()
        if self.stop is not None:
            # The factor comes from earlier steps; this step's cosine decides about the next one. Backward reads the
            # factor after it has changed in place, hence the copy.
            loss = loss * self.stop.factor.clone()
        return self.strength * loss

    def due(self, step: int) -> bool:
        """Whether `step(step)` will probe."""
        return self.choice.due(step, self.schedule.stop)

    def step(
        self,
        step: int,
        inputs: Any = None,
        *,
        domains: Sequence[str] | None = None,
        clips: Sequence[int] | None = None,
        values: Sequence[float] | Tensor | Mapping[str, Sequence[float] | Tensor] | None = None,
        scores: LayerScores | None = None,
        targets: int | Mapping[str, int] | None = None,
    ) -> LayerScores | None:
        """After an optimizer step: probe if it is due, choose layers, and set the strength of the next step.

        Every rank must call it.

        Args:
            step: how many steps are done. (With a counter from 0 everything comes one step later.)
            inputs: what to score on, as `attribute_layers` takes it; or a function of the plan's `t_grid` that returns
                it, called only when a probe is due (`probe_inputs`). None: the first samples of the last training step.
            domains, clips: of those inputs' samples (None: of the last training step's); see `attribute_layers`.
            values: [layers], or {teacher: [layers]}, for a policy that needs them.
            scores: of a probe of your own, the same on all ranks; it counts whether one is due or not.
            targets: target layer of self teachers without one, or {teacher: layer} where each has a selection of its
                own, at the first probe (`ProbePlan.targets`).

        Returns:
            The scores, where there was a probe. Where they are not finite (a batch with nan, say) it is postponed to
            the next step with a warning, at most 20 times in a row.
        """
        if not isinstance(step, Integral) or isinstance(step, bool):
            raise TypeError(f"step: expected how many steps are done, an integer, got {described(step)}")
        if not self._observed:
            self.observe(self._metrics)
            self._observed = True
        self.position = int(step)
        probing = scores is not None or self.due(step)
        if probing and self.self_targets.measured and self.selection is None and targets is None:
            names = ", ".join(self.self_targets.measured)
            raise ValueError(f"targets: the first probe needs a target layer for each of the teachers {names}")
        if probing and scores is None:  # None again where it is postponed
            scores = self._probe.when_finite(self.position, self.loss_fn.layers, inputs, domains, clips)
        if scores is not None:
            given = [x if x is None or isinstance(x, Mapping) else {ALL: x} for x in (values, targets)]
            self.choice.update(step, scores, given[0], self.strength.device, self.process_group, given[1])
            assert self.selection is not None
            self.select(self.selection)
        self.align(self.strength_at(step))
        return scores

    def probe(
        self, inputs: Any = None, domains: Sequence[str] | None = None, clips: Sequence[int] | None = None
    ) -> LayerScores:
        """Score the candidate layers; with several ranks on the samples of all. Every rank must call it."""
        return self._probe(self.loss_fn.layers, inputs, domains, clips)

    def metrics(self) -> dict[str, float]:
        """Numbers of the last aligned step on this rank, for a log; waits for the device.

        "align_loss" before any factor, "align_weight" (weight x schedule), "align_factor" (`stop_similarity`) and, of
        each teacher and selected layer, "cosine/<teacher>/<layer>"; "align_weight" alone where nothing is aligned."""
        shown = {"align_weight": self.strength}
        if self.on:
            shown |= self.selected(self._metrics)
            if self.stop is not None:
                shown["align_factor"] = self.stop.factor
        return dict(zip(shown, torch.stack([value.float() for value in shown.values()]).tolist()))

    def selected(self, metrics: Mapping[str, T]) -> dict[str, T]:
        """The metrics without those of layers that are not aligned."""
        return aligned_metrics(metrics, self.selection, self.loss_fn.teachers)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: heads, selection, averages, position. Tensors, numbers and lists."""
        own = {"choice": self.choice.state_dict(), "position": self.position, "settings": dict(self._settings)}
        return {"format": FORMAT, **super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of an aligner with the same model, teachers, heads, objective and way to choose.

        Weight, schedule, probe plan and the level of `stop_similarity` are no part of it: those given here hold.

        Raises:
            ValueError: it belongs to another one; names the first entry that does not fit, with both values."""
        known = isinstance(state, Mapping) and state.get("format") == FORMAT
        if not known or {"loss", "stop", "choice", "position"} - {*state}:
            raise ValueError(
                f"state: expected what Aligner.state_dict returns (format {FORMAT}), got {described(state)}"
            )
        check_settings(state.get("settings", {}), self._settings)
        super().load_state_dict(state)
        self.choice.load_state_dict(state["choice"])
        self.position = state["position"]
        if self.selection is not None:
            self.select(self.selection)
        self.align(self.strength_at(self.position))
