"""Latents in a run: where they are read from, their statistics, and how generated ones are written and decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.clip import Clip
from ..data.latents import LatentFiles, LatentGrid, LatentSource, beside, checked_values
from ..errors import UserError, writing
from ..evaluation.callables import load_function
from ..teachers.cache import dequantise
from ..teachers.store import Store
from .config import LatentConfig, RunConfig
from .distributed import gather, rank
from .extracted import open_store

if TYPE_CHECKING:
    from .clips import RunData

BESIDE, COLUMN = "beside", "column"
MEASURED_CLIPS = 1000  # from which mean and standard deviation are measured, evenly spread over the training clips


class StoredLatents:
    """A `LatentSource`: what `agrepa extract` has stored of a codec that is registered as a teacher."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def count(self, clip: Clip, sound: int | None) -> int:
        """See `LatentSource`."""
        return self.store.frames(self._known(clip, sound))

    def read(self, clip: Clip, sound: int | None, start: int, stop: int) -> Tensor:
        """See `LatentSource`."""
        return checked_values(clip.path, dequantise(*self.store.read(self._known(clip, sound), start, stop)), start)

    def _known(self, clip: Clip, sound: int | None) -> int:
        if sound is None:
            raise ValueError(f"{clip.path}: latents are found by the digest of the sound, which is not known")
        if sound not in self.store:
            raise UserError(f"{clip.path}: no latents: {self.store.missing(sound)}")
        return sound


def latent_source(config: RunConfig) -> LatentSource | None:
    """Where the latents of a run are read from; None where it models mels.

    Raises:
        UserError: a store that does not fit the section `latents`.
    """
    wanted = config.latents
    if not config.data.latents:
        return None
    if config.data.latents in (BESIDE, COLUMN):
        return LatentFiles(wanted.channels)
    folder = Path(config.data.latents)
    if not (folder / "store.json").is_file():
        raise UserError(
            f"data.latents: expected {BESIDE}, {COLUMN} or the folder of a store, got {config.data.latents!r}"
        )
    store = open_store(folder, "", "data.latents")
    info = store.info
    if info.dtype not in ("float32", "int8") or info.width != wanted.channels or info.key.rate != wanted.rate:
        raise UserError(
            f"data.latents: {folder} holds {info.width} channels of {info.dtype} at {info.key.rate:g} a second, "
            f"expected latents.channels {wanted.channels} and latents.rate {wanted.rate:g}"
        )
    return StoredLatents(store)


def with_latents(clips: Sequence[Clip], config: RunConfig) -> list[Clip]:
    """The clips with the files of their latents, as `data.latents` says.

    Latents in an archive or a table lie beside their sound, so `column` and `beside` mean the same there.
    """
    if config.data.latents == COLUMN:
        return list(clips)
    if config.data.latents == BESIDE:
        return [clip if clip.latent_pack else dataclasses.replace(clip, latents=beside(clip.path)) for clip in clips]
    return [dataclasses.replace(clip, latents=None, latent_pack=None) if clip.latents else clip for clip in clips]


def without_latents(config: RunConfig) -> RunConfig:
    """The configuration of the same run on mels, for what looks at its audio alone."""
    data = dataclasses.replace(config.data, latents="")
    return dataclasses.replace(config, data=data, latents=LatentConfig())


def with_statistics(config: RunConfig, data: RunData) -> RunConfig:
    """The configuration with the mean and standard deviation of each channel, which the data sets use from now on.

    They are measured on up to `MEASURED_CLIPS` training clips where the configuration has none. A channel that is
    constant keeps its scale. Every rank must call it.
    """
    if not isinstance(config.grid, LatentGrid):
        return config
    if not config.latents.mean:
        mean, std = gather(_measured(data) if rank() == 0 else ((), ()))[0]
        config = dataclasses.replace(config, latents=dataclasses.replace(config.latents, mean=mean, std=std))
    for dataset in (data.train, data.valid):
        dataset.mel_config = config.grid
    return config


def _measured(data: RunData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation over the frames of clips, summed in float64 around the first clip's mean."""
    clips = list(dict.fromkeys(data.train.clips))  # each once, however many windows it has
    count = min(len(clips), MEASURED_CLIPS)
    shift = total = squares = torch.zeros(0)
    frames = 0
    for index in sorted({number * len(clips) // count for number in range(count)}):
        try:
            latents = data.train.latents_of(clips[index]).double()
        except UserError:
            continue  # the loader will skip this clip, and name it
        if not frames:
            shift = latents.mean(0)
            total = squares = torch.zeros_like(shift)
        total = total + (latents - shift).sum(0)
        squares = squares + (latents - shift).square().sum(0)
        frames += latents.shape[0]
    if not frames:
        raise UserError(f"data.latents: the latents of none of {count} clips can be read")
    std = (squares / frames - (total / frames).square()).clamp_min(0).sqrt()
    mean = shift + total / frames
    std = torch.where(std > 1e-6 * mean.abs().clamp_min(1e-6), std, 1.0)
    return tuple(mean.float().tolist()), tuple(std.float().tolist())


def write_latents(path: Path, latents: Tensor) -> None:
    """Write latents [T, C] float32 as .npy."""
    with writing(path), path.open("wb") as file:
        np.save(file, latents.float().cpu().numpy(), allow_pickle=False)


def load_decoder(name: str, option: str) -> Callable[[Tensor], Tensor]:
    """`module:function` from latents [T, C] float32 on the CPU to a waveform [S].

    Raises:
        UserError: no such function; and when it is called, whatever it raises, or a waveform of another form.
    """
    decode = load_function(name, option)

    def to_waveform(latents: Tensor) -> Tensor:
        with torch.no_grad():
            waveform = torch.as_tensor(decode(latents)).detach().float().cpu()
        if waveform.dim() != 1 or not waveform.numel() or not waveform.isfinite().all():
            raise UserError(f"{option} {name}: expected a finite waveform [samples], got {list(waveform.shape)}")
        return waveform

    to_waveform.__name__ = name
    return to_waveform
