"""Read sound files of any format and rate as mono float32 [S] at a given rate, and write WAV files.

A file that cannot be used raises a UserError that names the file and the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .libraries import first_line, import_soundfile
from .packs import Pack, open_sound
from .resampling import resample, resampled_length

if TYPE_CHECKING:
    import soundfile

# About 3 steps of a 16-bit file (-80 dB of full scale). A file whose samples are all below it is silent.
SILENCE = 1e-4
# 18 dB above full scale. No mix is as loud; integer samples that were written as floats are.
LOUDEST = 8.0
CANCELLED = 0.01
AVERAGE = -1  # a mix of all channels
# In these formats, what is read after a seek has the bits of the same samples when the whole file is decoded.
SEEKABLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG")
# A file may be shorter than its header claims by this much, because some writers count a few bytes too many.
ENOUGH_SECONDS = 0.01
LONGEST_SECONDS = 360_000
UNKNOWN_SIZE = 0x7FFFF000
LONGEST_OGG_PAGE = 27 + 255 + 255 * 255
# Lines of libsndfile's log about the chunk that holds the samples, in WAV, AIFF, SVX, AU, W64 and RF64.
_CLAIM = re.compile(r"^ *(?:data|SSND|BODY|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
LOWEST_RATE, HIGHEST_RATE = 2000, 768000


class Header(NamedTuple):
    """The header of a sound file, read without decoding."""

    frames: int  # samples of each channel
    rate: int  # Hz
    exact: bool  # whether decoding gives exactly so many frames; the header of an MP3 may only estimate them


def read_header(path: str | Path, pack: Pack | None = None) -> Header:
    """The header of a sound file, checked against the size of the file. pack: where the file lies in a larger one.

    Raises:
        UserError: as `read_audio`, as far as it shows without decoding: missing, empty, unreadable, truncated, without
            samples, at an absurd rate, longer than 100 hours.
    """
    with _opened(Path(path), pack) as file:
        return _header(Path(path), pack, file)


def read_audio(
    path: str | Path,
    sample_rate: int,
    *,
    minimum_samples: int = 1,
    silent: bool = False,
    pack: Pack | None = None,
) -> Tensor:
    """One sound file as mono float32 [S] at `sample_rate` Hz. pack: where the file lies in a larger one.

    Reads WAV, FLAC, Ogg, MP3 and the other formats of libsndfile. Channels are averaged; if they cancel out (the
    average has less than 1 % of their power), the loudest one is taken. Other rates are resampled by a windowed sinc
    (`resampling`).

    Raises:
        UserError: the file is missing, empty, unreadable, truncated, without samples, shorter than `minimum_samples`
            after resampling, holds NaN or infinity, is silent (every |x| < 1e-4; `silent` allows it) or
            beyond full scale (an |x| > 8).
    """
    return read_sound(path, sample_rate, minimum_samples=minimum_samples, silent=silent, pack=pack).waveform


class Sound(NamedTuple):
    """A decoded file, and how its channels were mixed: `AVERAGE`, or the number of the channel that was taken."""

    waveform: Tensor
    mix: int


def read_sound(
    path: str | Path, sample_rate: int, *, minimum_samples: int = 1, silent: bool = False, pack: Pack | None = None
) -> Sound:
    """`read_audio`, with the mix."""
    path = Path(path)
    with _opened(path, pack) as file:
        frames, rate, _ = _header(path, pack, file)
        samples = _decoded(path, file, frames)
    _check_length(path, frames, samples.shape[0], rate)
    if _loudest(path, samples) < SILENCE and not silent:
        raise UserError(f"{path}: silent (no sample reaches {SILENCE:g})")
    mix = _mix(samples)
    mono = _mono(samples, mix)
    waveform = resample(lambda first, last: mono[first:last], len(mono), rate, sample_rate)
    check_minimum(path, waveform.shape[0], sample_rate, minimum_samples)
    return Sound(waveform.contiguous(), mix)


def read_part(
    path: Path,
    sample_rate: int,
    start: int,
    stop: int,
    *,
    length: int,
    mix: int | None = None,
    pack: Pack | None = None,
) -> Tensor | None:
    """Samples start to stop - 1 of what `read_audio` gives, with the same bits, without decoding the rest.

    length: of the whole, in samples. mix: that of `read_sound`, for a file of several channels.

    Returns:
        None where `read_audio` must decide: the file has another length, the part is silent, which an error is only if
        all of the file is, the mix of its channels is not known, or its format does not seek to a sample.

    Raises:
        UserError: as `read_audio`, for what the part shows.
    """
    with _opened(path, pack) as file:
        frames, rate, _ = _header(path, pack, file)
        mix = 0 if file.channels == 1 else mix
        seekable = file.format in SEEKABLE and file.seekable()
        if mix is None or not seekable or resampled_length(frames, rate, sample_rate) != length:
            return None
        chosen, doubtful = mix, False

        def read(first: int, last: int) -> Tensor:
            nonlocal doubtful
            samples = _decoded(path, file, last - first, first)
            doubtful = len(samples) < last - first or _loudest(path, samples) < SILENCE
            return _mono(samples, chosen)

        part = resample(read, frames, rate, sample_rate, start, stop)
    return None if doubtful else part.contiguous()


def check_minimum(path: Path, samples: int, sample_rate: int, minimum_samples: int) -> None:
    """Raise a UserError if a clip has too few samples."""
    if samples < minimum_samples:
        raise UserError(f"{path}: too short ({samples} samples at {sample_rate} Hz, {minimum_samples} needed)")


@contextmanager
def _opened(path: Path, pack: Pack | None) -> Iterator[soundfile.SoundFile]:
    library = import_soundfile()
    if pack is None and not path.exists():
        raise UserError(f"{path}: no such audio file")
    if pack is None and not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        size = path.stat().st_size if pack is None else pack.size
        if size == 0:
            raise UserError(f"{path}: the file is empty (0 bytes)")
        # Pass the name as bytes: soundfile cannot encode a name that is not UTF-8.
        file = library.SoundFile(os.fsencode(path) if pack is None else open_sound(path, pack))
    except (library.LibsndfileError, OSError, TypeError) as error:
        # soundfile raises TypeError for header-less formats, which need settings that a file cannot give.
        raise UserError(f"{path}: cannot be decoded ({first_line(error)})") from error
    with file:
        yield file


def _header(path: Path, pack: Pack | None, file: soundfile.SoundFile) -> Header:
    frames, rate = file.frames, file.samplerate
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UserError(f"{path}: sample rate {rate} Hz is outside {LOWEST_RATE} to {HIGHEST_RATE}")
    if frames > LONGEST_SECONDS * rate:
        raise UserError(
            f"{path}: its header claims {frames / rate / 3600:.3g} hours of sound: it is damaged or was written to a "
            "pipe, write it again"
        )
    if file.format == "OGG" and _cut_ogg(path, pack):
        raise UserError(f"{path}: truncated (its last page is cut off)")
    claimed = _nist_frames(path, pack) if file.format == "NIST" else round(frames * _claimed_share(file.extra_info))
    _check_length(path, claimed, frames, rate)
    if frames == 0:
        raise UserError(f"{path}: holds no samples")
    return Header(frames, rate, exact="MPEG" not in file.subtype)


def _check_length(path: Path, claimed: int, frames: int, rate: int) -> None:
    if claimed - frames > ENOUGH_SECONDS * rate:
        raise UserError(f"{path}: truncated ({frames / rate:.2f} s of the {claimed / rate:.2f} s in its header)")


def _claimed_share(log: str) -> float:
    """The length that the header claims, as a multiple of the sound in the file.

    libsndfile writes it into its log, and then reads only what is there.
    """
    match = _CLAIM.search(log)
    if match is None:
        return 1.0
    claimed, real = int(match[1]), int(match[2])
    # A program that writes to a pipe cannot know the size: 0xffffffff (ffmpeg) or 0x7ffff000 and more (SoX).
    return claimed / max(real, 1) if real < claimed < UNKNOWN_SIZE else 1.0


def _nist_frames(path: Path, pack: Pack | None) -> int:
    """The number of frames that the text header of a NIST SPHERE file claims; 0 if it gives none."""
    with open_sound(path, pack) as file:
        match = re.search(rb"^sample_count -i (\d+)", file.read(1024), re.MULTILINE)
    return int(match[1]) if match else 0


def _cut_ogg(path: Path, pack: Pack | None) -> bool:
    """Whether the last page is longer than what is left of the file."""
    with open_sound(path, pack) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LONGEST_OGG_PAGE))
        tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    header = 27
    return len(page) < header or len(page) < header + page[26] + sum(page[header : header + page[26]])


def _decoded(path: Path, file: soundfile.SoundFile, count: int, start: int = 0) -> Tensor:
    """`count` frames [S, C] of an open file, or fewer if it has fewer."""
    try:
        if start:
            file.seek(start)
        return torch.from_numpy(file.read(count, dtype="float32", always_2d=True))
    except (import_soundfile().LibsndfileError, OSError) as error:
        raise UserError(f"{path}: cannot be decoded ({first_line(error)})") from error
    except (MemoryError, ValueError) as error:
        # A damaged header can claim any length.
        raise UserError(f"{path}: the header claims more samples than memory holds") from error


def _loudest(path: Path, channels: Tensor) -> float:
    """The largest |x| of [S, C], checked before resampling spreads a bad sample over its neighbours."""
    if not bool(torch.isfinite(channels).all()):
        raise UserError(f"{path}: holds NaN or infinite samples")
    loudest = float(channels.abs().max()) if channels.numel() else 0.0
    if loudest > LOUDEST:
        raise UserError(f"{path}: beyond full scale (a sample of {loudest:g}): divide the samples, 1 is full scale")
    return loudest


def _mix(channels: Tensor) -> int:
    """How to mix [S, C]: AVERAGE, or the loudest channel where the channels cancel out."""
    if channels.shape[1] == 1:
        return 0
    power = channels.square().mean(0)
    cancelled = float(channels.mean(dim=1).square().mean()) < CANCELLED * float(power.mean())
    return int(power.argmax()) if cancelled else AVERAGE


def _mono(channels: Tensor, mix: int) -> Tensor:
    return channels.mean(dim=1) if mix == AVERAGE else channels[:, mix]


def write_audio(path: str | Path, waveform: Tensor, sample_rate: int) -> None:
    """Write [S] floats as a 16-bit PCM WAV, clipped to [-1, 1].

    Raises:
        ValueError: a wrong shape or NaN. UserError: the file cannot be written.
    """
    soundfile = import_soundfile()
    if waveform.ndim != 1:
        raise ValueError(f"waveform must be [S], got shape {tuple(waveform.shape)}")
    samples = waveform.detach().float().cpu()
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"waveform for {path} holds NaN or infinite samples")
    try:
        soundfile.write(os.fsencode(path), samples.clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16", format="WAV")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{path}: cannot write the audio ({first_line(error)})") from error
