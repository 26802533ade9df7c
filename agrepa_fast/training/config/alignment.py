"""Sections `probe` and `alignment`: when layers are scored, which are aligned, toward what and how strongly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...alignment.heads import HEADS
from ...alignment.loss import OBJECTIVES
from ...alignment.policy import POLICIES
from ...alignment.schedule import TIMESTEP_WEIGHTS
from ...errors import UserError
from ...fields import AT_LEAST_ONE, DISTINCT, NOT_EMPTY, Allowed, Section, between, from_below, one_of
from .names import MODULE_NAME

STEPS = between(0, 1_000_000_000)
LAYER = Annotated[int, between(0, 511)]
AT_MOST_100 = Allowed("at most 100 values", lambda values: len(values) <= 100)
AT_MOST_64 = Allowed("at most 64 teachers", lambda teachers: len(teachers) <= 64)
POOL = Allowed("mean or null", lambda pool: pool == "mean")
COSINE = Allowed("null or a cosine in [-1, 1]", lambda value: -1 <= value <= 1)
LAYERS = Allowed("distinct layers from 0 on", lambda layers: len(set(layers)) == len(layers))
OPTION = Allowed(
    "names of Python arguments other than source", lambda name: name.isidentifier() and name not in ("source", "self")
)


@dataclass(frozen=True)
class ProbeConfig(Section, name="probe"):
    """FoG-A: when the layers are scored, and on what."""

    start: Annotated[int, STEPS, "steps of warm-up before the probe that decides the selection"] = 5000
    samples: Annotated[int, between(1, 10_000), "held-out clips to score on"] = 16
    t_grid: Annotated[
        tuple[Annotated[float, between(0, 1)], ...], AT_LEAST_ONE, AT_MOST_100, "times to score at; 0 is noise"
    ] = (0.1, 0.3, 0.5, 0.7, 0.9)
    metric: Annotated[str, one_of(("rms", "squared")), "distance between velocities"] = "rms"
    k: Annotated[int, between(1, 512), "layers to align; at most model.depth"] = 3
    every: Annotated[int, STEPS, "steps between later probes, which choose again; 0: one probe"] = 0
    momentum: Annotated[float, from_below(0, 1), "of the scores' moving average over probes"] = 0.5
    margin: Annotated[
        float, between(0, 1000), "a layer replaces another when its score is higher by more than this share"
    ] = 0.1


@dataclass(frozen=True)
class TeacherConfig(Section, name="teacher"):
    """One teacher: its source, and the domains it speaks for."""

    source: Annotated[str, NOT_EMPTY, "a registered name, or a transformers model by folder or name"] = "spectral"
    domains: Annotated[tuple[Annotated[str, NOT_EMPTY], ...], DISTINCT, "domains it speaks for; empty: all"] = ()
    options: Annotated[
        dict[Annotated[str, OPTION], str | int | float | bool], "arguments of the teacher, e.g. {layer: 12}"
    ] = field(default_factory=dict)
    cached: Annotated[bool, "read what agrepa extract wrote; the teacher is not loaded"] = False


@dataclass(frozen=True)
class AlignmentConfig(Section, name="alignment"):
    """The alignment loss (AG-REPA)."""

    enabled: Annotated[bool, "false: train without alignment"] = True
    teachers: Annotated[
        dict[Annotated[str, MODULE_NAME], TeacherConfig], AT_LEAST_ONE, AT_MOST_64, "{name: teacher} (docs/teachers.md)"
    ] = field(default_factory=lambda: {"spectral": TeacherConfig()})
    weight: Annotated[float, between(0, 1_000_000), "factor on the alignment loss"] = 0.5
    pool: Annotated[str | None, POOL, "mean: one vector a clip; null: frame by frame"] = "mean"
    head: Annotated[str, one_of(HEADS), "projection to the teacher's width; conv with pool: null"] = "mlp"
    objective: Annotated[
        str, one_of(OBJECTIVES), "cosine; relation compares matrices of cosines; cka their kernel alignment"
    ] = "cosine"
    standardise_targets: Annotated[bool, "z-score each channel over the clip's frames (iREPA); with pool: null"] = False
    mask: Annotated[
        str, one_of(("valid", "span")), "frames to align: all valid ones, or not those shown as reference"
    ] = "valid"
    policy: Annotated[str, one_of(POLICIES), "who chooses probe.k layers at the probe: FoG-A's score, or a control"] = (
        "foga"
    )
    layers: Annotated[tuple[LAYER, ...], LAYERS, "these layers, weighted alike, in place of the probe's choice"] = ()
    selection: Annotated[str, "or a selection.json"] = ""
    ramp: Annotated[int, STEPS, "steps from nothing to full weight, after the probe"] = 100
    decay_start: Annotated[float, between(0, 1), "share of all steps at which the weight starts to fall"] = 0.6
    stop: Annotated[float, between(0, 1), "share of all steps at which it has reached zero"] = 0.9
    decay: Annotated[str, one_of(("cosine", "linear")), "form of the fall"] = "cosine"
    stop_similarity: Annotated[
        float | None, COSINE, "off for good once the running mean of the raw cosine is there; null: never"
    ] = None
    timestep_weight: Annotated[str, one_of(TIMESTEP_WEIGHTS), "weight of a sample by its t"] = "uniform"
    bitc: Annotated[bool, "BiT-C: align the pooled token embedding too"] = False
    bitc_weights: Annotated[
        dict[str, Annotated[float, between(0, 1_000_000)]],
        "{teacher: weight of its BiT-C term}; where not given 0.5 for a teacher named speech, 1 for others",
    ] = field(default_factory=dict)

    def check(self) -> None:
        """Check the fields that depend on each other.

        Raises:
            UserError: names the fields.
        """
        if self.standardise_targets and self.pool is not None:
            raise UserError(
                "alignment.standardise_targets: expected alignment.pool null with it, which works on frames"
            )
        if self.head == "conv" and self.pool is not None:
            raise UserError("alignment.head: expected alignment.pool null with conv, which works on frames")
        if self.timestep_weight != "uniform" and self.objective != "cosine" and self.pool is not None:
            raise UserError(
                f"alignment.timestep_weight: expected uniform with pooled {self.objective}, which compares samples "
                f"with each other (alignment.objective, alignment.pool), got {self.timestep_weight!r}"
            )
        if self.layers and self.selection:
            raise UserError("alignment.layers, alignment.selection: expected one of the two, got both")
        if self.policy == "fixed" and not self.layers:
            raise UserError("alignment.policy: expected alignment.layers with it, got fixed without any")
        if self.decay_start > self.stop:
            raise UserError(
                f"alignment.decay_start: expected at most alignment.stop ({self.stop:g}), got {self.decay_start:g}"
            )
        for name in self.bitc_weights:
            if name not in self.teachers:
                known = ", ".join(self.teachers)
                raise UserError(f"alignment.bitc_weights: expected names of alignment.teachers ({known}), got {name!r}")
