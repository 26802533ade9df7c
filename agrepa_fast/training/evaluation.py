"""Validation loss and generated audio of a run, on held-out clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.audio import write_audio
from ..data.dataset import ClipDataset
from ..data.mel import LogMel
from ..errors import UserError
from ..models.flow import SIGMA
from ..teachers.base import Teacher
from ..teachers.cache import CachedTeacher
from .clips import fixed_batches, spread
from .config import RunConfig
from .inference import generate
from .log import average
from .objective import Backbone, Objective, teacher_targets
from .vocoder import build_vocoder

TIMES = (0.125, 0.375, 0.625, 0.875)


@torch.no_grad()
def validate(
    objective: Objective,
    teachers: Mapping[str, Teacher | CachedTeacher],
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
    objective.eval()
    losses: list[Tensor] = []
    records: list[dict[str, Tensor]] = []
    domains: list[str] = []
    for number, batch in enumerate(fixed_batches(clips, spread(clips, config.train.valid_samples), config)):
        generator = torch.Generator().manual_seed(number)
        noise = SIGMA * torch.randn(batch.mel.shape, generator=generator)
        batch, noise = batch.to(device), noise.to(device)
        domains += [batch.domains[i] for i in batch.domain.tolist()]
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
    loss = torch.cat(losses).cpu()
    by_domain = {
        f"flow_loss/{name}": loss[[i for i, domain in enumerate(domains) if domain == name]].mean().item()
        for name in sorted(set(domains))
    }
    return {"flow_loss": loss.mean().item(), **by_domain, **average(records)}


def write_samples(
    model: nn.Module, clips: ClipDataset, config: RunConfig, run_dir: Path, step: int
) -> list[dict[str, Any]]:
    """Generate a few held-out clips from their text and reference, as WAV files in run_dir/samples.

    Returns a log entry for each.

    Raises:
        UserError: what was generated is not finite.
    """
    indices = spread(clips, config.train.samples)
    if not indices:
        return []
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    vocoder = build_vocoder(config.train.vocoder, LogMel(config.mel))
    [batch] = fixed_batches(clips, indices, config, one_shape=True)
    model.eval()
    assert isinstance(model, Backbone)
    mel = generate(model, batch.to(next(model.parameters()).device), config).cpu()
    written = []
    for row, clip in enumerate(batch.clips):
        frames = int(batch.mask[row].sum())
        if not mel[row].isfinite().all():
            raise UserError(f"step {step}: the generated mel is not finite; lower optimizer.lr")
        generated = folder / f"step_{step:08d}_{row}.wav"
        reference = folder / f"reference_{row}.wav"
        write_audio(generated, vocoder(mel[row, :frames]), config.mel.sample_rate)
        write_audio(reference, batch.audio[row, : int(batch.audio_lengths[row])], config.mel.sample_rate)
        paths = {"path": f"samples/{generated.name}", "reference": f"samples/{reference.name}"}
        written.append({**paths, "text": clip.text, "domain": clip.domain})
    return written
