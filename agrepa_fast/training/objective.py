"""The training objective: flow matching, alignment and BiT-C of one batch, as one module.

Backbone (network and token conditioner) and alignment heads are apart: the heads are no part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..alignment.loss import AlignmentLoss, InterfaceLoss
from ..alignment.policy import LayerSelection
from ..alignment.resample import align_time
from ..alignment.schedule import SimilarityStop, timestep_weight
from ..data.batches import Batch
from ..errors import UserError
from ..models.conditioning import TokenConditioner, assemble_condition
from ..models.dit import DiT
from ..models.flow import SIGMA, flow_matching_loss, path
from ..ops import masked_mean
from ..teachers.cache import CachedTeacher
from ..teachers.registry import Teacher
from .config import RunConfig


class Backbone(nn.Module):
    """What a checkpoint of the model holds: the network and the token conditioner."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        sizes = {name: streams[0] for name, streams in config.data.vocabularies.items()}
        second = {streams[1] for streams in config.data.vocabularies.values() if len(streams) == 2}
        if len(second) > 1:
            raise UserError("data.vocabularies: the second stream needs one size for all vocabularies")
        self.conditioner = TokenConditioner(sizes, config.model.token_width, second.pop() if second else 0)
        self.network = DiT(config.dit)

    def embed_tokens(self, batch: Batch) -> Tensor:
        """Token embedding per mel frame [B, T, C]."""
        return self.conditioner(batch.tokens, batch.token_lengths, batch.vocabulary, batch.mask)

    def condition(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The full condition and guidance's null condition, each [B, T, C + M]; nothing is dropped."""
        embedding = self.embed_tokens(batch)
        return (
            assemble_condition(embedding, batch.mel, batch.prompt),
            assemble_condition(torch.zeros_like(embedding), batch.mel, batch.prompt),
        )


class Objective(nn.Module):
    """Loss and metrics of a batch. t, noise and condition dropout are drawn on the batch's device."""

    def __init__(self, config: RunConfig, teachers: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        every_layer = LayerSelection.uniform(range(config.model.depth))
        a = config.alignment
        self.alignment = AlignmentLoss(
            config.model.width, teachers, every_layer, a.pool, a.head, a.objective, a.standardise_targets
        )
        self.interface = InterfaceLoss(config.model.token_width, teachers, a.bitc_weights) if a.bitc else None
        self.stop = None if a.stop_similarity is None else SimilarityStop(a.stop_similarity)

    def heads(self) -> nn.ModuleDict:
        """The alignment heads, and whether alignment has stopped: trained along, saved apart, absent at inference."""
        parts: dict[str, nn.Module] = {"alignment": self.alignment}
        if self.interface is not None:
            parts["interface"] = self.interface
        if self.stop is not None:
            parts["stop"] = self.stop
        return nn.ModuleDict(parts)

    def forward(
        self,
        batch: Batch,
        targets: Mapping[str, Tensor],
        target_mask: Tensor,
        domains: Mapping[str, Tensor],
        align_weight: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and detached metrics on the device.

        targets: {teacher: [B, W] or [B, T, W]}; target_mask: [B, T] frames to align; domains: {teacher: [B]};
        align_weight: 0 leaves alignment out (its forward too).
        """
        flow = self.config.flow
        size, device = batch.mel.shape[0], batch.mel.device
        keep_tokens = torch.rand(size, device=device) >= flow.token_dropout
        keep_prompt = torch.rand(size, device=device) >= flow.prompt_dropout
        t = torch.rand(size, device=device)
        noise = SIGMA * torch.randn_like(batch.mel)
        x_t, velocity_target = path(batch.mel, noise, t)
        embedding = self.backbone.embed_tokens(batch)
        cond = assemble_condition(embedding, batch.mel, batch.prompt, keep_tokens, keep_prompt)
        layers = self.alignment.active if align_weight else ()
        velocity, hidden = self.backbone.network(x_t, t, cond, batch.mask, hidden_layers=layers)
        loss = flow_loss = flow_matching_loss(velocity, velocity_target, batch.mask).mean()
        metrics = {"flow_loss": flow_loss.detach()}
        if align_weight:
            kind = self.config.alignment.timestep_weight
            by_time = None if kind == "uniform" else timestep_weight(t, kind)
            aligned, cosines = self.alignment(hidden, targets, target_mask, domains, by_time)
            metrics |= {"align_loss": aligned.detach(), **cosines}
            if self.stop is not None:
                # Of the steps before: this step's cosine decides about the next. A copy, as backward reads it.
                metrics["align_factor"] = factor = self.stop.factor.clone()
                aligned = aligned * factor
                self.stop(self.alignment.similarity(cosines))
            loss = loss + align_weight * aligned
        if self.interface is not None:
            pooled = {name: pool_target(target, target_mask) for name, target in targets.items()}
            tied, cosines = self.interface(embedding, pooled, batch.mask, domains, keep_tokens)
            loss = loss + tied
            metrics |= {"bitc_loss": tied.detach(), **cosines}
        metrics["loss"] = loss.detach()
        return loss, metrics

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
        """Flow-matching loss per sample [B] at given t and noise, condition whole; and the raw cosines."""
        x_t, velocity_target = path(batch.mel, noise, t)
        cond, _ = self.backbone.condition(batch)
        velocity, hidden = self.backbone.network(x_t, t, cond, batch.mask, hidden_layers=self.alignment.active)
        _, cosines = self.alignment(hidden, targets, target_mask, domains)
        return flow_matching_loss(velocity, velocity_target, batch.mask), cosines


def pool_target(target: Tensor, mask: Tensor) -> Tensor:
    """[B, W] as it is; [B, T, W] to its mean over the mask."""
    return target if target.dim() == 2 else masked_mean(target, mask)


def teacher_targets(
    teachers: Mapping[str, Teacher | CachedTeacher], batch: Batch, config: RunConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of the batch's clean audio, {teacher: [B, W] or [B, T, W]}, and the frames to align [B, T].

    Pooled targets are means over the frames in which the teacher heard audio. Cached features are of whole clips:
    frames are read at the crop's times, a pooled vector stands for any crop of its clip."""
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
    """[B, frames] bool: a frame of the clip's features begins within the crop; `start` [B] in seconds."""
    begin = torch.arange(frames, device=start.device) / rate
    stop = start + batch.audio_lengths / sample_rate
    # A frame that begins when the crop does is within it, whatever the last bit of the division says.
    return (begin >= start.unsqueeze(1) - 1e-4) & (begin < stop.unsqueeze(1) - 1e-4)


def domain_tables(config: RunConfig, domains: Sequence[str]) -> dict[str, Tensor]:
    """{teacher: [number of domains] bool}, whether the teacher speaks for each domain.

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
