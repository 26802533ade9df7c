"""Mel-cepstral distortion and log-mel distance between a clip and its reference, frame by frame.

log-mel m [T, B]: natural logarithm of 80 HTK mel magnitudes at 16 kHz (window 1024, hop 256). The cepstrum
c_k = (2 / B) sum_b m_b cos(pi k (b + 1/2) / B) is that of m = c_0 / 2 + sum_k c_k cos(...).

MCD = (10 / ln 10) mean_t sqrt(2 sum_{k=1..13} (c_k - c'_k)^2) in dB (Kubichek, 1993); c_0, the loudness, is left out.
Log-mel distance = mean over frames and bands of |m - m'|. Frames are compared in order, without warping.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.mel import LogMel, MelConfig
from ..errors import UserError
from .metric import Metric
from .recordings import Recording

CEPSTRA = 13
TOLERANCE = 0.05  # seconds by which durations may differ: a few hops of the spectrograms involved
MEL = MelConfig(sample_rate=16_000, mels=80, f_max=8000.0, mean=0.0, std=1.0)


def cepstrum(log_mel: Tensor, count: int = CEPSTRA) -> Tensor:
    """[T, B] to the coefficients 1 to `count`, [T, count]."""
    bands = log_mel.shape[1]
    k = torch.arange(1, count + 1, dtype=torch.float64).unsqueeze(1)
    b = torch.arange(bands, dtype=torch.float64)
    basis = torch.cos(math.pi * k * (b + 0.5) / bands).to(log_mel.dtype)
    return 2 / bands * log_mel @ basis.T


def mel_cepstral_distortion(log_mel: Tensor, reference: Tensor) -> Tensor:
    """MCD in dB of two natural log-mel spectrograms [T, B] of one length."""
    difference = cepstrum(log_mel) - cepstrum(reference)
    return 10 / math.log(10) * (2 * difference.square().sum(1)).sqrt().mean()


class SpectralDistance(Metric):
    """MCD in dB and log-mel distance of clips that last as long as their reference."""

    key = "spectral"
    title = "Mel-cepstral distortion and log-mel distance"
    tool = "13 cepstra of 80 log-mel bands at 16 kHz, without warping"
    columns = {"MCD (dB)": "lower", "log-mel": "lower"}  # noqa: RUF012
    paired = True
    note = (
        "Only for clips that last as long as their reference. Comparable with other numbers of this table, not with "
        "those of tools that take their cepstra from another analysis or warp the time."
    )

    def __init__(self) -> None:
        self._log_mel = LogMel(MEL)

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        """[2]: MCD and log-mel distance."""
        assert reference is not None
        lengths = waveform.numel(), reference.numel()
        if abs(lengths[0] - lengths[1]) > TOLERANCE * self.sample_rate:
            seconds = [length / self.sample_rate for length in lengths]
            raise UserError(f"lasts {seconds[0]:.2f} s, its reference {seconds[1]:.2f} s")
        samples = min(lengths)
        if samples < MEL.minimum_samples:
            raise UserError(f"shorter than one window ({samples / self.sample_rate:.3f} s)")
        a, b = (self._log_mel(sound[:samples]).double() for sound in (waveform, reference))
        return torch.stack([mel_cepstral_distortion(a, b), (a - b).abs().mean()])
