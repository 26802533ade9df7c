"""All that decides alignment while training, in one object that any trainer can hold: `Aligner`.

Which layers are aligned, how strongly, when they are scored, when they are chosen again and when alignment stops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from ..attribution.foreign.hidden import HiddenStates
from ..attribution.foreign.intercept import CallCapture
from ..attribution.foreign.lists import state_width
from ..attribution.joined import join_scores
from ..attribution.runner import attribute_layers
from ..attribution.scores import LayerScores
from .averaging import GradientAverage, copy_from_first_rank
from .choice import LayerChoice, ProbePlan
from .loss import AlignmentLoss
from .policy import POLICIES, check_k, choose_layers
from .reselect import ALL, LayerChooser
from .rows import Domains, described, grouped_ranks
from .schedule import AlignmentSchedule, SimilarityStop
from .selection import LayerSelection, Selection, by_teacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Targets = Mapping[str, Tensor | Callable[[], Tensor]]
FORMAT = 1


class Aligner:
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

    Args:
        model: a `DiT`, or any module whose forward runs a list of blocks and returns the velocity.
        teachers: {name: width of its features}, or anything with a `width`.
        k, policy, seed, weighting: see `choose_layers`. Without `probe`, a policy that needs no scores chooses at once.
            With weighting "by-time" the probes are of inputs on the plan's t_grid, and `loss` takes t.
        domains: {teacher: the domains it speaks for}, for a selection of its own for each teacher, from the samples of
            these domains (`step(domains=...)` names those of the probe's samples); None: one selection.
        selection: these layers, in place of a policy's choice: a `LayerSelection`, one for each teacher, or layers to
            weigh alike.
        layers: the layers that get heads, among which the selection moves; None: all, or those of `selection`.
        width: D of the hidden states; None: read from an attribute of the model or its config.
        pool, head, objective, standardise_targets, process_group: see `AlignmentLoss`.
        weight: factor on the loss. schedule: a factor by step; None: 1 from the selection on.
        probe: when to score the layers; see `ProbePlan`.
        stop_similarity: alignment ends once the running mean of the raw cosine is there; see `SimilarityStop`.
        state, block_list, copy, inputs: see `HiddenStates`.
        every_head: frame by frame, run the heads of all candidates, so that a compiled step is never compiled again;
            False: run only those of the selected layers. A compiled step is then compiled for each new selection.

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
        selection: Selection | Sequence[int] | None = None,
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
    ) -> None:
        check_k(k)
        if policy not in POLICIES:
            choose_layers(policy, k)  # which names the policies
        if selection is None and probe is None and POLICIES[policy]:
            raise ValueError(f"policy {policy!r} needs probe=ProbePlan(...), or give selection=")
        self.weight = weight
        self.schedule = schedule or AlignmentSchedule.constant()
        self.process_group = process_group
        self.states = HiddenStates(model, layers, state, block_list, copy, inputs)
        self.model = self.states.model
        depth = len(self.states.names)
        if selection is None and probe is None:
            selection = choose_layers(policy, depth, k, seed=seed)
        if selection is not None and not isinstance(selection, LayerSelection | Mapping):
            selection = choose_layers("fixed", depth, layers=selection)
        given = [] if selection is None else list(by_teacher(selection, teachers).values())
        if given and layers is None:
            self.states.select(sorted({layer for own in given for layer in own.layers}))
        candidates = self.states.layers
        if selection is None and not 1 <= k <= len(candidates):
            raise ValueError(f"k: expected 1 to {len(candidates)} layers, got {k}")
        plan = probe or ProbePlan(0)
        chooser = LayerChooser(
            policy,
            depth,
            k,
            weighting=weighting,
            domains=domains,
            momentum=plan.momentum,
            margin=plan.margin,
            seed=seed,
        )
        self.choice = LayerChoice(chooser, probe, selection)
        t_grid = plan.t_grid if weighting == "by-time" else ()
        self.capture = CallCapture(self.model)
        device = next(self.model.parameters()).device
        self.loss_fn = AlignmentLoss(
            width or state_width(self.model),
            {name: getattr(teacher, "width", teacher) for name, teacher in teachers.items()},
            LayerSelection.uniform(candidates, t_grid=given[0].t_grid if given else t_grid),
            pool,
            head,
            objective,
            standardise_targets,
            process_group,
            every_head,
        ).to(device)
        GradientAverage(self.loss_fn.parameters(), process_group)
        self.stop = (
            None if stop_similarity is None else SimilarityStop(stop_similarity, process_group=process_group).to(device)
        )
        self.strength = torch.zeros((), device=device)  # what the loss is multiplied by
        self.on = False
        self.position = 0
        self._alike = False  # the heads of all ranks
        self._metrics: dict[str, Tensor] = {}
        self._observed = True
        if selection is not None:
            self.select(selection)
        self._refresh()

    @property
    def selection(self) -> Selection | None:
        """The layers and their weights, for all teachers or for each; None before the first probe."""
        return self.choice.selection

    # --- in the training loop -------------------------------------------------------------------------------

    def attach(self) -> Aligner:
        """Take part in the model's forward from now on; also entered by `with`. Every rank must call it."""
        if not self.states.attached:
            self.to(next(self.model.parameters()).device)
            if not self._alike:
                copy_from_first_rank(self.loss_fn, self.process_group)
                self._alike = True
            self.states.attach()
            if self.choice.plan is not None:
                self.capture.install()
        return self

    def detach(self) -> None:
        """Leave the model as it was."""
        if self.states.attached:
            self.states.detach()
            if self.capture.installed:
                self.capture.remove()
            self.capture.last = None

    def __enter__(self) -> Aligner:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def to(self, device: torch.device | str) -> Aligner:
        """Move the heads; the optimizer keeps its parameters."""
        self.loss_fn.to(device)
        self.strength = self.strength.to(device)
        if self.stop is not None:
            self.stop.to(device)
        return self

    def param_groups(self, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """Optimizer groups: the heads' matrices with `weight_decay`, their biases without; `options`: lr, say."""
        parameters = list(self.loss_fn.parameters())
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        groups = [(matrices, weight_decay), (vectors, 0.0)]
        return [{"params": params, "weight_decay": decay, **options} for params, decay in groups if params]

    def loss(
        self,
        targets: Targets,
        mask: Tensor | None = None,
        domains: Domains = None,
        sample_weight: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """The scalar to add to the loss: weight x schedule x alignment loss of the last forward's hidden states.

        0 in steps without alignment, which run no head.

        Args:
            targets: {teacher: features [B, W] or [B, T, W]}, or functions without arguments that return them (a live
                teacher, features read from a file). A function is called without gradient, and only where it is needed.
            mask, domains, sample_weight, t: see `AlignmentLoss.forward`.

        Raises:
            ValueError: no forward since the last call; shapes that do not fit.
        """
        if not self.on:
            return self.strength.new_zeros(())
        with torch.no_grad():
            features = {name: target() if callable(target) else target for name, target in targets.items()}
        loss, metrics = self.loss_fn(self.states.read(), features, mask, domains, sample_weight, t)
        self._metrics = {"align_loss": loss.detach(), **metrics}
        self._observed = not torch.is_grad_enabled()
        if self.stop is not None:
            # The factor comes from earlier steps; this step's cosine decides about the next one. Backward reads the
            # factor after it has changed in place, hence the copy.
            loss = loss * self.stop.factor.clone()
        return self.strength * loss

    def step(
        self,
        step: int,
        inputs: Any = None,
        *,
        domains: Sequence[str] | None = None,
        clips: Sequence[int] | None = None,
        values: Sequence[float] | Tensor | Mapping[str, Sequence[float] | Tensor] | None = None,
    ) -> LayerScores | None:
        """After an optimizer step: probe if it is due, choose layers, and set the strength of the next step.

        Every rank must call it.

        Args:
            step: how many steps are done. (With a counter from 0 everything comes one step later.)
            inputs: what to score on, as `attribute_layers` takes it; or a function of the plan's `t_grid` that returns
                it, called only when a probe is due (`probe_inputs`). None: the first samples of the last training step.
            domains, clips: of those inputs' samples (None: of the last training step's); see `attribute_layers`.
            values: [layers], or {teacher: [layers]}, for a policy that needs them.

        Returns:
            The scores, where there was a probe.
        """
        if self.stop is not None and not self._observed:
            self.stop(self.loss_fn.similarity(self._metrics))
        self._observed = True
        self.position = step
        scores = None
        if self.choice.due(step, self.schedule.stop):
            scores = self.probe(inputs, domains, clips)
            by_name = values if values is None or isinstance(values, Mapping) else {ALL: values}
            self.choice.update(step, scores, by_name, self.strength.device, self.process_group)
            if self.selection is not None:
                self.select(self.selection)
        self._refresh()
        return scores

    def metrics(self) -> dict[str, float]:
        """Numbers of the last aligned step on this rank, for a log; waits for the device.

        "align_loss" before any factor, "align_weight" (weight x schedule), "align_factor" (`stop_similarity`) and, of
        each teacher and selected layer, "cosine/<teacher>/<layer>"; "align_weight" alone where nothing is aligned."""
        shown = {"align_weight": self.strength}
        if self.on and self.selection is not None:
            selections = by_teacher(self.selection, self.loss_fn.teachers)
            selected = {f"/{name}/{layer}" for name, own in selections.items() for layer in own.layers}
            names = [n for n in self._metrics if n == "align_loss" or n[n.index("/") :] in selected]
            shown |= {name: self._metrics[name] for name in names}
            if self.stop is not None:
                shown["align_factor"] = self.stop.factor
        return dict(zip(shown, torch.stack([value.float() for value in shown.values()]).tolist()))

    # --- probes and the choice of layers --------------------------------------------------------------------

    def probe(
        self, inputs: Any = None, domains: Sequence[str] | None = None, clips: Sequence[int] | None = None
    ) -> LayerScores:
        """Score the candidate layers; with several ranks on the samples of all. Every rank must call it."""
        plan = self.choice.plan or ProbePlan(0)
        autocast = None
        if callable(inputs):
            inputs = inputs(plan.t_grid)
        elif inputs is None:
            inputs, autocast = self.capture.inputs(plan.samples)
            domains, clips = domains and domains[: plan.samples], clips and clips[: plan.samples]
        context: Any = contextlib.nullcontext()
        if autocast is not None:
            context = torch.autocast(self.strength.device.type, autocast)
        with context:
            scores = attribute_layers(
                self.model,
                inputs,
                blocks=self.loss_fn.layers,
                domains=domains,
                clips=clips,
                block_list=self.states.block_list,
                **plan.options,
            )
        for layer, name in zip(scores.layers, scores.names):
            if name not in (str(layer), self.states.names[layer]):
                raise ValueError(
                    f"layer {layer} of the probe is {name}, of the hidden states {self.states.names[layer]}: give "
                    "block_list= in the order in which the forward runs the lists"
                )
        if not grouped_ranks() or distributed.get_world_size(self.process_group) == 1:
            return scores
        parts: list[Any] = [None] * distributed.get_world_size(self.process_group)
        distributed.all_gather_object(parts, scores.state(), group=self.process_group)
        return join_scores([LayerScores.from_state(part) for part in parts])

    def select(self, selection: Selection) -> None:
        """Align these layers from now on, with these weights."""
        self.loss_fn.select(selection)
        self.choice.selection = selection
        if self.states.layers != self.loss_fn.active:
            self.states.select(self.loss_fn.active)
        if not self.loss_fn.every_head:
            # Heads that do not run get no gradient, in one process and in several.
            for name, heads in self.loss_fn.heads.named_children():
                for layer, head in heads.named_children():
                    head.requires_grad_((name, int(layer)) in self.loss_fn.active_heads)
        self._refresh()

    def _refresh(self) -> None:
        """Set what depends on the position and the selection."""
        strength = self.weight * self.schedule(self.position) if self.selection is not None else 0.0
        self.strength.fill_(strength)
        self.on = strength > 0
        if self.states.on != self.on:
            self.states.on = self.on

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: heads, selection, averages, position. Tensors, numbers and lists."""
        return {
            "format": FORMAT,
            "loss": self.loss_fn.state_dict(),
            "stop": None if self.stop is None else self.stop.state_dict(),
            "choice": self.choice.state_dict(),
            "position": self.position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of an aligner with the same model, teachers and heads.

        Raises:
            ValueError: it belongs to another one; names the first entry that does not fit."""
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise ValueError(
                f"state: expected what Aligner.state_dict returns (format {FORMAT}), got {described(state)}"
            )
        own = self.loss_fn.state_dict()
        for name in (*own, *state["loss"]):
            mine, other = own.get(name), state["loss"].get(name)
            if mine is None or other is None or mine.shape != other.shape:
                shapes = " and ".join("none" if value is None else str(list(value.shape)) for value in (mine, other))
                raise ValueError(f"state: loss.{name}: here and there {shapes}: other layers, teachers or heads")
        if (self.stop is None) != (state["stop"] is None):
            raise ValueError("state: stop: only one of the two has stop_similarity")
        self.loss_fn.load_state_dict(state["loss"])
        if self.stop is not None:
            self.stop.load_state_dict(state["stop"])
        self.choice.load_state_dict(state["choice"])
        self.position = state["position"]
        if self.selection is not None:
            self.select(self.selection)
        self._refresh()
