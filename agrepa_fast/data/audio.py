"""Reading and writing sound files: any format and rate in, mono float32 [S] at the wanted rate out.

Every way a file can be unusable is a UserError that names the file and the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    import soundfile

# About 3 steps of a 16-bit file (-80 dB of full scale): below it there is nothing to learn from.
SILENCE = 1e-4
# 18 dB above full scale: no mix is as loud, but samples of an integer file that were written as floats are.
LOUDEST = 8.0
CANCELLED = 0.01
# What may be missing of what a header claims: some writers count a few bytes too many.
ENOUGH_SECONDS = 0.01
LONGEST_SECONDS = 360_000
UNKNOWN_SIZE = 0x7FFFF000
LONGEST_OGG_PAGE = 27 + 255 + 255 * 255
# Lines of libsndfile's log about the chunk that holds the samples, in WAV, AIFF, SVX, AU, W64 and RF64.
_CLAIM = re.compile(r"^ *(?:data|SSND|BODY|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
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


class Header(NamedTuple):
    """What a file says of itself before it is decoded."""

    frames: int  # samples of each channel
    rate: int  # Hz
    exact: bool  # whether decoding gives that many; MP3 may only estimate it


def read_header(path: str | Path) -> Header:
    """The header of a sound file, checked against the size of the file.

    UserError as for `read_audio`, as far as it can be told without decoding: missing, empty, unreadable, truncated,
    without samples, at an absurd rate, longer than 100 hours.
    """
    with _opened(Path(path)) as file:
        return _header(Path(path), file)


def read_audio(path: str | Path, sample_rate: int, *, minimum_samples: int = 1, silent: bool = False) -> Tensor:
    """One sound file as mono float32 [S] at `sample_rate` Hz.

    WAV, FLAC, Ogg, MP3 and whatever else libsndfile reads; channels are averaged, or where they cancel out (the
    average has less than 1 % of their power) the loudest is taken; other rates are resampled (windowed sinc; a ratio
    with a denominator beyond 1000 is taken at the nearest ratio below it, off by less than one part in a million).

    UserError when the file is missing, empty, unreadable, truncated, without samples, shorter than `minimum_samples`
    after resampling, holds NaN or infinity, is silent (every |x| < 1e-4; `silent` allows it) or beyond full scale
    (an |x| > 8).
    """
    path = Path(path)
    with _opened(path) as file:
        frames, rate, _ = _header(path, file)
        try:
            samples = file.read(frames, dtype="float32", always_2d=True)
        except (import_soundfile().LibsndfileError, OSError) as error:
            raise UserError(f"{path}: cannot be decoded ({_line(error)})") from error
        except (MemoryError, ValueError) as error:
            # A damaged header can claim any length.
            raise UserError(f"{path}: the header claims more samples than memory holds") from error
    _check_length(path, frames, samples.shape[0], rate)
    waveform = _mono(path, torch.from_numpy(samples), silent)
    if rate != sample_rate:
        ratio = _ratio(sample_rate, rate)
        waveform = import_torchaudio().functional.resample(waveform, ratio.denominator, ratio.numerator)
    check_minimum(path, waveform.shape[0], sample_rate, minimum_samples)
    return waveform.contiguous()


def resampled_length(frames: int, rate: int, sample_rate: int) -> int:
    """How many samples `read_audio` makes of a file's frames."""
    if rate == sample_rate:
        return frames
    ratio = _ratio(sample_rate, rate)
    # In float32, as torchaudio has it: it differs from exact arithmetic in files of 17 minutes and more.
    return int(torch.ceil(torch.as_tensor(ratio.numerator * frames / ratio.denominator)).long())


def check_minimum(path: Path, samples: int, sample_rate: int, minimum_samples: int) -> None:
    """UserError when a clip has too few samples."""
    if samples < minimum_samples:
        raise UserError(f"{path}: too short ({samples} samples at {sample_rate} Hz, {minimum_samples} needed)")


def _ratio(sample_rate: int, rate: int) -> Fraction:
    return Fraction(sample_rate, rate).limit_denominator(1000)


@contextmanager
def _opened(path: Path) -> Iterator[soundfile.SoundFile]:
    library = import_soundfile()
    if not path.exists():
        raise UserError(f"{path}: no such audio file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path}: the file is empty (0 bytes)")
        # As bytes: soundfile cannot encode a name that is not UTF-8.
        file = library.SoundFile(os.fsencode(path))
    except (library.LibsndfileError, OSError, TypeError) as error:
        # soundfile raises TypeError for header-less formats, which need settings that a file cannot give.
        raise UserError(f"{path}: cannot be decoded ({_line(error)})") from error
    with file:
        yield file


def _header(path: Path, file: soundfile.SoundFile) -> Header:
    frames, rate = file.frames, file.samplerate
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UserError(f"{path}: sample rate {rate} Hz is outside {LOWEST_RATE} to {HIGHEST_RATE}")
    if frames > LONGEST_SECONDS * rate:
        raise UserError(
            f"{path}: its header claims {frames / rate / 3600:.3g} hours of sound: it is damaged or was written to a "
            "pipe, write it again"
        )
    if file.format == "OGG" and _cut_ogg(path):
        raise UserError(f"{path}: truncated (its last page is cut off)")
    claimed = _nist_frames(path) if file.format == "NIST" else round(frames * _claimed_share(file.extra_info))
    _check_length(path, claimed, frames, rate)
    if frames == 0:
        raise UserError(f"{path}: holds no samples")
    return Header(frames, rate, exact="MPEG" not in file.subtype)


def _check_length(path: Path, claimed: int, frames: int, rate: int) -> None:
    if claimed - frames > ENOUGH_SECONDS * rate:
        raise UserError(f"{path}: truncated ({frames / rate:.2f} s of the {claimed / rate:.2f} s in its header)")


def _claimed_share(log: str) -> float:
    """How many times the sound in the file its header claims. libsndfile notes it in its log, and cuts the claim."""
    found = _CLAIM.search(log)
    if found is None:
        return 1.0
    claimed, real = int(found[1]), int(found[2])
    # A program that writes to a pipe cannot know the size: 0xffffffff (ffmpeg) or 0x7ffff000 and more (SoX).
    return claimed / max(real, 1) if real < claimed < UNKNOWN_SIZE else 1.0


def _nist_frames(path: Path) -> int:
    """Frames that the text header of a NIST SPHERE file claims, 0 where it does not say."""
    with open(path, "rb") as file:
        found = re.search(rb"^sample_count -i (\d+)", file.read(1024), re.MULTILINE)
    return int(found[1]) if found else 0


def _cut_ogg(path: Path) -> bool:
    """Whether the last page is longer than what is left of the file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_OGG_PAGE))
        tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    header = 27
    return len(page) < header or len(page) < header + page[26] + sum(page[header : header + page[26]])


def _mono(path: Path, channels: Tensor, silent: bool) -> Tensor:
    """[S, C] to [S]. Checked before resampling, which would smear one bad sample over its neighbours."""
    if not bool(torch.isfinite(channels).all()):
        raise UserError(f"{path}: holds NaN or infinite samples")
    peaks = channels.abs().amax(0)
    loudest = float(peaks.max())
    if loudest < SILENCE and not silent:
        raise UserError(f"{path}: silent (no sample reaches {SILENCE:g})")
    if loudest > LOUDEST:
        raise UserError(f"{path}: beyond full scale (a sample of {loudest:g}): divide the samples, 1 is full scale")
    waveform = channels.mean(dim=1)
    if channels.shape[1] > 1:
        power = channels.square().mean(0)
        if float(waveform.square().mean()) < CANCELLED * float(power.mean()):
            return channels[:, int(power.argmax())]
    return waveform


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
        soundfile.write(os.fsencode(path), samples.clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16", format="WAV")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{path}: cannot write the audio ({_line(error)})") from error


def _line(error: BaseException) -> str:
    """The first line of an error, so that the message stays one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
