"""Use of a trained backbone: score its layers on clips, and generate mels [B, T, M]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment.policy import layer_sensitivity
from ..alignment.reselect import ALL
from ..attribution.graph import release_graphs
from ..attribution.runner import attribute_layers, probing
from ..attribution.scores import LayerScores
from ..attribution.stored import lasp, pooled_hidden
from ..data.audio import read_audio
from ..data.batches import Batch, collate
from ..data.dataset import ClipDataset, Sample
from ..data.features import FeatureSource
from ..data.manifest import Clip
from ..data.mel import LogMel
from ..data.tokens import BYTE_VOCABULARY, encode_text
from ..errors import UserError
from ..models.flow import SIGMA, flow_matching_loss, path, probe_inputs, sample
from ..teachers.base import Teacher
from .checkpoint import Checkpoint, load_checkpoint, restore
from .clips import fixed_batches, spread
from .config import RunConfig
from .distributed import gather, rank, world_size
from .objective import Backbone, domain_tables, pool_target, teacher_targets


def load_backbone(path: str | Path, device: torch.device, weights: str = "ema") -> tuple[Backbone, Checkpoint]:
    """The model of a checkpoint, or of a run's newest one, with its EMA weights ("ema") or its live ones ("model").

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
    """FoG-A on clips of a data set at every t of `probe.t_grid`, with the settings of the section `probe`.

    The ranks share the samples, and each gets the scores of all. Every rank must call it.
    """
    probe = config.probe
    indices = spread(dataset, probe.samples)
    [batch] = fixed_batches(dataset, indices, config, one_shape=True)
    batch = batch.to(device)
    generator = torch.Generator(device).manual_seed(config.train.seed)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        cond, _ = backbone.condition(batch)
        inputs = probe_inputs(batch.mel, cond, batch.mask, probe.t_grid, generator)
        domains = [batch.domains[i] for i in batch.domain.tolist()] * len(probe.t_grid)
        clips = list(range(len(indices))) * len(probe.t_grid)
        # With fewer samples than ranks, every rank takes all samples.
        parts = world_size() if len(clips) >= world_size() else 1
        rows = slice(rank() if parts > 1 else 0, None, parts)
        scores = attribute_layers(
            backbone.network,
            {name: value[rows] for name, value in inputs.items()},
            metric=probe.metric,
            domains=domains[rows],
            branches=branches,
            clips=clips[rows],
            max_samples=len(indices),
        )
    if parts > 1:
        scores = _interleaved([LayerScores.from_state(state) for state in gather(scores.state())])
    # Free the memory of the captured probe: training needs it more than the next probe does.
    release_graphs(backbone.network)
    return scores


def _interleaved(parts: Sequence[LayerScores]) -> LayerScores:
    """Join scores whose rank r of R has the samples r, r + R, r + 2 R, ..."""
    samples = [list(range(r, sum(p.by_sample.shape[1] for p in parts), len(parts))) for r in range(len(parts))]
    order = sorted(range(sum(map(len, samples))), key=[n for part in samples for n in part].__getitem__)

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Tensor):
            return torch.cat(values, dim=-1)[..., order]
        return None if values[0] is None else tuple([item for value in values for item in value][i] for i in order)

    per_sample = ("by_sample", "floor_by_sample", "noise_by_sample", "t", "domains", "clips")
    return dataclasses.replace(parts[0], **{name: joined(name) for name in per_sample})


def layer_values(
    policy: str,
    backbone: Backbone,
    teachers: Mapping[str, Teacher | FeatureSource],
    dataset: ClipDataset,
    config: RunConfig,
    device: torch.device,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """The values by which a policy chooses layers: [L] float64 on the CPU, on the clips and times of `score_layers`.

    "stored": LASP; the head is fitted on every other clip of a teacher's domains.
    "gradient-norm" and "first-order": `layer_sensitivity` of the flow-matching loss, averaged over the grid of t.

    Returns {ALL: of all clips, or the mean over teachers}; with `alignment.selection_per` "teacher"
    {teacher: of the clips of its domains}.

    Raises:
        UserError: a teacher's domains have too few clips for LASP.
    """
    [batch] = fixed_batches(dataset, spread(dataset, config.probe.samples), config, one_shape=True)
    batch = batch.to(device)
    noise = SIGMA * torch.randn(
        batch.mel.shape, generator=torch.Generator(device).manual_seed(config.train.seed), device=device
    )
    tables = {name: table.to(device)[batch.domain] for name, table in domain_tables(config, batch.domains).items()}
    per_teacher = config.alignment.selection_per == "teacher"
    samples = tables if per_teacher else {ALL: slice(None)}
    by_time = []
    sensitivities: dict[str, list[Tensor]] = {name: [] for name in samples}
    with probing(backbone), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        cond, _ = backbone.condition(batch)
        for time in config.probe.t_grid:
            t = torch.full((batch.mel.shape[0],), time, device=device)
            x_t, velocity_target = path(batch.mel, noise, t)
            inputs = {"x_t": x_t, "t": t, "cond": cond, "mask": batch.mask}
            if policy == "stored":
                by_time.append(pooled_hidden(backbone.network, inputs).double())
                continue
            with torch.enable_grad():
                block_input, _ = backbone.network.open(x_t, t, cond, batch.mask)
                layers = range(config.model.depth)
                velocity, hidden = backbone.network(**inputs, hidden_layers=layers)
                losses = flow_matching_loss(velocity, velocity_target, batch.mask)
                for name, kept in samples.items():
                    states = [hidden[layer] for layer in layers]
                    norms, first_order = layer_sensitivity(losses[kept].mean(), states, block_input)
                    sensitivities[name].append((norms if policy == "gradient-norm" else first_order).double())
        if policy != "stored":
            return {name: torch.stack(values).mean(0).cpu() for name, values in sensitivities.items()}
        targets, mask = teacher_targets(teachers, batch, config)
    stored = {}
    for name, kept in tables.items():
        clips = kept.nonzero().squeeze(1)
        clips = clips[batch.domain[clips].argsort(stable=True)]  # so that both halves hold every domain
        fitted = (torch.arange(clips.numel(), device=device) % 2 == 0).repeat(len(by_time))
        if clips.numel() < 2 or fitted.sum() < 2:
            raise UserError(
                f"probe.samples: policy 'stored' fits on some of the held-out clips of teacher {name!r} and measures "
                f"on others, and of {clips.numel()} it cannot: probe more clips or hold out more (data.valid_share)"
            )
        hidden_states = torch.cat([states[:, clips] for states in by_time], dim=1)
        teacher = pool_target(targets[name], mask)[clips].repeat(len(by_time), 1)
        stored[name] = lasp(hidden_states, teacher, fitted).mean(1).cpu()
    return stored if per_teacher else {ALL: torch.stack(list(stored.values())).mean(0)}


@torch.no_grad()
def generate(backbone: Backbone, batch: Batch, config: RunConfig, seed: int = 0, noise: Tensor | None = None) -> Tensor:
    """Mels [B, T, M] from the tokens and the reference frames of a batch, by the sampler of `flow`.

    noise: [B, T, M] from N(0, 1), where the clips of a batch must not depend on one another; default: from the seed."""
    flow = config.flow
    if noise is None:
        noise = torch.randn(batch.mel.shape, generator=torch.Generator().manual_seed(seed))
    noise = SIGMA * noise
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
    """A batch of one to generate from: `text` for `seconds`, after a reference clip whose mel is the prompt.

    Raises:
        UserError: a text that is empty or not valid Unicode, a length that does not fit, a vocabulary that is not text,
            or an unreadable reference.
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
    if not config.mel.minimum_samples / config.mel.sample_rate <= seconds <= 3600:
        least = config.mel.minimum_samples / config.mel.sample_rate
        raise UserError(f"--seconds: expected {least:.3f} to 3600, got {seconds:g}")
    frames = prompt.shape[0] + config.mel.frames(int(seconds * config.mel.sample_rate))
    if frames > config.dit.max_frames:
        longest = config.dit.max_frames / config.mel.frame_rate
        raise UserError(f"--seconds: reference and {seconds:g} s are more than the model's {longest:.1f} s")
    for option, value in (("--text", text), ("--reference-text", reference_text)):
        try:
            encode_text(value)
        except UserError as error:
            raise UserError(f"{option}: {error}") from error
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
        "features": {},
    }
    return collate([sample_], frames, (domain,), config.mel)
