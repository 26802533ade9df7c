"""What the aligned layers of a batch are compared with: the teachers' features of its clips, [B, W] or [B, T, W]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..alignment.resample import align_time
from ..data.batches import Batch
from ..data.features import FeatureSource
from ..errors import UserError
from ..ops import masked_mean
from ..teachers.base import Teacher
from ..teachers.passes import encode_together
from .config import RunConfig


def pool_target(target: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, T, W] over the mask; [B, W] is pooled already and stays as it is."""
    return target if target.dim() == 2 else masked_mean(target, mask)


def pooled_features(
    teachers: Mapping[str, Teacher | FeatureSource], batch: Batch, config: RunConfig
) -> dict[str, Tensor]:
    """{teacher: [B, W]}: what a layer's pooled states are compared with, to measure what the layer stores.

    For the network as its own teacher these are the clips' own `spectra`.
    """
    targets, mask = teacher_targets(teachers, batch, config)
    pooled = {name: pool_target(target, mask) for name, target in targets.items()}
    return pooled | dict.fromkeys(config.alignment.self_teachers, spectra(batch))


def spectra(batch: Batch) -> Tensor:
    """Mean and standard deviation over the valid frames of each mel bin of the clean clips: [B, 2 M]."""
    mean = masked_mean(batch.mel, batch.mask)
    variance = masked_mean((batch.mel - mean.unsqueeze(1)).square(), batch.mask)
    return torch.cat([mean, variance.sqrt()], dim=-1)


def teacher_targets(
    teachers: Mapping[str, Teacher | FeatureSource], batch: Batch, config: RunConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of the batch's clean audio, {teacher: [B, W] or [B, T, W]}, and the frames to align [B, T].

    Extracted features come with the batch; live teachers hear its audio, and those that share an encoder run in one
    pass. Pooled targets are means over the frames in which the teacher heard audio. Extracted features are those of
    whole clips: frames are read at the times of the crop, and a pooled vector is used for any crop of its clip.
    """
    mask = batch.mask & ~batch.prompt if config.alignment.mask == "span" else batch.mask
    live = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, Teacher)}
    heard_now = encode_together(live, batch.audio, batch.audio_lengths, config.mel.sample_rate)
    targets = {}
    for name, teacher in teachers.items():
        # Seconds from the teacher's first frame at hand to the beginning of the crop; in float64, as a recording may
        # be hours long.
        start = torch.zeros(batch.mel.shape[0], device=batch.mel.device, dtype=torch.float64)
        covered = None
        if name in live:
            features, valid = heard_now[name]
        else:
            stored = batch.features[name]
            features = stored.dequantised()
            valid = torch.arange(features.shape[1], device=features.device) < stored.counts.unsqueeze(1)
            covered = stored.covered
            if teacher.rate:
                start = batch.starts.double() / config.grid.frame_rate - stored.first.double() / teacher.rate
                valid = valid & _heard(batch, start, features.shape[1], teacher.rate, config.mel.sample_rate)
        if config.alignment.pool is not None:
            targets[name] = masked_mean(features, valid)
            continue
        targets[name], heard = align_time(
            features,
            teacher_rate=teacher.rate,
            student_rate=config.grid.frame_rate,
            frames=batch.mel.shape[1],
            # align_time's frames are centred half a frame after they begin; a mel's are centred on j / rate.
            offset=(start + (config.grid.centre - 0.5) / config.grid.frame_rate).float(),
            teacher_mask=valid,
            student_mask=batch.mask,
        )
        # The mask is one for all teachers: where one has nothing to say, the others may.
        mask = mask & (heard if covered is None else heard | ~covered.unsqueeze(1))
    return targets, mask


def _heard(batch: Batch, start: Tensor, frames: int, rate: float, sample_rate: int) -> Tensor:
    """[B, frames] bool: a frame begins within the crop; `start` [B] is the crop's, in seconds after frame 0."""
    begin = torch.arange(frames, device=start.device) / rate
    stop = start + batch.audio_lengths / sample_rate
    # The margin keeps a frame that begins with the crop, whatever the rounding of the division.
    return (begin >= start.unsqueeze(1) - 1e-4) & (begin < stop.unsqueeze(1) - 1e-4)


def domain_tables(config: RunConfig, domains: Sequence[str]) -> dict[str, Tensor]:
    """{teacher: [number of domains] bool}: whether the teacher is used for each domain.

    Raises:
        UserError: a teacher names a domain that no clip has.
    """
    tables = {}
    for name, teacher in config.alignment.teachers.items():
        unknown = set(teacher.domains) - set(domains)
        if unknown:
            raise UserError(
                f"alignment.teachers.{name}.domains: no clip of domain {sorted(unknown)[0]!r}, "
                f"the clips have {', '.join(domains)}"
            )
        tables[name] = torch.tensor([not teacher.domains or domain in teacher.domains for domain in domains])
    return tables
