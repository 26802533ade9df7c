"""What a run would take, before it starts: clips, hours, epochs, features, memory, disk and the probes' share.

`agrepa train CONFIG --plan` prints it. Clips are counted by reading the headers of their files, as a run does, or they
are assumed (`--hours`). Memory is an estimate, see `planned_memory`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..alignment.policy import POLICIES
from ..alignment.selection import by_teacher, read_selection
from ..attribution.plan import AblationPlan, Sizes
from ..data.buckets import BucketBatches
from ..errors import UserError
from ..imports import import_module
from ..models.cost import ends_flops, forward_flops
from .aligning import alignment_schedule
from .choice import check_probed_domains
from .clips import RunData, load_data
from .config import RunConfig
from .environment import pick_device
from .planned_memory import StepMemory, step_memory
from .planned_teachers import PlannedTeacher, plan_teachers
from .start import check_new
from .step import pick_engine
from .targets import domain_tables

FEWEST_CLIPS = 2  # one to train on, one to hold out


@dataclass(frozen=True)
class PlannedClips:
    """The clips of a run: those of an epoch, and all sounds by domain.

    Attributes:
        frames: mel frames of each training sample, a crop or a window. domains: the domain of each.
        held_out: clips that are not trained on. seconds: {domain: seconds of each sound, in training or held out}.
        unreadable: clips that are left out.
    """

    frames: list[int]
    domains: list[str]
    held_out: int
    seconds: dict[str, np.ndarray]
    unreadable: int = 0

    @classmethod
    def of(cls, data: RunData, config: RunConfig) -> PlannedClips:
        train = data.train.in_windows() if config.data.long == "windows" else data.train
        seconds: dict[str, dict[int, float]] = {domain: {} for domain in data.train.domains}
        for dataset in (data.train, data.valid):
            for clip in dataset.clips:
                samples = dataset.samples_of(clip)
                seconds[clip.domain][dataset.sounds[clip.path]] = samples / config.mel.sample_rate
        return cls(
            train.lengths,
            [clip.domain for clip in train.clips],
            len(data.valid),
            {domain: np.array(list(sounds.values())) for domain, sounds in seconds.items()},
            len(data.skipped),
        )

    @classmethod
    def assumed(cls, hours: Mapping[str, float], config: RunConfig) -> PlannedClips:
        """So many hours of each domain, in clips as long as a crop."""
        length, share = config.data.max_seconds, config.data.valid_share
        counts = {domain: max(FEWEST_CLIPS, round(3600 * value / length)) for domain, value in hours.items()}
        held = {d: 0 if config.data.valid else min(n - 1, max(1, round(share * n))) for d, n in counts.items()}
        domains = [domain for domain, count in counts.items() for _ in range(count - held[domain])]
        seconds = {domain: np.full(count, length) for domain, count in counts.items()}
        return cls([config.max_frames] * len(domains), domains, sum(held.values()), seconds)


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that has not started."""

    config: RunConfig
    clips: PlannedClips
    teachers: dict[str, PlannedTeacher]
    batches: BucketBatches
    memory: StepMemory
    probes: int
    aligned: tuple[int, int]  # alignment runs from one step up to another

    @property
    def epochs(self) -> float:
        return self.config.train.steps * self.config.train.accumulate / self.batches.steps_per_epoch

    @property
    def train_flops(self) -> float:
        """Of the network in all training steps."""
        per_epoch = sum(3 * forward_flops(self.config.dit, *shape) * n for shape, n in self.batches.per_epoch.items())
        return per_epoch * self.epochs

    @property
    def probe_flops(self) -> float:
        """Of all probes, at the longest bucket."""
        probe, dit = self.config.probe, self.config.dit
        samples = probe.samples * len(probe.t_grid)
        plan = AblationPlan.build(dit.depth)
        sizes = Sizes(self.config.max_frames, dit.width, dit.ff_ratio, dit.mels, dit.heads, 2)
        each = plan.flops(sizes, samples) + ends_flops(dit, samples, plan.streams, self.config.max_frames)
        return self.probes * each

    def features(self, name: str) -> tuple[int, int, int]:
        """Bytes of a teacher's features of the run's sounds: float32, int8, and float32 pooled over each clip."""
        teacher, wanted = self.teachers[name], self.config.alignment.teachers[name].domains
        sounds = [seconds for domain, seconds in self.clips.seconds.items() if not wanted or domain in wanted]
        count = sum(map(len, sounds))
        frames = sum(int(np.ceil(seconds * teacher.rate).sum()) for seconds in sounds) if teacher.rate else count
        return 4 * frames * teacher.width, frames * (teacher.width + 4), 4 * count * teacher.width

    @property
    def disk(self) -> int:
        """Bytes of checkpoints: `train.keep`, and the one that is being written."""
        return (self.config.train.keep + 1) * self.memory.checkpoint

    def text(self) -> str:
        """The plan as lines for a terminal."""
        config, clips, memory = self.config, self.clips, self.memory
        rows: list[tuple[str, str]] = []
        parts = ", ".join(f"{d} {len(s):,} ({s.sum() / 3600:,.1f} h)" for d, s in clips.seconds.items())
        rows.append(("clips", parts))
        rows.append(("held out", f"{clips.held_out:,} clips"))
        if clips.unreadable:
            rows.append(("unreadable", f"{clips.unreadable:,} clips, which are left out"))
        samples = "windows" if config.data.long == "windows" else "clips"
        size = sorted({n for n, _ in self.batches.shapes})
        per_batch = f"{size[0]}" if len(size) == 1 else f"{size[0]} to {size[-1]}"
        hours = sum(clips.frames) / config.grid.frame_rate / 3600
        epoch = f"{len(clips.frames):,} {samples}, {hours:,.1f} h, in {self.batches.steps_per_epoch:,} batches"
        rows.append(("an epoch", epoch))
        rows.append(("batch", f"{per_batch} {samples} of up to {config.max_frames} frames, on each rank"))
        rows.append(("steps", f"{config.train.steps:,}, {self.epochs:,.2f} epochs on one rank"))
        first, last = self.aligned
        rows.append(("aligned", f"steps {first:,} to {last:,}" if last > first else "never"))
        for name, teacher in self.teachers.items():
            full, small, pooled = (_bytes(value) for value in self.features(name))
            rate = f" at {teacher.rate:g} Hz" if teacher.rate else ""
            facts = f"{teacher.width} channels{rate}: {full} as float32, {small} as int8, {pooled} pooled"
            rows.append((f"features of {name}", facts))
        rows.append(("parameters", f"{memory.parameters:,}, and {memory.heads:,} of the alignment heads"))
        rows.append(("memory", f"{_bytes(self.peak)} on a CUDA device (estimate), of which"))
        for what, value in self.memory_parts.items():
            rows.append((f"  {what}", value if isinstance(value, str) else _bytes(value)))
        rows.append(("checkpoints", f"{_bytes(self.disk)} ({config.train.keep} + 1 of {_bytes(memory.checkpoint)})"))
        rows.append(("compute", f"{self.train_flops:.3g} operations of the network in all steps"))
        share = self.probe_flops / (self.probe_flops + self.train_flops)
        rows.append(("probes", f"{self.probes:,}, {share:.2%} of the network's operations"))
        width = max(len(label) for label, _ in rows) + 2
        return "\n".join(f"{label:<{width}}{value}" for label, value in rows)

    @property
    def _live(self) -> dict[str, PlannedTeacher]:
        return {name: t for name, t in self.teachers.items() if not self.config.alignment.teachers[name].cached}

    @property
    def peak(self) -> int:
        """Bytes of a training step, with the weights of live teachers that are known."""
        return self.memory.total + sum(teacher.bytes or 0 for teacher in self._live.values())

    @property
    def memory_parts(self) -> dict[str, int | str]:
        memory = self.memory
        parts: dict[str, int | str] = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "AdamW": memory.moments,
            "EMA": memory.ema,
            "activations": memory.activations,
        }
        for name, teacher in self._live.items():
            parts[f"teacher {name}"] = "not known: its weights are not here" if teacher.bytes is None else teacher.bytes
        return parts


def make_plan(config: RunConfig, hours: Mapping[str, float] | None = None) -> Plan:
    """Plan a run. Nothing is written into `train.out`.

    hours: {domain: hours of sound} in place of the clips of `data.train`. The plan is then one for another machine:
        neither its clips nor its teachers, devices or files have to be here.

    Raises:
        UserError: what `agrepa train` would refuse, except for features and tokens that are not extracted yet.
    """
    elsewhere = hours is not None
    for module in config.train.imports:
        import_module(module, "train.imports")
    schedule = alignment_schedule(config)
    if not elsewhere:
        check_new(config)
        pick_engine(config, pick_device(config.train.device), ranks=1)
        if config.alignment.selection:
            _check_selection(config)
    with tempfile.TemporaryDirectory() as folder:  # of the built-in corpus
        if hours is not None:
            clips = PlannedClips.assumed(hours, config)
        else:
            data = load_data(config, Path(folder), with_tokens=False)
            check_probed_domains(config, data.valid)
            clips = PlannedClips.of(data, config)
    domain_tables(config, tuple(clips.seconds))
    teachers = plan_teachers(config, elsewhere=elsewhere)
    batches = BucketBatches(
        clips.frames,
        buckets=config.bucket_frames,
        frames_per_batch=config.data.frames_per_batch,
        seed=config.train.seed,
        domains=clips.domains,
        balance=config.data.balance_domains,
    )
    widths = {name: teacher.width for name, teacher in teachers.items()}
    memory = step_memory(config, widths, *max(batches.shapes, key=math.prod))
    aligned = (schedule.start, schedule.stop) if config.alignment.weight else (0, 0)
    return Plan(config, clips, teachers, batches, memory, _probes(config, schedule.stop), aligned)


def _check_selection(config: RunConfig) -> None:
    chosen = by_teacher(read_selection(config.alignment.selection), config.alignment.teachers)
    last = max(layer for selection in chosen.values() for layer in selection.layers)
    if last >= config.model.depth:
        raise UserError(f"selection: layer {last} does not exist, the model has layers 0 to {config.model.depth - 1}")


def _probes(config: RunConfig, stop: int) -> int:
    """Number of probes: at `probe.start`, then every `probe.every` steps as long as alignment lasts."""
    probe, steps = config.probe, config.train.steps
    if probe.start >= steps:
        return 0
    given = bool(config.alignment.selection or config.alignment.layers)
    if not probe.every or given or not POLICIES[config.alignment.policy]:
        return 1
    return 1 + max(0, math.ceil((min(stop, steps) - probe.start) / probe.every) - 1)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
