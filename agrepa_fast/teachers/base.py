"""The base class of teachers: audio [B, n] -> features [B, T', width] at `rate` Hz.

A teacher is frozen. Keep it beside the student, never inside it, so that no checkpoint carries its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.libraries import import_torchaudio
from ..errors import UserError


class Teacher(nn.Module):
    """A frozen audio encoder. A subclass sets the numbers below and writes `encode`.

    A teacher stays in eval mode, also when `train()` is called: a parent module that switches itself to training would
    otherwise switch on the teacher's dropout, layerdrop and SpecAugment.

    Args:
        name: its name in logs and metrics.
        width: channels of a feature frame.
        rate: feature frames per second; frame i stands for the time from i/rate to (i+1)/rate.
        sample_rate: the rate in Hz of the audio that `encode` receives.
        longest: seconds of the longest clip that it takes; None: any length.
    """

    grain: int = 1  # frames that come out together: pieces of a recording hold a multiple of it

    def __init__(self, name: str, *, width: int, rate: float, sample_rate: int, longest: float | None = None) -> None:
        super().__init__()
        self.name = name
        self.width = width
        self.rate = rate
        self.sample_rate = sample_rate
        self.longest = longest
        self.training = False

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever `mode` is. Returns self."""
        super().train(False)
        return self

    def freeze(self) -> Teacher:
        """Switch to eval mode and let no parameter take a gradient. Returns self. `build_teacher` calls it."""
        self.requires_grad_(False)
        return self.train(False)

    def encode(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a padded batch; called under no_grad and without autocast.

        Args:
            audio: [B, n] float32 at `self.sample_rate`, exactly zero from `lengths` on.
            lengths: [B] int64 samples at `self.sample_rate`, each at most n.

        Returns:
            features [B, T', width] floating point, and mask [B, T'] bool, True where a frame carries audio.
            A sample's valid frames must not depend on its padding or on the other samples.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define encode(audio, lengths)")

    @property
    def encoder(self) -> nn.Module:
        """What does the work. Teachers with the same encoder can share a pass (`forward_layers`)."""
        return self

    def encode_layers(self, teachers: Sequence[Teacher], audio: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`encode` for each of several teachers with this one's encoder, in one pass of it."""
        return [teacher.encode(audio, lengths) for teacher in teachers]

    def forward(self, audio: Tensor, lengths: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
        """Resample to the teacher's rate and encode; see `forward_layers`."""
        return self.forward_layers([self], audio, lengths, sample_rate)[0]

    def forward_layers(
        self, teachers: Sequence[Teacher], audio: Tensor, lengths: Tensor, sample_rate: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Resample to the teacher's rate and encode, for each of several teachers with this one's encoder.

        Args:
            audio: [B, n] floating point in [-1, 1]; what lies past a sample's length is ignored.
            lengths: [B] integer, samples at `sample_rate`.
            sample_rate: Hz of `audio`.

        Returns:
            For each teacher features [B, T', width] float32, zero where not valid, without gradient; mask [B, T']
            bool.

        Raises:
            ValueError: wrong shapes, dtypes or lengths.
            UserError: a rate other than the teacher's, and torchaudio is not installed or does not fit torch.
        """
        if audio.ndim != 2 or not audio.is_floating_point():
            raise ValueError(f"audio must be [B, n] floating point, got {list(audio.shape)} {audio.dtype}")
        if lengths.shape != audio.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"lengths must be [{audio.shape[0]}] integers, got {list(lengths.shape)} {lengths.dtype}")
        # Not on a GPU: there the check would wait for the device.
        if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > audio.shape[1])).any()):
            raise ValueError(f"lengths must lie in 0..{audio.shape[1]}, got {lengths.tolist()}")
        # `teacher.model.train()` does not call our train().
        self.train(False)
        lengths = lengths.to(audio.device, torch.int64)
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            audio = _silence_padding(audio.float(), lengths)
            if sample_rate != self.sample_rate:
                audio, lengths = resample_audio(audio, lengths, sample_rate, self.sample_rate)
            results = self.encode_layers(teachers, audio, lengths)
            return [(torch.where(mask.unsqueeze(-1), features.float(), 0.0), mask) for features, mask in results]


class LayeredTeacher(Teacher):
    """A teacher whose features are a hidden state of an encoder. Teachers of several layers share the encoder's pass.

    A subclass keeps the encoder in `self.model` and writes `encode_states`.

    Args:
        layers: how many blocks the encoder has.
        layer: index into its hidden states: 0 is the input of the first block, k the output of block k - 1; negative
            counts from the end. None: the encoder's final output.

    Raises:
        UserError: there is no such layer.
    """

    def __init__(self, name: str, *, layers: int, layer: int | None, **sizes: Any) -> None:
        super().__init__(name, **sizes)
        self.layers = layers
        self.layer = layer
        check_layer(name, layer, layers)

    @property
    def encoder(self) -> nn.Module:
        """The model that all layers come from."""
        return self.get_submodule("model")

    def at_layer(self, layer: int | None) -> LayeredTeacher:
        """A teacher with the same encoder and another layer. UserError: there is no such layer."""
        check_layer(self.name, layer, self.layers)
        other = copy.copy(self)
        other.layer = layer
        return other

    def encode_states(self, audio: Tensor, lengths: Tensor, layers: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """As `encode`, with the features of several layers beside each other: [B, T', len(layers) * width]."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode_states(audio, lengths, layers)")

    def encode(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `Teacher.encode`."""
        return self.encode_states(audio, lengths, [self.layer])

    def encode_layers(self, teachers: Sequence[Teacher], audio: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See `Teacher.encode_layers`."""
        layers = [teacher.layer for teacher in teachers if isinstance(teacher, LayeredTeacher)]
        features, mask = self.encode_states(audio, lengths, layers)
        return [(part, mask) for part in features.split(self.width, -1)]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of an option. UserError where there is none of that name."""
    if name not in DTYPES:
        raise UserError(f"teacher dtype {name!r}: choose {', '.join(DTYPES)}")
    return DTYPES[name]


def check_layer(name: str, layer: int | None, count: int) -> None:
    """UserError unless `layer` is None or a hidden state of an encoder of `count` blocks."""
    if layer is not None and not -count - 1 <= layer <= count:
        raise UserError(f"teacher {name!r}: layer {layer} does not exist; hidden states are numbered 0 to {count}")


def _silence_padding(audio: Tensor, lengths: Tensor) -> Tensor:
    inside = torch.arange(audio.shape[1], device=audio.device) < lengths.unsqueeze(1)
    return torch.where(inside, audio, 0.0)


def resample_audio(audio: Tensor, lengths: Tensor, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Resample a padded batch from `source` to `target` Hz by a windowed sinc (torchaudio's defaults).

    Args:
        audio: [B, n] float32, zero in the padding.
        lengths: [B] int64 samples.

    Returns:
        audio [B, ceil(n target / source)] and lengths ceil(length target / source). The ringing of the filter behind a
        sample's end is cut, so that the sample is as it would be alone.

    Raises:
        UserError: torchaudio is not installed, or does not fit torch.
    """
    resample = import_torchaudio().functional.resample
    lengths = -(-lengths * target // source)
    return _silence_padding(resample(audio, source, target), lengths), lengths
