"""When alignment runs, and which layers it takes: the schedule, and the probe of a run under way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..alignment.choice import LayerChoice, ProbePlan
from ..alignment.loss import AlignmentLoss
from ..alignment.policy import POLICIES
from ..alignment.reselect import LayerChooser
from ..alignment.schedule import AlignmentSchedule
from ..alignment.selection import Selection, by_teacher, selection_state
from ..attribution.scd import write_scd
from ..data.dataset import ClipDataset
from ..errors import UserError, writing
from .checkpoint import write_whole
from .clips import spread
from .config import RunConfig
from .dissociation import stored_by_layer
from .distributed import rank
from .inference import layer_values, score_layers

if TYPE_CHECKING:
    from .trainer import Trainer

T = TypeVar("T")


def alignment_schedule(config: RunConfig) -> AlignmentSchedule:
    """Alignment starts after the probe, or at once when the selection is given.

    Raises:
        UserError: it would stop before the probe."""
    a, steps = config.alignment, config.train.steps
    start = 0 if a.selection or a.layers else config.probe.start
    if not a.enabled:
        return AlignmentSchedule(0, 0, 0, 0)
    stop = math.ceil(a.stop * steps)
    if start >= stop:
        raise UserError(
            f"probe.start: the selection comes at step {start}, but alignment stops at {stop} "
            f"(alignment.stop {a.stop:g} of train.steps {steps}): probe earlier or train longer"
        )
    return AlignmentSchedule(start, a.ramp, max(start, math.ceil(a.decay_start * steps)), stop, a.decay)


def layer_choice(config: RunConfig) -> LayerChoice:
    """When a run probes, and what chooses the layers then."""
    a, probe = config.alignment, config.probe
    plan = ProbePlan(
        probe.start, probe.every, probe.samples, probe.t_grid, probe.momentum, probe.margin, {"metric": probe.metric}
    )
    chooser = LayerChooser(
        a.policy,
        config.model.depth,
        probe.k,
        layers=a.layers,
        weighting=a.weights,
        domains={name: t.domains for name, t in a.teachers.items()} if a.selection_per == "teacher" else None,
        momentum=probe.momentum,
        margin=probe.margin,
        seed=config.train.seed,
    )
    return LayerChoice(chooser, plan)


def check_probed_domains(config: RunConfig, valid: ClipDataset) -> None:
    """The probe will score a clip of each teacher's domains, where each teacher has its own selection.

    Raises:
        UserError: it will not; names the teacher."""
    if config.alignment.selection_per != "teacher":
        return
    probed = {valid.clips[index].domain for index in spread(valid, config.probe.samples)}
    for name, teacher in config.alignment.teachers.items():
        if teacher.domains and not probed & set(teacher.domains):
            domains = ", ".join(teacher.domains)
            raise UserError(
                f"alignment.selection_per: none of the probe's {config.probe.samples} clips is of a domain of teacher "
                f"{name!r} ({domains}): raise probe.samples, or hold out more clips (data.valid_share)"
            )


def apply_selection(alignment: AlignmentLoss, selection: Selection, depth: int) -> None:
    """Give the loss a selection.

    Raises:
        UserError: it is of other layers, teachers or times than the run has.
    """
    try:
        for own in by_teacher(selection, alignment.teachers).values():
            if own.layers[-1] >= depth:
                raise UserError(
                    f"selection: layer {own.layers[-1]} does not exist, the model has layers 0 to {depth - 1}"
                )
        alignment.select(selection)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error} (alignment.teachers, alignment.weights, probe.t_grid)") from error


def aligned_metrics(metrics: Mapping[str, T], selection: Selection | None, teachers: Iterable[str]) -> dict[str, T]:
    """The metrics without those of layers that are not aligned; such names end in "<teacher>/<layer>" or "<layer>"."""
    chosen = _layers(selection, teachers) if selection else {}
    aligned = {f"{name}/{layer}" for name, layers in chosen.items() for layer in layers}
    aligned |= {pair.rpartition("/")[2] for pair in aligned}
    kept = {}
    for name, value in metrics.items():
        _, _, of = name.partition("/")  # "cosine/speech/3" and "gradient_cosine/3"
        if not of.rpartition("/")[2].isdigit() or of in aligned:
            kept[name] = value
    return kept


def _layers(selection: Selection, teachers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    return {name: own.layers for name, own in by_teacher(selection, teachers).items()}


def choose(trainer: Trainer) -> None:
    """Score every layer on held-out clips over the grid of t, and choose the layers, or choose them again.

    Raises:
        UserError: the network's velocity, or a number made from it, is not finite."""
    began = time.perf_counter()
    config, valid, backbone = trainer.config, trainer.data.valid, trainer.objective.backbone
    probe, a = config.probe, config.alignment
    where = (config, trainer.device, trainer.bf16)
    try:
        scores = score_layers(backbone, valid, *where)
        values: Mapping[str, Tensor] | None = None
        if POLICIES[a.policy] == "values":
            values = layer_values(a.policy, backbone, trainer.teachers, valid, *where)
        before = trainer.selection
        chosen = trainer.choice.update(trainer.step, scores, values, trainer.device)
        stored = stored_by_layer(backbone, trainer.teachers, valid, *where)
    except UserError:
        raise
    except (ValueError, torch.linalg.LinAlgError) as error:  # a network that has diverged
        raise UserError(f"the probe at step {trainer.step}: {error}; lower optimizer.lr") from error
    if not trainer.choice.given:
        trainer.select(chosen)
    seconds = time.perf_counter() - began
    trainer.probe_seconds += seconds
    trainer.log.write(
        "probe",
        step=trainer.step,
        seconds=seconds,
        share=trainer.probe_seconds / trainer.seconds(),
        block_evaluations=scores.block_evaluations,
        selection=selection_state(chosen),
        changed=before is not None and _layers(before, trainer.teachers) != _layers(chosen, trainer.teachers),
        scores=trainer.choice.chooser.shown(trainer.choice.chooser.latest),
        average=trainer.choice.chooser.shown(trainer.choice.chooser.averages),
    )
    if rank() == 0:
        with writing(trainer.run_dir / "foga.csv"):
            scores.to_csv(trainer.run_dir / "foga.csv")
        epoch = trainer.step * config.train.accumulate / trainer.feed.plan.steps_per_epoch
        write_scd(trainer.run_dir, scores, stored, probe.k, trainer.step, epoch)
        facts = {**selection_state(chosen), "metric": probe.metric, "step": trainer.step}
        write_whole(trainer.run_dir / "selection.json", json.dumps(facts, indent=1) + "\n")
