"""The whole configuration of a run, and the checks that concern several sections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...alignment.policy import POLICIES
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
        self._check_frames()
        self._check_alignment()

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

    def _check_frames(self) -> None:
        mel, seconds = self.mel, self.data.max_seconds
        grid = f"mel.hop_length {mel.hop_length} at mel.sample_rate {mel.sample_rate}"
        if mel.samples(self.max_frames) < mel.minimum_samples:
            frames = math.ceil((mel.minimum_samples + 1) / mel.hop_length)
            least = math.ceil(frames / mel.frame_rate * 1e4) / 1e4  # rounded up, so that it is enough
            raise UserError(
                f"data.max_seconds: expected at least {least} (half of mel.n_fft {mel.n_fft}, in frames of {grid}), "
                f"got {seconds:g}"
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
        stop = math.ceil(alignment.stop * self.train.steps)
        start = 0 if alignment.selection or alignment.layers else probe.start
        if alignment.enabled and start >= stop:
            raise UserError(
                f"probe.start: the selection comes at step {start}, but alignment stops at {stop} "
                f"(alignment.stop {alignment.stop:g} of train.steps {self.train.steps}): probe earlier or train longer"
            )

    @property
    def max_frames(self) -> int:
        """Longest crop in mel frames."""
        return max(1, int(self.data.max_seconds * self.mel.frame_rate))

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
            mels=self.mel.mels,
            cond=m.token_width + self.mel.mels,
            ff_ratio=m.ff_ratio,
            dropout=m.dropout,
            max_frames=max(self.max_frames, 1024),
        )
