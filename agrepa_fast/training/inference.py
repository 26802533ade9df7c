"""Use of a trained backbone: score its layers on clips, and generate mels or normalised latents [B, T, M]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..alignment.policy import layer_sensitivity
from ..alignment.reselect import ALL
from ..attribution.graph import release_graphs
from ..attribution.joined import join_scores
from ..attribution.metrics import VelocityRatio
from ..attribution.runner import attribute_layers, probing
from ..attribution.scores import LayerScores
from ..attribution.stored import lasp, pooled_hidden
from ..data.audio import read_audio
from ..data.batches import Batch, collate
from ..data.dataset import ClipDataset, Sample
from ..data.features import FeatureSource
from ..data.latents import SUFFIXES as LATENT_SUFFIXES
from ..data.latents import LatentGrid, read_latents
from ..data.manifest import Clip
from ..data.mel import LogMel
from ..data.tokens import BYTE_VOCABULARY, encode_text
from ..errors import UserError
from ..models.flow import flow_matching_loss, probe_inputs, sample
from ..teachers.base import Teacher
from .checkpoint import Checkpoint, load_checkpoint, restore
from .clips import fixed_batches, spread
from .config import RunConfig
from .distributed import gather, rank, world_size
from .objective import Backbone
from .targets import domain_tables, pooled_features


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
    process = config.flow.process
    metric: str | VelocityRatio = probe.metric
    if probe.output == "velocity" and process.parametrisation in ("eps", "x0"):
        metric = VelocityRatio(process, probe.metric)
    indices = spread(dataset, probe.samples)
    [batch] = fixed_batches(dataset, indices, config, one_shape=True)
    batch = batch.to(device)
    generator = torch.Generator(device).manual_seed(config.train.seed)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        cond, _ = backbone.condition(batch)
        inputs = probe_inputs(batch.mel, cond, batch.mask, probe.t_grid, generator, process=process)
        domains = [batch.domains[i] for i in batch.domain.tolist()] * len(probe.t_grid)
        clips = list(range(len(indices))) * len(probe.t_grid)
        # Each rank takes as many samples in a row as the others; with fewer samples than ranks, every rank takes all.
        parts = world_size() if len(clips) >= world_size() else 1
        part = rank() if parts > 1 else 0
        rows = slice(len(clips) * part // parts, len(clips) * (part + 1) // parts)
        scores = attribute_layers(
            backbone.network,
            {name: value[rows] for name, value in inputs.items()},
            metric=metric,
            domains=domains[rows],
            branches=branches,
            clips=clips[rows],
            max_samples=len(indices),
        )
    if parts > 1:
        joined = join_scores([LayerScores.from_state(state) for state in gather(scores.state())])
        scores = dataclasses.replace(joined, clips=tuple(clips))  # the same clip at another t may be another rank's
    # Free the memory of the captured probe: training needs it more than the next probe does.
    release_graphs(backbone.network)
    return scores


def layer_values(
    policy: str,
    backbone: Backbone,
    teachers: Mapping[str, Teacher | FeatureSource],
    dataset: ClipDataset,
    config: RunConfig,
    device: torch.device,
    bf16: bool = False,
    only: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The values by which a policy chooses layers: [L] float64 on the CPU, on the clips and times of `score_layers`.

    "stored": LASP; the head is fitted on every other clip of a teacher's domains.
    "gradient-norm" and "first-order": `layer_sensitivity` of the flow-matching loss, averaged over the grid of t.

    Returns {ALL: of all clips, or the mean over teachers}; with `alignment.selection_per` "teacher"
    {teacher: of the clips of its domains}.

    only: the teachers to go by; none for all. teachers: those of them that are not the network itself.

    Raises:
        UserError: a teacher's domains have too few clips for LASP.
    """
    [batch] = fixed_batches(dataset, spread(dataset, config.probe.samples), config, one_shape=True)
    batch = batch.to(device)
    process = config.flow.process
    noise = process.noise_std * torch.randn(
        batch.mel.shape, generator=torch.Generator(device).manual_seed(config.train.seed), device=device
    )
    tables = {
        name: table.to(device)[batch.domain]
        for name, table in domain_tables(config, batch.domains).items()
        if not only or name in only
    }
    per_teacher = config.alignment.selection_per == "teacher"
    samples = tables if per_teacher else {ALL: slice(None)}
    by_time = []
    sensitivities: dict[str, list[Tensor]] = {name: [] for name in samples}
    with probing(backbone), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        cond, _ = backbone.condition(batch)
        for time in config.probe.t_grid:
            t = torch.full((batch.mel.shape[0],), time, device=device)
            x_t, target = process.point(batch.mel, noise, t)
            inputs = {"x_t": x_t, "t": t, "cond": cond, "mask": batch.mask}
            if policy == "stored":
                by_time.append(pooled_hidden(backbone.network, inputs).double())
                continue
            with torch.enable_grad():
                block_input, _ = backbone.network.open(x_t, t, cond, batch.mask)
                layers = range(config.model.depth)
                output, hidden = backbone.network(**inputs, hidden_layers=layers)
                losses = flow_matching_loss(output, target, batch.mask)
                weight = process.weight(t)
                losses = losses if weight is None else weight * losses
                for name, kept in samples.items():
                    states = [hidden[layer] for layer in layers]
                    norms, first_order = layer_sensitivity(losses[kept].mean(), states, block_input)
                    sensitivities[name].append((norms if policy == "gradient-norm" else first_order).double())
        if policy != "stored":
            return {name: torch.stack(values).mean(0).cpu() for name, values in sensitivities.items()}
        targets = pooled_features(teachers, batch, config)
    stored = {}
    for name, kept in tables.items():
        clips = kept.nonzero().squeeze(1)
        clips = clips[batch.domain[clips].argsort(stable=True)]  # so that both halves hold every domain
        fitted = (torch.arange(clips.numel(), device=device) % 2 == 0).repeat(len(by_time))
        if clips.numel() < 2 or fitted.sum() < 2:
            raise UserError(
                f"probe.samples: what a layer stores is fitted on some held-out clips of teacher {name!r} and measured "
                f"on others, and of {clips.numel()} it cannot: probe more clips or hold out more (data.valid_share)"
            )
        hidden_states = torch.cat([states[:, clips] for states in by_time], dim=1)
        teacher = targets[name][clips].repeat(len(by_time), 1)
        stored[name] = lasp(hidden_states, teacher, fitted).mean(1).cpu()
    return stored if per_teacher else {ALL: torch.stack(list(stored.values())).mean(0)}


@torch.no_grad()
def generate(backbone: Backbone, batch: Batch, config: RunConfig, seed: int = 0, noise: Tensor | None = None) -> Tensor:
    """Mels or normalised latents [B, T, M] from the tokens and the reference of a batch, by the sampler of `flow`.

    noise: [B, T, M] from N(0, 1), where the clips of a batch must not depend on one another; default: from the seed."""
    flow = config.flow
    if noise is None:
        noise = torch.randn(batch.mel.shape, generator=torch.Generator().manual_seed(seed))
    noise = flow.process.noise_std * noise
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
        sway_coefficient=flow.sway_coefficient,
        process=flow.process,
    )


def text_batch(
    config: RunConfig,
    text: str,
    domain: str,
    seconds: float,
    reference: str | Path | None = None,
    reference_text: str = "",
) -> Batch:
    """A batch of one to generate from: `text` for `seconds`, after a reference whose mel or latents are the prompt.

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
    grid = config.grid
    prompt = torch.zeros(0, grid.mels)
    if reference is not None:
        prompt = _reference(Path(reference), config)
    least = grid.minimum_samples / grid.sample_rate
    if not least <= seconds <= 3600:
        raise UserError(f"--seconds: expected {least:.3f} to 3600, got {seconds:g}")
    frames = prompt.shape[0] + grid.frames(int(seconds * grid.sample_rate))
    if frames > config.dit.max_frames:
        longest = config.dit.max_frames / grid.frame_rate
        raise UserError(f"--seconds: reference and {seconds:g} s are more than the model's {longest:.1f} s")
    for option, value in (("--text", text), ("--reference-text", reference_text)):
        try:
            encode_text(value)
        except UserError as error:
            raise UserError(f"{option}: {error}") from error
    words = " ".join(part for part in (reference_text, text) if part)
    mel = torch.zeros(frames, grid.mels)
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
    return collate([sample_], frames, (domain,), grid)


def _reference(path: Path, config: RunConfig) -> Tensor:
    """The prompt [T, M]: the mel of a sound file, or normalised latents of a file of latents."""
    if isinstance(config.grid, LatentGrid):
        if path.suffix not in LATENT_SUFFIXES:
            raise UserError(f"--reference {path}: expected latents of this codec (.npy or .safetensors)")
        return config.grid.normalised(read_latents(path, config.latents.channels))
    waveform = read_audio(path, config.mel.sample_rate, minimum_samples=config.mel.minimum_samples)
    return LogMel(config.mel)(waveform)
