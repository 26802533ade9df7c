"""The probe of a run under way: score the layers on held-out clips, choose, and record what was chosen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..alignment.policy import POLICIES
from ..alignment.reselect import ALL
from ..alignment.selection import Selection, by_teacher, selection_state
from ..attribution.scd import Stored, write_scd
from ..attribution.scores import LayerScores
from ..attribution.statistics import top_k_by_clips
from ..data.dataset import ClipDataset
from ..errors import UserError, writing
from .checkpoint import write_whole
from .clips import spread
from .config import RunConfig
from .dissociation import stored_by_layer
from .distributed import rank
from .inference import layer_values, score_layers
from .objective import Backbone
from .sharding import whole

if TYPE_CHECKING:
    from .trainer import Trainer

T = TypeVar("T")


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


def _layers(selection: Selection, teachers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    return {name: own.layers for name, own in by_teacher(selection, teachers).items()}


def choose(trainer: Trainer) -> None:
    """Score every layer on held-out clips over the grid of t, and choose the layers, or choose them again.

    Raises:
        UserError: the network's velocity, or a number made from it, is not finite."""
    began = time.perf_counter()
    config, valid, backbone = trainer.config, trainer.data.valid, whole(trainer.objective.backbone)
    aligner, policy = trainer.aligner, config.alignment.policy
    where = (config, trainer.device, trainer.bf16)
    before = aligner.selection
    try:
        scores = score_layers(backbone, valid, *where)
        values: Mapping[str, Tensor] | None = None
        if POLICIES[policy] == "values":
            values = layer_values(policy, backbone, trainer.teachers, valid, *where)
        aligner.step(trainer.step, scores=scores, values=values, targets=_targets(trainer, backbone, where))
        stored = stored_by_layer(backbone, trainer.teachers, valid, *where)
    except UserError:
        raise
    except (ValueError, torch.linalg.LinAlgError) as error:  # a network that has diverged
        raise UserError(f"the probe at step {trainer.step}: {error}; lower optimizer.lr") from error
    chosen, chooser = aligner.choice.chosen, aligner.choice.chooser
    assert chosen is not None
    names = list(aligner.loss_fn.teachers)
    over_time = _over_time(trainer, scores, stored) if rank() == 0 else {}
    seconds = time.perf_counter() - began
    trainer.probe_seconds += seconds
    trainer.log.write(
        "probe",
        step=trainer.step,
        seconds=seconds,
        share=trainer.probe_seconds / trainer.seconds(),
        block_evaluations=scores.block_evaluations,
        selection=selection_state(chosen),
        changed=before is not None and _layers(before, names) != _layers(chosen, names),
        scores=chooser.shown(chooser.latest),
        average=chooser.shown(chooser.averages),
        **over_time,
    )
    if rank() == 0:
        with writing(trainer.run_dir / "foga.csv"):
            scores.to_csv(trainer.run_dir / "foga.csv")
        facts = {**selection_state(chosen), "metric": config.probe.metric, "step": trainer.step}
        write_whole(trainer.run_dir / "selection.json", json.dumps(facts, indent=1) + "\n")


def _over_time(trainer: Trainer, scores: LayerScores, stored: Sequence[Stored]) -> dict[str, Any]:
    """Write the tables of SCD; and what the log keeps of each probe, so that the report can draw it over the steps."""
    k = trainer.config.probe.k
    epoch = trainer.step * trainer.config.train.accumulate / trainer.feed.plan.steps_per_epoch
    results = write_scd(trainer.run_dir, scores, stored, k, trainer.step, epoch)
    scd = [
        {
            "domain": entry.domain,
            "teacher": entry.teacher,
            "foga": list(entry.result.foga),
            "lasp": list(entry.result.stored),
            "overlap": entry.result.overlap,
            # JSON has no nan, which stands for a correlation with layers that are all alike.
            **{name: value if math.isfinite(value) else None for name, value in entry.result.interval.items()},
        }
        for entry in results
    ]
    facts: dict[str, Any] = {"k": k, "foga": scores.mean.tolist(), "scd": scd}
    if scores.by_clip()[1].numel() > 1:
        facts["by_clips"] = {name: list(values) for name, values in asdict(top_k_by_clips(scores, k)).items()}
    return facts


def _targets(
    trainer: Trainer, backbone: Backbone, where: tuple[RunConfig, torch.device, bool]
) -> dict[str, int] | None:
    """The target layers of the self teachers that have none in the configuration, {teacher or ALL: layer}.

    The first probe measures them: of the layers from probe.k on, the one that stores most of the clips' own spectra
    (LASP with `spectra` in place of a teacher's features). Later probes keep them, because the heads have learned
    toward that layer.
    """
    config, names = trainer.config, trainer.aligner.self_targets.measured
    if not names:
        return None
    if trainer.selection is not None:
        chosen = by_teacher(trainer.selection, trainer.aligner.loss_fn.teachers)
        kept = {name: chosen[name].target for name in names}
        if config.alignment.selection_per != "teacher":
            kept = {ALL: kept[names[0]]}
        return {name: target for name, target in kept.items() if target is not None}
    values = layer_values("stored", backbone, {}, trainer.data.valid, *where, only=names)
    k = config.probe.k
    return {name: k + int(stored[k:].argmax()) for name, stored in values.items()}
