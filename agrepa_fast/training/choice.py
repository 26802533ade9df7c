"""When alignment runs, and which layers it takes: the schedule, and the probe of a run under way."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING

import torch

from ..alignment.policy import POLICIES, choose_layers
from ..alignment.reselect import average_scores, reselect
from ..alignment.schedule import AlignmentSchedule
from ..attribution.scd import write_scd
from ..errors import UserError, writing
from .checkpoint import write_whole
from .config import RunConfig
from .dissociation import stored_by_layer
from .distributed import rank
from .inference import layer_values, score_layers

if TYPE_CHECKING:
    from .trainer import Trainer


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


def choose(trainer: Trainer) -> None:
    """Score every layer on held-out clips over the grid of t, and choose the layers, or choose them again.

    Raises:
        UserError: the network's velocity, or a number made from it, is not finite."""
    began = time.perf_counter()
    config, valid, backbone = trainer.config, trainer.data.valid, trainer.objective.backbone
    probe, a = config.probe, config.alignment
    where = (config, trainer.device, trainer.bf16)
    try:
        trainer.scores = score_layers(backbone, valid, *where)
        values = trainer.scores.mean.tolist()
        if POLICIES[a.policy] == "values":
            values = layer_values(a.policy, backbone, trainer.teachers, valid, *where).tolist()
        if not all(map(math.isfinite, values)):
            raise ValueError(f"scores that are not finite: {values}")
        trainer.average = average_scores(trainer.average, values, probe.momentum)
        before = trainer.selection
        if before is None or trainer.selection_fixed:
            chosen = choose_layers(
                a.policy,
                config.model.depth,
                probe.k,
                layers=a.layers,
                values=values if POLICIES[a.policy] == "values" else (),
                scores=trainer.scores,
                seed=config.train.seed,
            )
        else:
            chosen = reselect(before, trainer.average, probe.margin, weighted=POLICIES[a.policy] == "scores")
        chosen = chosen.synchronised(trainer.device)
        stored = stored_by_layer(backbone, trainer.teachers, valid, *where)
    except UserError:
        raise
    except (ValueError, torch.linalg.LinAlgError) as error:  # a network that has diverged
        raise UserError(f"the probe at step {trainer.step}: {error}; lower optimizer.lr") from error
    if not trainer.selection_fixed:
        trainer.select(chosen)
    trainer.probed = trainer.step
    seconds = time.perf_counter() - began
    trainer.probe_seconds += seconds
    trainer.log.write(
        "probe",
        step=trainer.step,
        seconds=seconds,
        share=trainer.probe_seconds / trainer.seconds(),
        block_evaluations=trainer.scores.block_evaluations,
        selection=chosen.state(),
        changed=before is not None and before.layers != chosen.layers,
        scores=values,
        average=trainer.average,
    )
    if rank() == 0:
        with writing(trainer.run_dir / "foga.csv"):
            trainer.scores.to_csv(trainer.run_dir / "foga.csv")
        epoch = trainer.step * config.train.accumulate / trainer.feed.plan.steps_per_epoch
        write_scd(trainer.run_dir, trainer.scores, stored, probe.k, trainer.step, epoch)
        facts = {**chosen.state(), "metric": probe.metric, "step": trainer.step}
        write_whole(trainer.run_dir / "selection.json", json.dumps(facts, indent=1) + "\n")
