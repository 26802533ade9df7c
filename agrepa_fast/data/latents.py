"""Latents of a codec in place of mels: [T, C] per clip, computed beforehand, at a fixed rate of frames per second.

Frame j covers the audio from j / rate to (j + 1) / rate seconds. The audio stays at hand: teachers hear it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..fields import Allowed, Section, between
from .clip import Clip
from .npy import read_npy
from .packs import Pack, open_sound

SUFFIXES = (".npy", ".safetensors")
NAME = "latents"  # of the tensor in a safetensors file that holds several, and part of the name of a file beside audio
# Codecs pad, and round the last frame up or down.
EDGE_FRAMES = 2
EDGE_SHARE = 0.005
DECODER = Allowed("module:function", lambda name: not name or (name.count(":") == 1 and _is_dotted(name)))
STD = Annotated[float, between(1e-30, 1e30)]


@dataclass(frozen=True)
class LatentConfig(Section, name="latents"):
    """Latents in place of mels, where `data.latents` says where they are; `mel.sample_rate` stays the audio's rate."""

    rate: Annotated[float, between(0, 10_000), "frames per second; 0: there are no latents"] = 0.0
    channels: Annotated[int, between(0, 4096), "channels of a frame; 0: there are no latents"] = 0
    mean: Annotated[
        tuple[Annotated[float, between(-1e30, 1e30)], ...],
        "mean of each channel, which is subtracted; empty: measured when the run begins and kept in its config.yaml",
    ] = ()
    std: Annotated[tuple[STD, ...], "scale of each channel, which is divided by it; empty: measured"] = ()
    decoder: Annotated[
        str, DECODER, "module:function from latents [T, C] to a waveform at mel.sample_rate, to listen to samples"
    ] = ""

    def check(self) -> None:
        """Check the fields against each other.

        Raises:
            UserError: names the fields.
        """
        if (self.rate > 0) != (self.channels > 0):
            raise UserError(
                f"latents.rate, latents.channels: expected both or neither, got {self.rate:g} and {self.channels}"
            )
        lengths = {len(self.mean), len(self.std)}
        if lengths != {0} and lengths != {self.channels}:
            raise UserError(
                f"latents.mean, latents.std: expected {self.channels} numbers in both (latents.channels), or none, "
                f"got {len(self.mean)} and {len(self.std)}"
            )


@dataclass(frozen=True)
class LatentGrid:
    """The frames of latents on the time axis of the audio: what `MelConfig` says of a mel."""

    config: LatentConfig
    sample_rate: int  # of the audio

    centre = 0.5  # of frame 0, in frames

    @property
    def mels(self) -> int:
        """Channels of a frame."""
        return self.config.channels

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.config.rate

    @property
    def minimum_samples(self) -> int:
        """The shortest waveform: one frame."""
        return max(1, math.ceil(self.sample_rate / self.config.rate))

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform, to the nearest; what a codec makes of it may differ at the end."""
        return max(1, round(samples * self.config.rate / self.sample_rate))

    def samples(self, frames: int) -> int:
        """Samples that belong to `frames` frames."""
        return self.first_sample(frames)

    def first_sample(self, frame: int) -> int:
        """The sample at which a frame begins."""
        return round(frame * self.sample_rate / self.config.rate)

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel [C]; 0 and 1 before they are measured."""
        config = self.config
        if not config.mean:
            return torch.zeros(config.channels), torch.ones(config.channels)
        return torch.tensor(config.mean), torch.tensor(config.std)

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents [T, C] with mean 0 and standard deviation 1 in each channel."""
        mean, std = self.statistics
        return (latents - mean) / std

    def denormalised(self, latents: Tensor) -> Tensor:
        """The codec's own latents from normalised ones [T, C]."""
        mean, std = self.statistics
        return latents * std + mean


class LatentSource(Protocol):
    """Where the latents of clips are read from."""

    def count(self, clip: Clip, sound: int | None) -> int:
        """Frames of a clip, without reading them. UserError: it has none, or they have another form."""
        ...

    def read(self, clip: Clip, sound: int | None, start: int, stop: int) -> Tensor:
        """Frames start to stop - 1 of a clip [T, C] float32, as the codec made them; `sound` is its sound's digest.

        Raises:
            UserError: they cannot be read.
        """
        ...


class LatentFiles:
    """A `LatentSource`: one .npy or .safetensors file [T, C] for each clip (`Clip.latents`), read in part."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def count(self, clip: Clip, sound: int | None) -> int:
        """See `LatentSource`."""
        with _opened(_path(clip), clip.latent_pack) as stored:
            return _frames(stored.path, stored.shape, self.channels)

    def read(self, clip: Clip, sound: int | None, start: int, stop: int) -> Tensor:
        """See `LatentSource`."""
        with _opened(_path(clip), clip.latent_pack) as stored:
            _frames(stored.path, stored.shape, self.channels)
            return stored.read(start, stop)


def check_count(place: Path, frames: int, grid: LatentGrid, samples: int) -> None:
    """Check that a clip's number of latents fits the duration of its audio.

    Raises:
        UserError: names the file, and the rate that would fit.
    """
    expected = samples * grid.frame_rate / grid.sample_rate
    if abs(frames - expected) > max(EDGE_FRAMES, EDGE_SHARE * expected):
        seconds = samples / grid.sample_rate
        raise UserError(
            f"{place}: {frames} latents for {seconds:.2f} s of audio are {frames / seconds:.4g} a second, "
            f"and latents.rate is {grid.frame_rate:g}"
        )


def checked_values(place: Path, latents: Tensor, start: int = 0) -> Tensor:
    """Latents [T, C] as they are; UserError names the first frame with a value that is not finite."""
    finite = latents.isfinite().all(1)
    if not finite.all():
        frame = start + int((~finite).nonzero()[0])
        raise UserError(f"{place}: frame {frame} holds a value that is not finite: encode the clip again")
    return latents


def read_latents(path: Path, channels: int) -> Tensor:
    """All latents of one file, [T, C] float32.

    Raises:
        UserError: it cannot be read, or has another form.
    """
    with _opened(path) as stored:
        return stored.read(0, _frames(path, stored.shape, channels))


def beside(audio: Path) -> Path | None:
    """The file `sound.wav.latents.npy` or `.safetensors` of `sound.wav`; without either, the first of the two."""
    paths = [audio.with_name(f"{audio.name}.{NAME}{suffix}") for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.replace(":", ".").split("."))


def _path(clip: Clip) -> Path:
    if clip.latents is None:
        raise UserError(f"{clip.source}: {clip.path.name} has no latents: add the column latents, or see data.latents")
    return clip.latents


@dataclass(frozen=True)
class _Stored:
    """Latents in a file that is open."""

    path: Path
    shape: tuple[int, ...]
    values: Any  # an array or a safetensors slice: values[a:b] reads these frames alone

    def read(self, start: int, stop: int) -> Tensor:
        part = self.values[start:stop]
        tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part, np.float32))
        return checked_values(self.path, tensor.float(), start)


@contextmanager
def _opened(path: Path, pack: Pack | None = None) -> Iterator[_Stored]:
    """The latents of a file, of which only what is used is read; or of a pack, which is read whole.

    Errors of reading become UserErrors.
    """

    def check(dtype: np.dtype, shape: tuple[int, ...]) -> None:
        if dtype.kind != "f":
            _refuse(path, f"expected floating latents, got {dtype}")

    if path.suffix not in SUFFIXES:
        _refuse(path, "expected a .npy or .safetensors file of latents")
    if pack is None and not path.is_file():
        _refuse(path, "no such file of latents")
    try:
        if path.suffix == ".safetensors":
            yield from _safetensors(path, pack)
        elif pack is None:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            check(array.dtype, array.shape)
            yield _Stored(path, array.shape, array)
        else:
            with open_sound(path, pack) as file:
                array = read_npy(path, file, pack.size, check)
            yield _Stored(path, array.shape, array)
    except UserError:
        raise
    except (OSError, ValueError, EOFError) as error:
        _refuse(path, f"not a file of latents ({str(error).splitlines()[0][:120]})")


def _safetensors(path: Path, pack: Pack | None) -> Iterator[_Stored]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("latents in safetensors files need safetensors: pip install 'agrepa-fast[train]'") from error
    try:
        if pack is not None:
            tensors = safetensors.torch.load(pack.read(0, pack.size))
            part = tensors[_tensor_name(path, list(tensors))]
            if not part.dtype.is_floating_point:
                _refuse(path, f"expected floating latents, got {part.dtype}")
            yield _Stored(path, tuple(part.shape), part)
            return
        with safetensors.safe_open(str(path), "pt") as file:
            part = file.get_slice(_tensor_name(path, list(file.keys())))
            if part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
                _refuse(path, f"expected floating latents, got {part.get_dtype()}")
            yield _Stored(path, tuple(part.get_shape()), part)
    except safetensors.SafetensorError as error:
        _refuse(path, f"not a file of latents ({error})")


def _tensor_name(path: Path, names: list[str]) -> str:
    if len(names) != 1 and NAME not in names:
        held = ", ".join(names[:5]) or "nothing"
        _refuse(path, f"expected one tensor, or one named {NAME}, got {held}")
    return names[0] if len(names) == 1 else NAME


def _frames(path: Path, shape: tuple[int, ...], channels: int) -> int:
    """Number of frames of latents [T, C]."""
    if len(shape) != 2 or shape[0] == 0 or shape[1] != channels:
        turned = "; it is [channels, frames]: transpose it" if len(shape) == 2 and shape[0] == channels else ""
        _refuse(path, f"expected latents [frames, {channels}] (latents.channels), got {list(shape)}{turned}")
    return shape[0]


def _refuse(path: Path, problem: str) -> NoReturn:
    raise UserError(f"{path}: {problem}")
