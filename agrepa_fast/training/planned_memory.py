"""The memory of a training step on a CUDA device, worked out without one from tensors that have no data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..alignment.selection import LayerSelection
from .config import RunConfig
from .objective import Backbone, Draws, Objective, StepInputs

DEVICE = "cuda"
FLOAT = 4  # bytes: weights, gradients, moments and EMA are float32
TOKENS_PER_SECOND = 50


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank, and the numbers of parameters that they follow from."""

    parameters: int  # of the network and the token conditioner
    heads: int  # parameters of the alignment heads
    activations: int  # what the forward of the largest batch keeps for the backward

    @property
    def weights(self) -> int:
        return FLOAT * (self.parameters + self.heads)

    @property
    def gradients(self) -> int:
        return self.weights

    @property
    def moments(self) -> int:
        """AdamW's two."""
        return 2 * self.weights

    @property
    def ema(self) -> int:
        return FLOAT * self.parameters

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk."""
        return self.weights + self.ema + self.moments

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.ema + self.activations


def step_memory(config: RunConfig, widths: Mapping[str, int], samples: int, frames: int) -> StepMemory:
    """The memory of training on batches of `samples` x `frames`, aligned with teachers of these widths.

    The objective's own forward runs on tensors without data, and everything that autograd keeps is counted, each
    storage once. Attention counts as its fused kernels: q, k, v, the result, and a float32 for each head and frame.
    """
    a = config.alignment
    aligned = a.enabled and a.weight > 0
    with FakeTensorMode(), torch.device(DEVICE):
        objective = Objective(config, widths).train()
        if aligned:
            objective.alignment.select(LayerSelection.uniform(range(config.probe.k)))
        objective.backbone.network.recompute = config.train.recompute
        objective.follow(Backbone(config).requires_grad_(False).eval())
        parts = (objective.backbone, objective.heads())
        parameters, heads = (sum(p.numel() for p in part.parameters()) for part in parts)
        inputs, draws = _inputs(config, widths, samples, frames)
        weight = torch.empty(()) if aligned else None
        with _kept(objective) as kept, _FusedAttention(), _autocast(config.train.precision != "fp32"):
            objective(inputs, draws, weight)
        activations = sum(kept.values())
    return StepMemory(parameters, heads, activations)


def _inputs(config: RunConfig, widths: Mapping[str, int], samples: int, frames: int) -> tuple[StepInputs, Draws]:
    seconds = frames / config.grid.frame_rate
    tokens = max(1, math.ceil(seconds * TOKENS_PER_SECOND))
    streams = len(next(iter(config.data.vocabularies.values())))
    flags = torch.ones(samples, dtype=torch.bool)
    counts = torch.zeros(samples, dtype=torch.int64)
    mask = torch.ones(samples, frames, dtype=torch.bool)
    mel = torch.empty(samples, frames, config.grid.mels)
    shape = (samples,) if config.alignment.pool else (samples, frames)
    inputs = StepInputs(
        mel=mel,
        mask=mask,
        prompt=mask,
        tokens=torch.zeros(samples, tokens, streams, dtype=torch.int64),
        token_lengths=counts,
        vocabulary=counts,
        targets={name: torch.empty(*shape, width) for name, width in widths.items()},
        target_mask=mask,
        domains=dict.fromkeys(config.alignment.teachers, flags),
    )
    t = torch.empty(samples)
    return inputs, Draws(t, torch.empty_like(mel), flags, flags, t)


@contextmanager
def _kept(module: nn.Module) -> Iterator[dict[int, int]]:
    """{storage: bytes} of what autograd keeps for the backward, without the parameters and buffers of the module."""
    found: dict[int, int] = {}
    known = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    alive: list[Tensor] = []  # a storage's address must not be used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _FusedAttention(TorchFunctionMode):
    """Without a CUDA device torch would pick attention that keeps its weights, [B, H, T, T]."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attend.apply(*args[:3])
        return func(*args, **(kwargs or {}))


@contextmanager
def _autocast(bf16: bool) -> Iterator[None]:
    """bfloat16 autocast for tensors of a CUDA device that need not exist, which `torch.autocast` would refuse."""
    before = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
    torch.set_autocast_enabled(DEVICE, bf16)
    torch.set_autocast_dtype(DEVICE, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(DEVICE, before[0])
        torch.set_autocast_dtype(DEVICE, before[1])
        torch.clear_autocast_cache()
