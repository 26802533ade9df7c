"""The training objective: flow matching, alignment and BiT-C of one batch, as one module.

The backbone (network and token conditioner) and the alignment heads are apart: heads are no part of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..alignment.interface import InterfaceLoss
from ..alignment.loss import AlignmentLoss
from ..alignment.resample import align_time
from ..alignment.schedule import SimilarityStop, timestep_weight
from ..alignment.selection import LayerSelection
from ..data.batches import Batch
from ..errors import UserError
from ..models.conditioning import TokenConditioner, assemble_condition
from ..models.dit import DiT
from ..models.flow import SIGMA, flow_matching_loss, path
from ..ops import masked_mean
from ..teachers.base import Teacher
from ..teachers.cache import CachedTeacher
from .config import RunConfig


class Backbone(nn.Module):
    """The network and the token conditioner: what a checkpoint saves as the model."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        sizes = {name: streams[0] for name, streams in config.data.vocabularies.items()}
        second = {streams[1] for streams in config.data.vocabularies.values() if len(streams) == 2}
        self.conditioner = TokenConditioner(sizes, config.model.token_width, second.pop() if second else 0)
        self.network = DiT(config.dit)

    def embed_tokens(self, batch: Batch | StepInputs) -> Tensor:
        """Token embedding per mel frame [B, T, C]."""
        return self.conditioner(batch.tokens, batch.token_lengths, batch.vocabulary, batch.mask)

    def condition(self, batch: Batch | StepInputs) -> tuple[Tensor, Tensor]:
        """The full condition and the null condition of guidance, each [B, T, C + M], without condition dropout."""
        embedding = self.embed_tokens(batch)
        return (
            assemble_condition(embedding, batch.mel, batch.prompt),
            assemble_condition(torch.zeros_like(embedding), batch.mel, batch.prompt),
        )


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step: tensors of a batch and of the teachers, in shapes that depend on the bucket alone."""

    mel: Tensor  # [B, T, M]
    mask: Tensor  # [B, T] bool, real frames
    prompt: Tensor  # [B, T] bool, reference frames
    tokens: Tensor  # [B, S, K]
    token_lengths: Tensor  # [B]
    vocabulary: Tensor  # [B]
    targets: dict[str, Tensor]  # {teacher: [B, W] or [B, T, W]}; empty where none is needed
    target_mask: Tensor  # [B, T] bool, frames to align
    domains: dict[str, Tensor]  # {teacher: [B] bool}

    @classmethod
    def of(
        cls,
        batch: Batch,
        targets: dict[str, Tensor],
        target_mask: Tensor,
        domains: dict[str, Tensor],
    ) -> StepInputs:
        """Inputs from a batch and the teachers' features of it."""
        return cls(
            batch.mel,
            batch.mask,
            batch.prompt,
            batch.tokens,
            batch.token_lengths,
            batch.vocabulary,
            targets,
            target_mask,
            domains,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [t for value in values for t in (value.values() if isinstance(value, dict) else [value])]

    def layout(self) -> tuple[Hashable, ...]:
        """Shapes, dtypes, and which tensors are the same: `copy_` needs inputs of equal layout."""
        places: dict[int, int] = {}
        return tuple((t.shape, t.dtype, places.setdefault(id(t), len(places))) for t in self.tensors())

    def clone(self) -> StepInputs:
        """A copy in memory of its own. Two fields that share a tensor share its copy."""
        copies = {id(tensor): tensor.clone() for tensor in self.tensors()}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values[field.name] = (
                {k: copies[id(t)] for k, t in value.items()} if isinstance(value, dict) else copies[id(value)]
            )
        return StepInputs(**values)

    def copy_(self, other: StepInputs) -> None:
        """Copy the values of `other`, which has the same layout."""
        pairs = {id(target): (target, source) for target, source in zip(self.tensors(), other.tensors(), strict=True)}
        for target, source in pairs.values():
            target.copy_(source, non_blocking=True)


class Draws(NamedTuple):
    """The random numbers of a step, except those of dropout."""

    t: Tensor  # [B] in [0, 1)
    noise: Tensor  # [B, T, M], of standard deviation SIGMA
    keep_tokens: Tensor  # [B] bool
    keep_prompt: Tensor  # [B] bool


class Objective(nn.Module):
    """Loss and metrics of a batch.

    Args:
        generator: draws t, noise and condition dropout on the batch's device. It is the same on every rank: a rank
            takes its rows of the numbers for the global batch, so that they do not depend on the number of ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        teachers: Mapping[str, int],
        generator: torch.Generator | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.generator = generator or torch.Generator()
        self.rank, self.world_size = rank, world_size
        self.backbone = Backbone(config)
        a = config.alignment
        # The same head of every layer in every run, so that a later probe may choose any of them.
        t_grid = sorted(set(config.probe.t_grid)) if a.weights == "by-time" else ()
        every_layer = LayerSelection.uniform(range(config.model.depth), t_grid=t_grid)
        self.alignment = AlignmentLoss(
            config.model.width, teachers, every_layer, a.pool, a.head, a.objective, a.standardise_targets
        )
        # The paper's weights, unless the configuration gives others.
        bitc_weights = {"speech": 0.5} | a.bitc_weights
        self.interface = InterfaceLoss(config.model.token_width, teachers, bitc_weights) if a.bitc else None
        self.stop = None if a.stop_similarity is None else SimilarityStop(a.stop_similarity)

    def heads(self) -> nn.ModuleDict:
        """The alignment heads, and whether alignment has stopped. They are trained and saved apart from the model."""
        parts: dict[str, nn.Module] = {"alignment": self.alignment}
        if self.interface is not None:
            parts["interface"] = self.interface
        if self.stop is not None:
            parts["stop"] = self.stop
        return nn.ModuleDict(parts)

    def draw(self, inputs: StepInputs, generator: torch.Generator | None = None) -> Draws:
        """The random numbers of a step, on the device; from `self.generator` unless another one is given."""
        flow = self.config.flow
        generator = generator or self.generator
        size, frames, mels = inputs.mel.shape

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=inputs.mel.device)

        total = size * self.world_size
        rows = slice(self.rank, None, self.world_size)
        noise = torch.randn(total, frames, mels, generator=generator, device=inputs.mel.device)
        return Draws(
            t=uniform(total)[rows],
            noise=SIGMA * noise[rows],
            keep_tokens=uniform(total)[rows] >= flow.token_dropout,
            keep_prompt=uniform(total)[rows] >= flow.prompt_dropout,
        )

    def forward(
        self, inputs: StepInputs, draws: Draws, align_weight: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and detached metrics, on the device.

        align_weight: a scalar; None skips alignment and its forward. The metrics "flow_loss_t/0-0.25" and so on are the
        flow-matching losses of the samples whose t is in that quarter of [0, 1); nan if there is none.
        """
        x_t, velocity_target = path(inputs.mel, draws.noise, draws.t)
        embedding = self.backbone.embed_tokens(inputs)
        cond = assemble_condition(embedding, inputs.mel, inputs.prompt, draws.keep_tokens, draws.keep_prompt)
        layers = self.alignment.active if align_weight is not None else ()
        velocity, hidden = self.backbone.network(x_t, draws.t, cond, inputs.mask, hidden_layers=layers)
        by_sample = flow_matching_loss(velocity, velocity_target, inputs.mask)
        loss = flow_loss = by_sample.mean()
        metrics = {"flow_loss": flow_loss.detach(), **_by_time(by_sample.detach(), draws.t)}
        if align_weight is not None:
            kind = self.config.alignment.timestep_weight
            weight = None if kind == "uniform" else timestep_weight(draws.t, kind)
            aligned, cosines = self.alignment(
                hidden, inputs.targets, inputs.target_mask, inputs.domains, weight, draws.t
            )
            metrics |= {"align_loss": aligned.detach(), **cosines}
            if self.stop is not None:
                # The cosines of earlier steps decide about this one. It is a copy because backward reads it.
                metrics["align_factor"] = factor = self.stop.factor.clone()
                aligned = aligned * factor
            loss = loss + align_weight * aligned
        if self.interface is not None:
            pooled = {name: pool_target(target, inputs.target_mask) for name, target in inputs.targets.items()}
            tied, cosines = self.interface(embedding, pooled, inputs.mask, inputs.domains, draws.keep_tokens)
            loss = loss + tied
            metrics |= {"bitc_loss": tied.detach(), **cosines}
        metrics["loss"] = loss.detach()
        return loss, metrics

    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        """Note the cosines of an aligned step, which decide whether alignment goes on (alignment.stop_similarity)."""
        if self.stop is not None:
            self.stop(self.alignment.similarity(metrics))

    def gradient_cosines(self, inputs: StepInputs, draws: Draws) -> dict[str, Tensor]:
        """Cosine of the gradients of the two losses at each aligned hidden state: {"gradient_cosine/<layer>": scalar}.

        It is nan for a layer on which no aligned target depends. Parameters' gradients and flags stay as they are. Call
        it in evaluation mode, since dropout would draw random numbers.
        """
        x_t, velocity_target = path(inputs.mel, draws.noise, draws.t)
        cond, _ = self.backbone.condition(inputs)
        layers = self.alignment.active
        velocity, hidden = self.backbone.network(x_t, draws.t, cond, inputs.mask, hidden_layers=layers)
        flow = flow_matching_loss(velocity, velocity_target, inputs.mask).mean()
        aligned, _ = self.alignment(hidden, inputs.targets, inputs.target_mask, inputs.domains, t=draws.t)
        states = [hidden[layer] for layer in layers]
        pairs = [torch.autograd.grad(loss, states, retain_graph=True) for loss in (flow, aligned)]
        cosines = {}
        for layer, one, two in zip(layers, *pairs):
            one, two = one.flatten().float(), two.flatten().float()
            cosines[f"gradient_cosine/{layer}"] = torch.dot(one, two) / (one.norm() * two.norm())
        return cosines

    @torch.no_grad()
    def validate(
        self,
        batch: Batch,
        targets: Mapping[str, Tensor],
        target_mask: Tensor,
        domains: Mapping[str, Tensor],
        t: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of each sample [B] at the given t and noise, without condition dropout; and the raw
        cosines.
        """
        x_t, velocity_target = path(batch.mel, noise, t)
        cond, _ = self.backbone.condition(batch)
        velocity, hidden = self.backbone.network(x_t, t, cond, batch.mask, hidden_layers=self.alignment.active)
        _, cosines = self.alignment(hidden, targets, target_mask, domains, t=t)
        return flow_matching_loss(velocity, velocity_target, batch.mask), cosines


TIME_BINS = 4


def _by_time(loss: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Mean loss of the samples [B] by quarter of their t [B]; nan for a quarter without samples."""
    inside = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1) == torch.arange(TIME_BINS, device=t.device).unsqueeze(1)
    means = torch.where(inside, loss, 0).sum(1) / inside.sum(1)
    edges = [number / TIME_BINS for number in range(TIME_BINS + 1)]
    return {f"flow_loss_t/{edges[n]:g}-{edges[n + 1]:g}": mean for n, mean in enumerate(means.unbind())}


def pool_target(target: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, T, W] over the mask; [B, W] is pooled already and stays as it is."""
    return target if target.dim() == 2 else masked_mean(target, mask)


def teacher_targets(
    teachers: Mapping[str, Teacher | CachedTeacher], batch: Batch, config: RunConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of the batch's clean audio, {teacher: [B, W] or [B, T, W]}, and the frames to align [B, T].

    Pooled targets are means over the frames in which the teacher heard audio. Cached features are those of whole clips:
    frames are read at the times of the crop, and a pooled vector is used for any crop of its clip.
    """
    mask = batch.mask & ~batch.prompt if config.alignment.mask == "span" else batch.mask
    targets = {}
    for name, teacher in teachers.items():
        start = torch.zeros(batch.mel.shape[0], device=batch.mel.device)
        if isinstance(teacher, CachedTeacher):
            features, valid = teacher.load([clip.path for clip in batch.clips], batch.mel.device)
            if teacher.rate:
                start = batch.starts / config.mel.frame_rate
                valid = valid & _heard(batch, start, features.shape[1], teacher.rate, config.mel.sample_rate)
        else:
            features, valid = teacher(batch.audio, batch.audio_lengths, config.mel.sample_rate)
        if config.alignment.pool is not None:
            targets[name] = masked_mean(features, valid)
            continue
        targets[name], heard = align_time(
            features,
            teacher_rate=teacher.rate,
            student_rate=config.mel.frame_rate,
            frames=batch.mel.shape[1],
            # The mel's frames are centred on j / rate, half a frame before align_time's convention.
            offset=start - 0.5 / config.mel.frame_rate,
            teacher_mask=valid,
            student_mask=batch.mask,
        )
        mask = mask & heard
    return targets, mask


def _heard(batch: Batch, start: Tensor, frames: int, rate: float, sample_rate: int) -> Tensor:
    """Which frames of the clip's features begin within the crop: [B, frames] bool. `start` [B] is in seconds."""
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
