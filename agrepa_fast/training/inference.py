"""What a trained backbone is used for: scoring its layers on clips, and generating mels [B, T, M]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..attribution.graph import release_graphs
from ..attribution.runner import attribute_layers
from ..attribution.scores import LayerScores
from ..data.audio import read_audio
from ..data.batches import Batch, ClipDataset, Sample, collate
from ..data.manifest import Clip
from ..data.mel import LogMel
from ..data.tokens import BYTE_VOCABULARY, encode_text
from ..errors import UserError
from ..models.flow import SIGMA, probe_inputs, sample
from .checkpoint import Checkpoint, load_checkpoint, restore
from .clips import fixed_batches, spread
from .config import RunConfig
from .objective import Backbone


def load_backbone(path: str | Path, device: torch.device, weights: str = "ema") -> tuple[Backbone, Checkpoint]:
    """The model of a checkpoint (or of a run's newest one), with its "ema" or its live ("model") weights.

    Raises:
        UserError: the checkpoint is missing, damaged or of another shape.
    """
    checkpoint = load_checkpoint(path)
    backbone = Backbone(checkpoint.config)
    restore(backbone, checkpoint.weights[weights], checkpoint.path / f"{weights}.safetensors")
    return backbone.to(device).eval(), checkpoint


def score_layers(
    backbone: Backbone,
    dataset: ClipDataset,
    config: RunConfig,
    device: torch.device,
    bf16: bool = False,
    branches: Sequence[str] | None = None,
) -> LayerScores:
    """FoG-A on clips of a data set, at every t of `probe.t_grid`: what `probe` in the configuration says."""
    probe = config.probe
    indices = spread(dataset, probe.samples)
    [batch] = fixed_batches(dataset, indices, config, one_shape=True)
    batch = batch.to(device)
    generator = torch.Generator(device).manual_seed(config.train.seed)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        cond, _ = backbone.condition(batch)
        inputs = probe_inputs(batch.mel, cond, batch.mask, probe.t_grid, generator)
        scores = attribute_layers(
            backbone.network,
            inputs,
            metric=probe.metric,
            domains=[batch.domains[i] for i in batch.domain.tolist()] * len(probe.t_grid),
            branches=branches,
            clips=list(range(len(indices))) * len(probe.t_grid),
            max_samples=len(indices),
        )
    # Training needs the memory that a captured probe holds more than the next probe does.
    release_graphs(backbone.network)
    return scores


@torch.no_grad()
def generate(backbone: Backbone, batch: Batch, config: RunConfig, seed: int = 0) -> Tensor:
    """Mels [B, T, M] from the tokens and the reference frames of a batch, by the sampler of `flow`."""
    flow = config.flow
    noise = SIGMA * torch.randn(batch.mel.shape, generator=torch.Generator().manual_seed(seed))
    cond, null_cond = backbone.condition(batch)
    return sample(
        backbone.network,
        noise.to(batch.mel.device),
        cond,
        null_cond,
        batch.mask,
        points=flow.points,
        guidance=flow.guidance,
        method=flow.method,
        sway_coefficient=flow.sway,
    )


def text_batch(
    config: RunConfig,
    text: str,
    domain: str,
    seconds: float,
    reference: str | Path | None = None,
    reference_text: str = "",
) -> Batch:
    """A batch of one to generate from: text over `seconds`, after a reference clip (its mel is the prompt).

    Raises:
        UserError: no text, a length that does not fit, a vocabulary without text, an unreadable reference.
    """
    vocabulary = config.data.vocabulary_of.get(domain, "text")
    if vocabulary not in config.data.vocabularies or config.data.vocabularies[vocabulary] != (BYTE_VOCABULARY,):
        raise UserError(f"--domain {domain}: its vocabulary {vocabulary!r} is not byte text; text cannot drive it")
    if not text:
        raise UserError("--text: is empty")
    if not seconds > 0:
        raise UserError(f"--seconds: expected more than 0, got {seconds:g}")
    prompt = torch.zeros(0, config.mel.mels)
    if reference is not None:
        waveform = read_audio(reference, config.mel.sample_rate, minimum_samples=config.mel.minimum_samples)
        prompt = LogMel(config.mel)(waveform)
    frames = prompt.shape[0] + config.mel.frames(int(seconds * config.mel.sample_rate))
    if frames > config.dit.max_frames:
        longest = config.dit.max_frames / config.mel.frame_rate
        raise UserError(f"--seconds: reference and {seconds:g} s are more than the model's {longest:.1f} s")
    words = " ".join(part for part in (reference_text, text) if part)
    mel = torch.zeros(frames, config.mel.mels)
    mel[: prompt.shape[0]] = prompt
    sample_: Sample = {
        "mel": mel,
        "prompt": prompt.shape[0],
        "tokens": encode_text(words),
        "vocabulary": list(config.data.vocabularies).index(vocabulary),
        "audio": torch.zeros(0),
        "clip": Clip(Path(), words, domain, None, None, "--text"),
        "index": 0,
        "start": 0,
    }
    return collate([sample_], frames, (domain,), config.mel)
