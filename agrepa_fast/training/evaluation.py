"""Validation loss and generated audio of a run, on held-out clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.audio import write_audio
from ..data.dataset import ClipDataset
from ..data.features import FeatureSource
from ..data.latents import LatentGrid
from ..data.manifest import Clip
from ..errors import UserError
from ..teachers.base import Teacher
from .clips import fixed_batches, spread
from .config import RunConfig
from .inference import generate
from .latents import write_latents
from .log import average
from .objective import Backbone, Objective
from .targets import teacher_targets
from .vocoder import build_decoder

TIMES = (0.125, 0.375, 0.625, 0.875)


@torch.no_grad()
def validate(
    objective: Objective,
    teachers: Mapping[str, Teacher | FeatureSource],
    tables: Mapping[str, Tensor],
    clips: ClipDataset,
    config: RunConfig,
    device: torch.device,
    bf16: bool,
) -> dict[str, float]:
    """Mean flow-matching loss, also by domain, and the raw cosines of every aligned layer, in evaluation mode.

    Clips, noise and t are fixed, so the numbers of different runs on the same clips compare. tables {teacher: [domains]
    bool} says for which domains a teacher is used.
    """
    count = config.train.valid_samples
    listed, loss, records = clip_losses(objective, teachers, tables, clips, config, device, bf16, count)
    by_domain = {
        f"flow_loss/{name}": loss[[i for i, clip in enumerate(listed) if clip.domain == name]].mean().item()
        for name in sorted({clip.domain for clip in listed})
    }
    return {"flow_loss": loss.mean().item(), **by_domain, **average(records)}


@torch.no_grad()
def clip_losses(
    objective: Objective,
    teachers: Mapping[str, Teacher | FeatureSource],
    tables: Mapping[str, Tensor],
    clips: ClipDataset,
    config: RunConfig,
    device: torch.device,
    bf16: bool,
    count: int,
) -> tuple[list[Clip], Tensor, list[dict[str, Tensor]]]:
    """Up to `count` clips, their losses [N] on the CPU, and the cosines by layer. `validate` averages both."""
    objective.eval()
    losses: list[Tensor] = []
    records: list[dict[str, Tensor]] = []
    listed: list[Clip] = []
    for number, batch in enumerate(fixed_batches(clips, spread(clips, count), config)):
        generator = torch.Generator().manual_seed(number)
        noise = config.flow.process.noise_std * torch.randn(batch.mel.shape, generator=generator)
        batch, noise = batch.to(device), noise.to(device)
        listed += batch.clips
        spoken = {name: table[batch.domain] for name, table in tables.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            targets, mask = teacher_targets(teachers, batch, config)
            at_times = []
            for time in TIMES:
                t = torch.full((batch.mel.shape[0],), time, device=device)
                loss, cosines = objective.validate(batch, targets, mask, spoken, t, noise)
                at_times.append(loss)
                records.append(cosines)
        losses.append(torch.stack(at_times).mean(0))
    return listed, torch.cat(losses).cpu(), records


def write_samples(
    model: nn.Module, clips: ClipDataset, config: RunConfig, run_dir: Path, step: int
) -> list[dict[str, Any]]:
    """Generate a few held-out clips from their text and reference, as WAV files in run_dir/samples.

    Latents are written as .npy files, and as WAV files too where `latents.decoder` names a decoder. Returns a log entry
    for each.

    Raises:
        UserError: what was generated is not finite.
    """
    indices = spread(clips, config.train.samples)
    if not indices:
        return []
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    vocoder = build_decoder(config)
    [batch] = fixed_batches(clips, indices, config, one_shape=True)
    model.eval()
    assert isinstance(model, Backbone)
    mel = generate(model, batch.to(next(model.parameters()).device), config).cpu()
    written = []
    for row, clip in enumerate(batch.clips):
        frames = int(batch.mask[row].sum())
        if not mel[row].isfinite().all():
            raise UserError(f"step {step}: what the model generates is not finite; lower optimizer.lr")
        generated = folder / f"step_{step:08d}_{row}.wav"
        reference = folder / f"reference_{row}.wav"
        modelled = mel[row, :frames]
        if isinstance(config.grid, LatentGrid):
            modelled = config.grid.denormalised(modelled)
            write_latents(generated.with_suffix(".npy"), modelled)
        if vocoder is None:
            generated = generated.with_suffix(".npy")
        else:
            waveform = vocoder(modelled)
            if not waveform.isfinite().all():
                raise UserError(f"step {step}: the generated audio is not finite; lower optimizer.lr")
            write_audio(generated, waveform, config.mel.sample_rate)
        write_audio(reference, batch.audio[row, : int(batch.audio_lengths[row])], config.mel.sample_rate)
        paths = {"path": f"samples/{generated.name}", "reference": f"samples/{reference.name}"}
        written.append({**paths, "text": clip.text, "domain": clip.domain})
    return written
