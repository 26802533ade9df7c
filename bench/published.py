"""The network and the probe in their published form: rivals, and an independent reference.

This is a second implementation of arXiv 2603.01006 in plain torch.nn, with the parameter names of the released
checkpoints.
Shapes as `agrepa_fast.DiT`: x_t [B, T, M], t [B], cond [B, T, C] -> velocity [B, T, M].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agrepa_fast.models.dit import DiT, DiTConfig, released_names


class Block(nn.Module):
    """x [B, T, D], time embedding [B, D] -> [B, T, D]. `keep_weights`: compute attention's weights, as the released
    code.
    """

    def __init__(self, config: DiTConfig, keep_weights: bool) -> None:
        super().__init__()
        width, inner = config.width, config.ff_ratio * config.width
        self.keep_weights = keep_weights
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, config.heads, dropout=config.dropout, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(inner, width))
        self.time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, embedded: Tensor, key_mask: Tensor | None = None) -> Tensor:
        modulation = self.time_mlp(embedded).unsqueeze(1).chunk(6, dim=-1)
        scale_attn, shift_attn, scale_ff, shift_ff, gate_attn, gate_ff = modulation
        h = self.norm1(x) * (1 + scale_attn) + shift_attn
        x = x + gate_attn * self._attend(h, key_mask)
        h = self.norm2(x) * (1 + scale_ff) + shift_ff
        return x + gate_ff * self.ff(h)

    def _attend(self, h: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.keep_weights:
            mixed, _ = self.attn(h, h, h, need_weights=True, key_padding_mask=None if key_mask is None else ~key_mask)
            return mixed
        batch, frames, width = h.shape
        heads = self.attn.num_heads
        qkv = F.linear(h, self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = (part.view(batch, frames, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        dropout = self.attn.dropout if self.training else 0.0
        attend = None if key_mask is None else key_mask[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        return self.attn.out_proj(mixed.transpose(1, 2).reshape(batch, frames, width))


class PublishedDiT(nn.Module):
    """The network as the paper describes it: a modulation Linear in each block, eager norms and gates."""

    pos_emb: Tensor
    rates: Tensor

    def __init__(self, config: DiTConfig, keep_weights: bool) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.input_proj = nn.Linear(config.mels + config.cond, width)
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.blocks = nn.ModuleList(Block(config, keep_weights) for _ in range(config.depth))
        self.output_layer = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, config.mels))
        angle = torch.arange(config.max_frames, dtype=torch.float64)[:, None] * _rates(width)
        table = torch.empty(config.max_frames, width, dtype=torch.float64)
        table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
        self.register_buffer("pos_emb", table.float(), persistent=False)
        self.register_buffer("rates", _rates(width).float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PublishedDiT:
        """Convert the module, but keep the time embedding's rates in float32 or wider."""
        super()._apply(fn, recurse)
        self.rates = _rates(self.config.width).to(
            self.rates.device, torch.promote_types(self.rates.dtype, torch.float32)
        )
        return self

    def begin(self, x_t: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream before block 0 [B, T, D] and the time embedding [B, D]."""
        x = self.input_proj(torch.cat([x_t, cond], dim=-1))
        # In the projection's dtype, because under autocast a float32 table would make the whole stream float32.
        x = x + self.pos_emb[: x_t.shape[1]].to(x.dtype)
        angle = t[:, None].to(self.rates.dtype) * self.rates
        return x, self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.pos_emb.dtype))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor,
        skip: int | None = None,
        hidden_layers: Sequence[int] = (),
        run_block: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Velocity, with block `skip` switched off, and the hidden states asked for.

        mask: [B, T] bool, frames to attend to (the released code has none).
        run_block: calls a block (a compiled one, say); None calls it directly.
        """
        x, embedded = self.begin(x_t, t, cond)
        hidden = {}
        for layer, block in enumerate(self.blocks):
            if layer != skip:
                x = block(x, embedded, mask) if run_block is None else run_block(block, x, embedded)
            if layer in hidden_layers:
                hidden[layer] = x
        return self.output_layer(x), hidden


def _rates(width: int) -> Tensor:
    """The width / 2 frequencies 10000^(-2 i / width), float64."""
    return torch.exp(torch.arange(width // 2, dtype=torch.float64) * (-2 * math.log(10000.0) / width))


def random_dit(config: DiTConfig, device: torch.device | None = None) -> DiT:
    """A DiT with random weights everywhere, since at the adaLN-zero initialisation its velocity is zero.

    It is made on its device: on the CPU a network of the paper's size takes many seconds to initialise.
    """
    device = torch.get_default_device() if device is None else device
    torch.manual_seed(0)
    with device, torch.no_grad():
        model = DiT(config)
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5 if parameter.dim() > 1 else 0.02)
        model.output_norm.weight.add_(1.0)
    return model


def published(model: DiT, keep_weights: bool) -> PublishedDiT:
    """The published form with the same weights, device and dtype. It is made on the device, as `random_dit`."""
    parameter = next(model.parameters())
    with parameter.device:
        network = PublishedDiT(model.config, keep_weights)
    released: dict[str, Tensor] = {}
    state = model.state_dict()
    for name, sources in released_names(model.config).items():
        released |= zip(sources, state[name].chunk(len(sources)))
    network.load_state_dict(released)
    return network.to(parameter.dtype)


@torch.no_grad()
def foga_loop(
    network: PublishedDiT,
    inputs: Mapping[str, Tensor],
    host_sync: bool = False,
    run_block: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """FoG-A as a loop of forwards: the baseline, then one for each layer without its block -> scores [L, B].

    host_sync: read every score from the device at once, as the released code does.
    """
    base, _ = network(**inputs, run_block=run_block)
    energy = (base.float() if base.dtype != torch.float64 else base).square().mean((-2, -1))
    scores: list[Any] = []
    for layer in range(network.config.depth):
        velocity, _ = network(**inputs, skip=layer, run_block=run_block)
        change = (velocity - base).to(energy.dtype).square().mean((-2, -1))
        score = (change + 1e-8).sqrt() / ((energy + 1e-8).sqrt() + 1e-8)
        scores.append(score.cpu() if host_sync else score)
    return torch.stack(scores)
