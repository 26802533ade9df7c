"""Sections `probe` and `alignment`: when layers are scored, which are aligned, with which teachers, how strongly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...alignment.heads import HEADS
from ...alignment.policy import POLICIES
from ...alignment.schedule import TIMESTEP_WEIGHTS
from ...alignment.selection import WEIGHTINGS
from ...alignment.self_targets import SOURCES, SelfTeacher
from ...alignment.similarity import OBJECTIVES
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

    start: Annotated[
        int, STEPS, "step of the first probe, which chooses the layers; before it the run trains without alignment"
    ] = 5000
    samples: Annotated[int, between(1, 10_000), "held-out clips to score on"] = 16
    t_grid: Annotated[
        tuple[Annotated[float, between(0, 1)], ...],
        AT_LEAST_ONE,
        AT_MOST_100,
        "values of t to score at; 0 is noise, 1 is data",
    ] = (0.1, 0.3, 0.5, 0.7, 0.9)
    metric: Annotated[str, one_of(("rms", "squared")), "distance between outputs (docs/concepts.md)"] = "rms"
    output: Annotated[
        str,
        one_of(("network", "velocity")),
        "what a layer must change to score: the network's own output, or the velocity that it stands for",
    ] = "network"
    k: Annotated[int, between(1, 512), "number of layers to align; at most model.depth"] = 3
    every: Annotated[int, STEPS, "steps between later probes, each of which chooses again; 0: one probe"] = 0
    momentum: Annotated[float, from_below(0, 1), "decay of the moving average of the scores over probes"] = 0.5
    margin: Annotated[
        float, between(0, 1000), "a layer replaces an aligned one if its score is higher by more than this share"
    ] = 0.1


@dataclass(frozen=True)
class TeacherConfig(Section, name="teacher"):
    """One teacher, and the domains whose clips it is used for."""

    source: Annotated[
        str,
        NOT_EMPTY,
        "a registered name, a transformers model by folder or name, or the network itself (layersync, self-flow)",
    ] = "spectral"
    domains: Annotated[
        tuple[Annotated[str, NOT_EMPTY], ...], DISTINCT, "domains whose clips it is used for; empty: all"
    ] = ()
    options: Annotated[
        dict[Annotated[str, OPTION], str | int | float | bool], "arguments of the teacher, e.g. {layer: 12}"
    ] = field(default_factory=dict)
    cached: Annotated[bool, "true: read its extracted features (agrepa extract), do not load it"] = False
    target_layer: Annotated[
        Annotated[int, between(1, 511)] | None,
        "only for layersync and self-flow: the layer that is the target, after all aligned ones; null: the probe "
        "measures it",
    ] = None

    @property
    def own(self) -> SelfTeacher | None:
        """The network as its own teacher; None for any other source."""
        return SOURCES[self.source](self.target_layer) if self.source in SOURCES else None


@dataclass(frozen=True)
class AlignmentConfig(Section, name="alignment"):
    """The alignment loss (AG-REPA)."""

    enabled: Annotated[bool, "whether to align at all"] = True
    teachers: Annotated[
        dict[Annotated[str, MODULE_NAME], TeacherConfig],
        AT_LEAST_ONE,
        AT_MOST_64,
        "the teachers by name (docs/teachers.md)",
    ] = field(default_factory=lambda: {"spectral": TeacherConfig()})
    weight: Annotated[float, between(0, 1_000_000), "factor of the alignment loss"] = 0.5
    pool: Annotated[str | None, POOL, "mean: align one vector for each clip; null: align frame by frame"] = "mean"
    head: Annotated[str, one_of(HEADS), "kind of the projection to the teacher's width; conv needs pool null"] = "mlp"
    objective: Annotated[
        str,
        one_of(OBJECTIVES),
        "what is compared: vectors (cosine), matrices of cosines between rows (relation), or kernels (cka)",
    ] = "cosine"
    standardise_targets: Annotated[
        bool, "z-score each target channel over the clip's frames (iREPA); needs pool null"
    ] = False
    mask: Annotated[
        str,
        one_of(("valid", "span")),
        "frames to align: all valid ones (valid), or those that are not shown as reference (span)",
    ] = "valid"
    policy: Annotated[
        str, one_of(POLICIES), "how the probe chooses probe.k layers: by FoG-A's scores, or by a control"
    ] = "foga"
    selection_per: Annotated[
        str,
        one_of(("run", "teacher")),
        "one selection for all teachers (run), or one for each, by the scores of its domains (teacher)",
    ] = "run"
    weights: Annotated[
        str,
        one_of(WEIGHTINGS),
        "weights of the layers: their shares of the scores (share), the scores (score), or shares that follow each "
        "sample's t (by-time)",
    ] = "share"
    layers: Annotated[
        tuple[LAYER, ...], LAYERS, "align these layers with equal weights, instead of the probe's choice"
    ] = ()
    selection: Annotated[
        str, "file of a selection to align instead of the probe's choice, such as a run's selection.json"
    ] = ""
    wait: Annotated[
        bool, "true: align given layers or a given selection from probe.start on, not from the first step on"
    ] = False
    ramp: Annotated[int, STEPS, "steps over which the weight rises from zero, after the first probe"] = 100
    decay_start: Annotated[float, between(0, 1), "share of train.steps at which the weight begins to fall"] = 0.6
    stop: Annotated[float, between(0, 1), "share of train.steps at which the weight is zero"] = 0.9
    decay: Annotated[str, one_of(("cosine", "linear")), "curve of the falling weight"] = "cosine"
    stop_similarity: Annotated[
        float | None, COSINE, "alignment ends when the running mean of the raw cosine reaches this; null: never"
    ] = None
    timestep_weight: Annotated[str, one_of(TIMESTEP_WEIGHTS), "weight of a sample in the alignment loss by its t"] = (
        "uniform"
    )
    bitc: Annotated[bool, "whether to align the pooled token embedding too (BiT-C)"] = False
    bitc_weights: Annotated[
        dict[str, Annotated[float, between(0, 1_000_000)]],
        "weight of a teacher's BiT-C term; default: 0.5 for a teacher named speech, 1 for others",
    ] = field(default_factory=dict)

    @property
    def self_teachers(self) -> dict[str, SelfTeacher]:
        """The teachers that are the network itself, by name."""
        return {name: own for name, teacher in self.teachers.items() if (own := teacher.own) is not None}

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
        if self.weights != "share" and (self.layers or POLICIES[self.policy] != "scores"):
            by = "alignment.layers" if self.layers else f"alignment.policy {self.policy}"
            raise UserError(f"alignment.weights: expected share with {by}, without scores, got {self.weights}")
        if self.weights == "by-time" and self.objective != "cosine" and self.pool is not None:
            raise UserError(
                f"alignment.weights: expected share or score with pooled {self.objective}, which compares samples with "
                "each other (alignment.objective, alignment.pool), got by-time"
            )
        if self.layers and self.selection:
            raise UserError("alignment.layers, alignment.selection: expected one of the two, got both")
        if self.policy == "fixed" and not self.layers:
            raise UserError("alignment.policy: expected alignment.layers with it, got fixed without any")
        self._check_self_teachers()
        if self.decay_start > self.stop:
            raise UserError(
                f"alignment.decay_start: expected at most alignment.stop ({self.stop:g}), got {self.decay_start:g}"
            )
        for name in self.bitc_weights:
            if name not in self.teachers:
                known = ", ".join(self.teachers)
                raise UserError(f"alignment.bitc_weights: expected names of alignment.teachers ({known}), got {name!r}")

    def _check_self_teachers(self) -> None:
        own = self.self_teachers
        for name, teacher in self.teachers.items():
            place = f"alignment.teachers.{name}"
            if name not in own:
                if teacher.target_layer is not None:
                    raise UserError(
                        f"{place}.target_layer: expected null with source {teacher.source}, as only the sources "
                        f"{' and '.join(SOURCES)} have one, got {teacher.target_layer}"
                    )
                continue
            if teacher.cached:
                raise UserError(
                    f"{place}.cached: expected false with {teacher.source}: its targets change in each step"
                )
            if teacher.options:
                raise UserError(
                    f"{place}.options: expected none with {teacher.source} (target_layer is a field of the teacher "
                    f"itself), got {', '.join(teacher.options)}"
                )
            if name in self.bitc_weights:
                raise UserError(
                    f"alignment.bitc_weights: expected no {name!r}, as BiT-C leaves out source {teacher.source}"
                )
            if self.layers:
                target = teacher.target_layer
                if target is None:
                    raise UserError(
                        f"{place}.target_layer: expected a layer after {max(self.layers)}, as alignment.layers leaves "
                        "nothing to measure, got null"
                    )
                if target <= max(self.layers):
                    raise UserError(
                        f"{place}.target_layer: expected a layer after all of alignment.layers "
                        f"({', '.join(map(str, self.layers))}), got {target}"
                    )
        if self.bitc and len(own) == len(self.teachers):
            raise UserError(
                f"alignment.bitc: expected false without a teacher other than {' and '.join(SOURCES)}, got true"
            )
