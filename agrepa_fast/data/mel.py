"""Log-mel spectrograms and their inverse: waveform [B, S] or [S] to normalised log-mel [B, T, M] or [T, M].

The settings are those of the Vocos mel-24khz vocoder (torchaudio defaults: HTK scale, no filter norm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..fields import Section, between
from .libraries import import_torchaudio

LOG_FLOOR = 1e-5


@dataclass(frozen=True)
class MelConfig(Section, name="mel"):
    """Settings of one mel spectrogram. Lengths in samples, frequencies in Hz.

    `mean` and `std` are of the natural log of the mel magnitude; the features are `(log_mel - mean) / std`.
    """

    centre: ClassVar[float] = 0.0  # of frame 0, in frames

    sample_rate: Annotated[int, between(1000, 384_000), "samples per second; clips are resampled to it"] = 24000
    n_fft: Annotated[int, between(64, 16_384), "samples of a Fourier transform; even"] = 1024
    win_length: Annotated[int, between(32, 16_384), "samples of its Hann window; at most n_fft"] = 1024
    hop_length: Annotated[int, between(16, 8192), "samples between frames; at most half of win_length"] = 256
    mels: Annotated[int, between(1, 1024), "mel bins; at most n_fft // 2 + 1"] = 100
    f_min: Annotated[float, between(0, 192_000), "lowest frequency in Hz"] = 0.0
    f_max: Annotated[float, between(0, 192_000), "highest frequency in Hz; at most sample_rate / 2"] = 12000.0
    # Within these bounds the exponential of a generated mel does not overflow float32.
    mean: Annotated[float, between(-20, 20), "subtracted from the log-mel"] = -5.8843
    std: Annotated[float, between(0.01, 10), "the log-mel is divided by it"] = 2.2615

    def check(self) -> None:
        """Check the sizes against each other.

        Raises:
            UserError: names the fields.
        """
        if self.n_fft % 2:
            raise UserError(f"mel.n_fft: expected an even number, got {self.n_fft}")
        if self.win_length > self.n_fft:
            raise UserError(f"mel.win_length: expected at most mel.n_fft ({self.n_fft}), got {self.win_length}")
        if self.hop_length > self.win_length // 2:
            # Windows that overlap less do not add up to a waveform again.
            raise UserError(
                f"mel.hop_length: expected at most half of mel.win_length ({self.win_length}), got {self.hop_length}"
            )
        if self.mels > self.n_fft // 2 + 1:
            raise UserError(
                f"mel.mels: expected at most the {self.n_fft // 2 + 1} frequencies of mel.n_fft ({self.n_fft}), "
                f"got {self.mels}"
            )
        if not self.f_min < self.f_max <= self.sample_rate / 2:
            raise UserError(
                f"mel.f_min, mel.f_max: expected f_min < f_max <= mel.sample_rate / 2 ({self.sample_rate / 2:g}), "
                f"got f_min {self.f_min:g}, f_max {self.f_max:g}"
            )

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def minimum_samples(self) -> int:
        """The shortest waveform that the centred transform can reflect at its borders."""
        return self.n_fft // 2 + 1

    def frames(self, samples: int) -> int:
        """Number of frames T of a waveform of `samples` samples (centred frames: 1 + samples // hop)."""
        return 1 + samples // self.hop_length

    def samples(self, frames: int) -> int:
        """The largest number of samples that gives `frames` frames."""
        return frames * self.hop_length - 1

    def first_sample(self, frame: int) -> int:
        """The sample on which a frame is centred: that of the crop which begins with it."""
        return frame * self.hop_length


MEL_PRESETS: dict[str, MelConfig] = {
    # mean and std as published with the method; 93.75 frames per second.
    "vocos-24khz": MelConfig(),
    # 62.5 frames per second; mean and std measured over every frame of the built-in corpus (seed 0).
    "compact-16khz": MelConfig(sample_rate=16000, mels=64, f_max=8000.0, mean=-1.54, std=2.676),
}


class LogMel(nn.Module):
    """Normalised log-mel magnitude and its approximate inverse.

    `forward`: waveform [B, S] or [S], any float dtype, to [B, T, M] or [T, M] float32 with T = config.frames(S):
    `(log(max(mel(|STFT|), 1e-5)) - mean) / std`, with the HTK mel scale, no filter norm, a Hann window, and centred
    frames with reflected borders. It is computed in float32, also under autocast.

    Raises:
        UserError: torchaudio is missing. ValueError: a wrong rank, or a waveform shorter than `config.minimum_samples`.
    """

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        torchaudio = import_torchaudio()
        self.config = config
        self.transform = torchaudio.transforms.MelSpectrogram(
            sample_rate=config.sample_rate,
            n_fft=config.n_fft,
            win_length=config.win_length,
            hop_length=config.hop_length,
            f_min=config.f_min,
            f_max=config.f_max,
            n_mels=config.mels,
            power=1.0,
            center=True,
            norm=None,
            mel_scale="htk",
        )
        self.vocoder = torchaudio.transforms.GriffinLim(
            n_fft=config.n_fft,
            win_length=config.win_length,
            hop_length=config.hop_length,
            power=1.0,
            n_iter=64,
            # The phases start at zero, so that the result is the same every time.
            rand_init=False,
        )

    def forward(self, waveform: Tensor) -> Tensor:
        """Waveform [B, S] or [S] to normalised log-mel [B, T, M] or [T, M], float32."""
        if waveform.ndim not in (1, 2):
            raise ValueError(f"waveform must be [S] or [B, S], got shape {tuple(waveform.shape)}")
        if waveform.shape[-1] < self.config.minimum_samples:
            raise ValueError(f"waveform has {waveform.shape[-1]} samples, the mel needs {self.config.minimum_samples}")
        with torch.autocast(waveform.device.type, enabled=False):
            mel = self.transform(waveform.float())
            log_mel = torch.log(mel.clamp_min(LOG_FLOOR))
            return ((log_mel - self.config.mean) / self.config.std).transpose(-1, -2).contiguous()

    @torch.no_grad()
    def inverse(self, mel: Tensor) -> Tensor:
        """Normalised log-mel [T, M] to a waveform [S] float32 with S = (T - 1) * hop. Deterministic.

        The magnitude is the non-negative part of the filter bank's pseudo-inverse, sharpened by the multiplicative
        least-squares update of Lee and Seung (NeurIPS 2000). The phase is Griffin-Lim's.
        """
        if mel.ndim != 2 or mel.shape[1] != self.config.mels:
            raise ValueError(f"mel must be [T, {self.config.mels}], got shape {tuple(mel.shape)}")
        if self.config.hop_length * (mel.shape[0] - 1) < self.config.minimum_samples:
            raise ValueError(f"mel has {mel.shape[0]} frames, too few for one window of {self.config.n_fft}")
        with torch.autocast(mel.device.type, enabled=False):
            target = torch.exp(mel.float() * self.config.std + self.config.mean).T
            bank = self.transform.mel_scale.fb.T
            magnitude = (torch.linalg.pinv(bank) @ target).clamp_min(0) + 1e-8
            numerator = bank.T @ target
            for _ in range(50):
                magnitude = magnitude * numerator / (bank.T @ (bank @ magnitude) + 1e-12)
            return self.vocoder(magnitude)
