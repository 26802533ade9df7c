"""The teacher "spectral": cepstra and their changes, audio [B, n] -> [B, ceil(n/320), 60] at 50 Hz.

It has no weights to download. Its features are good enough to tell speech sounds from everyday sounds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.libraries import import_torchaudio
from .base import Teacher

SAMPLE_RATE = 16_000
WINDOW = 400  # 25 ms
HOP = 320  # 20 ms
N_FFT = 512
MELS = 40
COEFFICIENTS = 20
# Power below this is silence: about 60 dB under the bins of loud speech, and above the noise of 16-bit audio.
FLOOR = 1e-6

# Mean and standard deviation of each channel of `SpectralTeacher.unscaled`, over the 15,000 frames of the 240
# clips of the built-in corpus (`agrepa_fast.data.corpus.write_corpus(folder, seed=0)`, recipe 1). Fixed from
# then on: changing them changes every feature.
# fmt: off
MEAN: tuple[float, ...] = (
    -37.33, 10.13, -4.277, -0.848, -0.5707, -1.398, -0.7938, -0.4033, -0.2118, -0.2269,
    0.06942, 0.4237, -0.2826, -0.01483, -0.009769, -0.144, -0.05243, -0.07098, -0.1498, 0.06546,
    3.193, 1.99, 1.02, 0.784, 0.6159, 0.5351, 0.5546, 0.4798, 0.3588, 0.355,
    0.3704, 0.3905, 0.3816, 0.3349, 0.3124, 0.3163, 0.2998, 0.2699, 0.2444, 0.2264,
    1.323, 0.8278, 0.4432, 0.3278, 0.2708, 0.2347, 0.246, 0.208, 0.1536, 0.1568,
    0.1643, 0.1752, 0.1692, 0.1496, 0.1393, 0.1433, 0.136, 0.1236, 0.1081, 0.1009,
)
STD: tuple[float, ...] = (
    25.62, 16.91, 9.523, 6.117, 5.349, 4.124, 3.991, 3.145, 2.54, 2.039,
    2.453, 2.808, 2.633, 2.195, 2.101, 2.114, 1.854, 1.64, 1.564, 1.475,
    4.661, 3.151, 1.237, 0.9766, 0.828, 0.6732, 0.7339, 0.6232, 0.4324, 0.4016,
    0.5359, 0.6431, 0.7052, 0.6707, 0.6159, 0.5509, 0.4968, 0.4148, 0.3701, 0.3052,
    1.711, 1.203, 0.5129, 0.39, 0.377, 0.2982, 0.3255, 0.2672, 0.175, 0.1804,
    0.2395, 0.2891, 0.3045, 0.3072, 0.2882, 0.264, 0.2413, 0.2038, 0.1723, 0.148,
)
# fmt: on


class SpectralTeacher(Teacher):
    """Twenty mel-frequency cepstral coefficients with the size of their first and second differences.

    16 kHz, Hann window of 25 ms, hop 20 ms, 40 HTK mel bands up to 8 kHz, log, orthonormal DCT-II with coefficient 0
    (the loudness). Frame i is centred at (i + 0.5) * 20 ms. Channels: 0-19 cepstra, 20-39 |delta|, 40-59 |delta of
    delta|. A delta is the regression slope over five frames, `sum_k k c[i+k] / 10` for k in -2..2; the first and the
    last frame of the clip are repeated beyond its ends.

    The differences are absolute values: over a clip, signed ones sum to almost nothing (last minus first), and absolute
    ones to how much each coefficient changes. So a frame does not tell whether it rises or falls.

    Every channel is shifted and scaled by a fixed mean and standard deviation (`MEAN`, `STD`). Otherwise the loudness
    would decide the cosine, and two unrelated clips would be near 1.

    Raises:
        UserError: torchaudio is not installed, or does not fit torch.
    """

    def __init__(self) -> None:
        super().__init__("spectral", width=3 * COEFFICIENTS, rate=SAMPLE_RATE / HOP, sample_rate=SAMPLE_RATE)
        functional = import_torchaudio().functional
        bank = functional.melscale_fbanks(N_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, MELS, SAMPLE_RATE)
        self.window: Tensor
        self.bank: Tensor
        self.dct: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("dct", functional.create_dct(COEFFICIENTS, MELS, "ortho"), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)
        self.freeze()

    def encode(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `Teacher.encode`. T' is ceil(n/320); a frame is valid if it begins before the clip ends."""
        features, mask = self.unscaled(audio, lengths)
        return (features - self.mean) / self.std, mask

    def unscaled(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The features before `MEAN` and `STD` are applied, which were measured on these. Shapes as in `encode`."""
        frames = max(1, math.ceil(audio.shape[1] / HOP))
        # Frame i looks at N_FFT samples around its centre, HOP * i + HOP / 2.
        before = (N_FFT - HOP) // 2
        after = (frames - 1) * HOP + N_FFT - before - audio.shape[1]
        spectrum = torch.stft(
            torch.nn.functional.pad(audio, (before, after)),
            N_FFT,
            HOP,
            WINDOW,
            self.window,
            center=False,
            return_complex=True,
        )
        power = spectrum.abs().square().transpose(1, 2)
        cepstra = (power @ self.bank).clamp_min(FLOOR).log() @ self.dct
        valid = -(-lengths // HOP)
        last = (valid - 1).clamp_min(0)
        delta = _slope(cepstra, last)
        features = torch.cat([cepstra, delta.abs(), _slope(delta, last).abs()], dim=-1)
        return features, torch.arange(frames, device=audio.device) < valid.unsqueeze(1)


def _slope(values: Tensor, last: Tensor) -> Tensor:
    """Regression slope over five frames of values [B, T, C]. Frame 0 and frame `last` [B] are repeated outward."""
    frame = torch.arange(values.shape[1], device=values.device)

    def shifted(by: int) -> Tensor:
        index = torch.minimum((frame + by).clamp_min(0).unsqueeze(0), last.unsqueeze(1))
        return values.take_along_dim(index.unsqueeze(-1), dim=1)

    return (shifted(1) - shifted(-1) + 2 * (shifted(2) - shifted(-2))) / 10
