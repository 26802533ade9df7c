"""The `Aligner` of a run, as its configuration describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..alignment.aligner import Aligner
from ..alignment.choice import ProbePlan
from ..alignment.policy import choose_layers
from ..alignment.schedule import AlignmentSchedule
from ..errors import UserError
from ..models.dit import DiT
from .config import RunConfig


def alignment_schedule(config: RunConfig) -> AlignmentSchedule:
    """Alignment starts after the probe, or at once when the selection is given.

    Raises:
        UserError: it would stop before the probe."""
    a, steps = config.alignment, config.train.steps
    start = config.alignment_start
    if not a.enabled:
        return AlignmentSchedule(0, 0, 0, 0)
    stop = math.ceil(a.stop * steps)
    if start >= stop:
        raise UserError(
            f"probe.start: the selection comes at step {start}, but alignment stops at {stop} "
            f"(alignment.stop {a.stop:g} of train.steps {steps}): probe earlier or train longer"
        )
    return AlignmentSchedule(start, a.ramp, max(start, math.ceil(a.decay_start * steps)), stop, a.decay)


def build_aligner(config: RunConfig, network: DiT, teachers: Mapping[str, int]) -> Aligner:
    """The aligner of a run's network.

    teachers: {name: width} of those whose features come with the batches.

    Raises:
        UserError: alignment would stop before the probe.
    """
    a, probe, depth = config.alignment, config.probe, config.model.depth
    return Aligner(
        network,
        {**teachers, **a.self_teachers},
        k=probe.k,
        policy=a.policy,
        seed=config.train.seed,
        weighting=a.weights,
        domains={name: t.domains for name, t in a.teachers.items()} if a.selection_per == "teacher" else None,
        selection=choose_layers("fixed", depth, layers=a.layers) if a.layers else None,
        # The same head of every layer in every run, so that a later probe may choose any of them.
        layers=range(depth),
        width=config.model.width,
        pool=a.pool,
        head=a.head,
        objective=a.objective,
        standardise_targets=a.standardise_targets,
        weight=a.weight,
        schedule=alignment_schedule(config),
        probe=ProbePlan(
            probe.start,
            probe.every,
            probe.samples,
            probe.t_grid,
            probe.momentum,
            probe.margin,
            {"metric": probe.metric},
            targets=True,
        ),
        stop_similarity=a.stop_similarity,
        every_head=False,
        average_gradients=False,  # the heads are trained within the objective, which is wrapped or sharded as a whole
    )
