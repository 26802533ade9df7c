"""Reading and writing sound files: any format and rate in, mono float32 [S] at the wanted rate out.

Every way a file can be unusable is a UserError that names the file and the reason.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..errors import UserError

# About 3 steps of a 16-bit file (-80 dB of full scale): below it there is nothing to learn from.
SILENCE = 1e-4
LOWEST_RATE, HIGHEST_RATE = 2000, 768000


def import_torchaudio() -> ModuleType:
    """torchaudio, imported on first use. UserError when it is missing or does not fit this torch."""
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError) as error:
        # A torchaudio built for another CUDA than torch raises OSError or RuntimeError on import.
        raise UserError(f"torchaudio cannot be imported ({_line(error)}): install agrepa-fast[audio]") from error
    return torchaudio


def import_soundfile() -> ModuleType:
    """soundfile, imported on first use. UserError when it or its C library is missing."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise UserError(f"soundfile cannot be imported ({_line(error)}): install agrepa-fast[audio]") from error
    return soundfile


def read_audio(path: str | Path, sample_rate: int, *, minimum_samples: int = 1) -> Tensor:
    """One sound file as mono float32 [S] at `sample_rate` Hz.

    WAV, FLAC, Ogg, MP3 and whatever else libsndfile reads; channels are averaged; other rates are resampled
    (windowed sinc; a ratio with a denominator beyond 1000 is taken at the nearest ratio below it, off by
    less than one part in a million).

    UserError when the file is missing, empty, unreadable, without samples, shorter than `minimum_samples`
    after resampling, holds NaN or infinity, or is silent (every |x| < 1e-4).
    """
    soundfile = import_soundfile()
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such audio file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes)")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        # soundfile raises TypeError for header-less formats, which need settings that a file cannot give.
        raise UserError(f"{path}: cannot be decoded ({_line(error)})") from error
    except (MemoryError, ValueError) as error:
        # A damaged header can claim any length.
        raise UserError(f"{path}: the header claims more samples than memory holds") from error
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UserError(f"{path}: sample rate {rate} Hz is outside {LOWEST_RATE} to {HIGHEST_RATE}")
    if samples.shape[0] == 0:
        raise UserError(f"{path}: holds no samples")
    waveform = torch.from_numpy(samples).mean(dim=1)
    # Checked before resampling, which would smear one bad sample over its neighbours.
    if not bool(torch.isfinite(waveform).all()):
        raise UserError(f"{path}: holds NaN or infinite samples")
    if float(waveform.abs().max()) < SILENCE:
        raise UserError(f"{path}: silent (no sample reaches {SILENCE:g})")
    if rate != sample_rate:
        ratio = Fraction(sample_rate, rate).limit_denominator(1000)
        functional = import_torchaudio().functional
        waveform = functional.resample(waveform, ratio.denominator, ratio.numerator)
    if waveform.shape[0] < minimum_samples:
        raise UserError(
            f"{path}: too short ({waveform.shape[0]} samples at {sample_rate} Hz, {minimum_samples} needed)"
        )
    return waveform.contiguous()


def write_audio(path: str | Path, waveform: Tensor, sample_rate: int) -> None:
    """Write [S] floats as a 16-bit PCM WAV, clipped to [-1, 1].

    ValueError for a wrong shape or NaN, UserError when the file cannot be written."""
    soundfile = import_soundfile()
    if waveform.ndim != 1:
        raise ValueError(f"waveform must be [S], got shape {tuple(waveform.shape)}")
    samples = waveform.detach().float().cpu()
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"waveform for {path} holds NaN or infinite samples")
    try:
        soundfile.write(Path(path), samples.clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16", format="WAV")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{path}: cannot write the audio ({_line(error)})") from error


def _line(error: BaseException) -> str:
    """The first line of an error, so that the message stays one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
