"""The training objective: flow matching, alignment and BiT-C of one batch, as one module.

The backbone (network and token conditioner) and the alignment heads are apart: heads are no part of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..alignment.interface import InterfaceLoss
from ..alignment.schedule import timestep_weight
from ..data.batches import Batch
from ..models.conditioning import TokenConditioner, assemble_condition
from ..models.dit import DiT
from ..models.flow import flow_matching_loss
from .aligning import build_aligner
from .config import RunConfig
from .targets import pool_target


class Backbone(nn.Module):
    """The network and the token conditioner: what a checkpoint saves as the model."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        sizes = {name: streams[0] for name, streams in config.data.vocabularies.items()}
        second = {streams[1] for streams in config.data.vocabularies.values() if len(streams) == 2}
        self.config = config
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
    noise: Tensor  # [B, T, M], of the standard deviation that the process has
    keep_tokens: Tensor  # [B] bool
    keep_prompt: Tensor  # [B] bool
    clean_t: Tensor | None = None  # [B] in [t, 1): the times at which Self-Flow's teacher sees the clips


class Objective(nn.Module):
    """Loss and metrics of a batch. Alignment is that of `aligner`, whose heads are parts of this module.

    Args:
        teachers: {name: width} of those whose features come with the inputs. Those that are the network itself
            (`SelfTeacher`) are in the configuration.
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
        self.process = config.flow.process
        self.generator = generator or torch.Generator()
        self.rank, self.world_size = rank, world_size
        self.backbone = Backbone(config)
        self._average: tuple[Backbone, ...] = ()
        a = config.alignment
        self.aligner = build_aligner(config, self.backbone.network, teachers)
        self.alignment, self.stop = self.aligner.loss_fn, self.aligner.stop  # parts of this module
        # The paper's weights, unless the configuration gives others.
        bitc_weights = {name: 0.5 for name in teachers if name == "speech"} | a.bitc_weights
        self.interface = InterfaceLoss(config.model.token_width, teachers, bitc_weights) if a.bitc else None

    def heads(self) -> nn.ModuleDict:
        """The alignment heads, and whether alignment has stopped. They are trained and saved apart from the model."""
        parts: dict[str, nn.Module] = {"alignment": self.alignment}
        if self.interface is not None:
            parts["interface"] = self.interface
        if self.stop is not None:
            parts["stop"] = self.stop
        return nn.ModuleDict(parts)

    def follow(self, average: nn.Module) -> None:
        """Take the moving average of the backbone, whose states are Self-Flow's targets."""
        assert isinstance(average, Backbone)
        self._average = (average,)  # in a tuple, so that it is no part of this module

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
        position = uniform(total)[rows]
        draws = Draws(
            t=self.process.times(position),
            noise=self.process.noise_std * noise[rows],
            keep_tokens=uniform(total)[rows] >= flow.token_dropout,
            keep_prompt=uniform(total)[rows] >= flow.prompt_dropout,
        )
        if not self.aligner.averaged_layers:
            return draws
        # The low half of the 24 random bits behind t says where the cleaner time is. One more draw would give a run
        # with Self-Flow other noise than a run without it, which studies compare in pairs.
        cleaner = (4096 * position).frac()
        return draws._replace(clean_t=torch.lerp(draws.t, torch.ones_like(draws.t), cleaner))

    def forward(
        self, inputs: StepInputs, draws: Draws, align_weight: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and detached metrics, on the device.

        align_weight: a scalar; None skips alignment and its forward. The metric "flow_loss" is the mean squared error
        of what the network predicts, without `flow.weighting`; "flow_loss_t/0-0.25" and so on are those of the samples
        whose t is in that quarter of [0, 1), nan if there is none.
        """
        x_t, target = self.process.point(inputs.mel, draws.noise, draws.t)
        embedding = self.backbone.embed_tokens(inputs)
        cond = assemble_condition(embedding, inputs.mel, inputs.prompt, draws.keep_tokens, draws.keep_prompt)
        layers = self.aligner.layers if align_weight is not None else ()
        output, hidden = self.backbone.network(x_t, draws.t, cond, inputs.mask, hidden_layers=layers)
        by_sample = flow_matching_loss(output, target, inputs.mask)
        metrics = {"flow_loss": by_sample.detach().mean(), **_by_time(by_sample.detach(), draws.t)}
        loss = self._weighted(by_sample, draws.t)
        if align_weight is not None:
            kind = self.config.alignment.timestep_weight
            weight = None if kind == "uniform" else timestep_weight(draws.t, kind)
            averaged = self._averaged(inputs, draws)
            aligned, cosines = self.aligner.evaluate(
                hidden, inputs.targets, inputs.target_mask, inputs.domains, weight, draws.t, averaged=averaged
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

    def _averaged(self, batch: Batch | StepInputs, draws: Draws) -> dict[int, Tensor] | None:
        """The hidden states of the network's average that are targets, at the cleaner times of the draws."""
        layers, clean_t = self.aligner.averaged_layers, draws.clean_t
        if not layers:
            return None
        [average] = self._average
        assert clean_t is not None
        with torch.no_grad():
            x_t, _ = self.process.point(batch.mel, draws.noise, clean_t)
            embedding = average.embed_tokens(batch)
            cond = assemble_condition(embedding, batch.mel, batch.prompt, draws.keep_tokens, draws.keep_prompt)
            return average.network(x_t, clean_t, cond, batch.mask, hidden_layers=layers)[1]

    def _weighted(self, by_sample: Tensor, t: Tensor) -> Tensor:
        """The mean of the samples' losses [B], weighted by their t [B] as `flow.weighting` says."""
        weight = self.process.weight(t)
        return (by_sample if weight is None else weight * by_sample).mean()

    def gradient_cosines(self, inputs: StepInputs, draws: Draws) -> dict[str, Tensor]:
        """`Aligner.gradient_cosines` of the flow loss, without condition dropout.

        Call it in evaluation mode, since dropout would draw random numbers.
        """
        x_t, target = self.process.point(inputs.mel, draws.noise, draws.t)
        cond, _ = self.backbone.condition(inputs)
        output, hidden = self.backbone.network(x_t, draws.t, cond, inputs.mask, hidden_layers=self.aligner.layers)
        flow = self._weighted(flow_matching_loss(output, target, inputs.mask), draws.t)
        return self.aligner.gradient_cosines(
            flow,
            hidden,
            inputs.targets,
            inputs.target_mask,
            inputs.domains,
            draws.t,
            averaged=self._averaged(inputs, draws),
        )

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
        """Mean squared error of each sample's output [B] at the given t and noise, without condition dropout and
        `flow.weighting`; and the raw cosines. Self-Flow's teacher sees the clips half way from t to 1.
        """
        x_t, target = self.process.point(batch.mel, noise, t)
        cond, _ = self.backbone.condition(batch)
        output, hidden = self.backbone.network(x_t, t, cond, batch.mask, hidden_layers=self.aligner.layers)
        kept = torch.ones_like(t, dtype=torch.bool)
        averaged = self._averaged(batch, Draws(t, noise, kept, kept, (1 + t) / 2))
        _, cosines = self.aligner.evaluate(hidden, targets, target_mask, domains, t=t, averaged=averaged)
        return flow_matching_loss(output, target, batch.mask), cosines


TIME_BINS = 4


def _by_time(loss: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Mean loss of the samples [B] by quarter of their t [B]; nan for a quarter without samples."""
    inside = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1) == torch.arange(TIME_BINS, device=t.device).unsqueeze(1)
    means = torch.where(inside, loss, 0).sum(1) / inside.sum(1)
    edges = [number / TIME_BINS for number in range(TIME_BINS + 1)]
    return {f"flow_loss_t/{edges[n]:g}-{edges[n + 1]:g}": mean for n, mean in enumerate(means.unbind())}
