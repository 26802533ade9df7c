"""The whole configuration of a run, and the checks that concern several sections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...alignment.policy import POLICIES
from ...data.latents import LatentConfig, LatentGrid
from ...data.mel import MelConfig
from ...errors import UserError
from ...fields import Section
from ...models.dit import DiTConfig
from .alignment import AlignmentConfig, ProbeConfig
from .data import DataConfig
from .model import FlowConfig, ModelConfig
from .train import OptimizerConfig, TrainConfig

MOST_FRAMES = 16_384  # longest crop
MOST_PARAMETERS = 10_000_000_000


@dataclass(frozen=True)
class RunConfig(Section, name=""):
    """Everything a run needs; saved beside it as config.yaml."""

    data: DataConfig = field(default_factory=DataConfig)
    mel: MelConfig = field(default_factory=MelConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Check the sections against each other.

        Raises:
            UserError: names the fields.
        """
        self._check_network()
        self._check_latents()
        self._check_frames()
        self._check_alignment()
        self._check_probe()

    def _check_network(self) -> None:
        model, engine = self.model, self.train.engine
        if model.attention == "xformers" and engine not in ("auto", "eager"):
            raise UserError(
                "train.engine: expected auto or eager, as model.attention is xformers (its shapes follow the data), "
                f"got {engine!r}"
            )
        # Per block: attention and feed-forward, and six rows of the modulation.
        blocks = model.depth * model.width**2 * (4 + 2 * model.ff_ratio + 6)
        tables = sum(sum(streams) * model.token_width for streams in self.data.vocabularies.values())
        if blocks + tables > MOST_PARAMETERS:
            raise UserError(
                "model.depth, model.width, model.ff_ratio, model.token_width, data.vocabularies: expected at most "
                f"{MOST_PARAMETERS:,} parameters together, got about {blocks + tables:,}"
            )

    def _check_latents(self) -> None:
        if bool(self.data.latents) != (self.latents.rate > 0):
            raise UserError(
                "data.latents, latents.rate, latents.channels: expected all of them or none, got "
                f"{self.data.latents!r}, {self.latents.rate:g} and {self.latents.channels}"
            )

    def _check_frames(self) -> None:
        mel, seconds = self.mel, self.data.max_seconds
        if isinstance(self.grid, LatentGrid):
            rate = self.grid.frame_rate
            if not 1 <= seconds * rate < MOST_FRAMES + 1:
                raise UserError(
                    f"data.max_seconds, latents.rate: expected 1 to {MOST_FRAMES:,} frames together, got {seconds:g} s "
                    f"at {rate:g} a second"
                )
            return
        grid = f"mel.hop_length {mel.hop_length} at mel.sample_rate {mel.sample_rate}"
        if mel.samples(self.max_frames) < mel.minimum_samples:
            frames = math.ceil((mel.minimum_samples + 1) / mel.hop_length)
            least = math.ceil(frames / mel.frame_rate * 1e4) / 1e4  # rounded up, so that it is enough
            raise UserError(
                f"data.max_seconds: expected at least {least} (half of mel.n_fft {mel.n_fft}, in frames of {grid}), "
                f"got {seconds:g}"
            )
        if self.data.long == "windows" and mel.samples(self.max_frames // 2) < mel.minimum_samples:
            raise UserError(
                f"data.long: windows may be half as long as data.max_seconds ({seconds:g}), which is less than half of "
                f"mel.n_fft ({mel.n_fft}): expected crop, or a larger data.max_seconds"
            )
        if self.max_frames > MOST_FRAMES:
            limit = math.floor(MOST_FRAMES / mel.frame_rate * 1e4) / 1e4
            raise UserError(
                f"data.max_seconds: expected at most {limit} ({MOST_FRAMES:,} frames of {grid}), got {seconds:g}"
            )

    def _check_alignment(self) -> None:
        depth, probe, alignment = self.model.depth, self.probe, self.alignment
        if probe.k > depth:
            raise UserError(f"probe.k: expected 1 to model.depth ({depth}), got {probe.k}")
        if probe.every and POLICIES[alignment.policy] not in ("values", "scores"):
            raise UserError(
                f"probe.every: expected 0, as alignment.policy {alignment.policy} does not look at scores, "
                f"got {probe.every}"
            )
        if max(alignment.layers, default=0) >= depth:
            raise UserError(
                f"alignment.layers: expected distinct layers from 0 to {depth - 1}, "
                f"got {list(alignment.layers)} (model.depth is {depth})"
            )
        for name, own in alignment.self_teachers.items():
            place, target = f"alignment.teachers.{name}.target_layer", own.target_layer
            if target is not None and target >= depth:
                raise UserError(f"{place}: expected a layer below model.depth ({depth}), got {target}")
            if not alignment.layers and not alignment.selection and probe.k > (depth - 1 if target is None else target):
                raise UserError(
                    f"probe.k: expected at most {depth - 1 if target is None else target}, the layers that come before "
                    f"the target of teacher {name!r}, got {probe.k}"
                )
        stop = math.ceil(alignment.stop * self.train.steps)
        start = self.alignment_start
        if alignment.enabled and start >= stop:
            raise UserError(
                f"probe.start: the selection comes at step {start}, but alignment stops at {stop} "
                f"(alignment.stop {alignment.stop:g} of train.steps {self.train.steps}): probe earlier or train longer"
            )

    def _check_probe(self) -> None:
        """Refuse times at which a velocity does not follow from the network's output, or barely does."""
        process, grid = self.flow.process, self.probe.t_grid
        if self.probe.output == "velocity" and not process.first_t <= min(grid) <= max(grid) <= process.last_t:
            raise UserError(
                f"probe.t_grid, probe.output, flow.path, flow.parametrisation: expected times from {process.first_t:g} "
                f"to {process.last_t:g}, where a velocity follows from {process.parametrisation} on {process.path}, "
                f"got {list(grid)}"
            )

    @property
    def grid(self) -> MelConfig | LatentGrid:
        """The frames that the network models, on the time axis of the audio."""
        return LatentGrid(self.latents, self.mel.sample_rate) if self.data.latents else self.mel

    @property
    def alignment_start(self) -> int:
        """The first step that alignment may run in: after the probe, or at once where the layers are given."""
        given = self.alignment.selection or self.alignment.layers
        return 0 if given and not self.alignment.wait else self.probe.start

    @property
    def max_frames(self) -> int:
        """Longest crop in frames."""
        return max(1, int(self.data.max_seconds * self.grid.frame_rate))

    @property
    def bucket_frames(self) -> tuple[int, ...]:
        """The batch lengths in frames, ascending."""
        n = self.data.buckets
        return tuple(sorted({-(-self.max_frames * (i + 1) // n) for i in range(n)}))

    @property
    def dit(self) -> DiTConfig:
        """Sizes of the network."""
        m = self.model
        return DiTConfig(
            depth=m.depth,
            width=m.width,
            heads=m.heads,
            mels=self.grid.mels,
            cond=m.token_width + self.grid.mels,
            ff_ratio=m.ff_ratio,
            dropout=m.dropout,
            max_frames=max(self.max_frames, 1024),
        )
