"""A compact diffusion transformer (DiT) that predicts the flow-matching velocity of a mel spectrogram.

x_t [B, T, M], t [B], cond [B, T, C] -> velocity [B, T, M]. Training decides what it predicts: with another
`process.Process` the same network predicts v, the noise or the data, where this file says velocity; M are the channels
of codec latents as well. The network is a list of branches (attention and feed-forward in turn) with one op between
them, `gated_residual_norm`, which closes one branch and opens the next, across block borders. The modulation of all
blocks comes from one Linear, once per forward.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..buffers import FixedBuffers
from .packed import Packing

EPS = 1e-6


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a `DiT`. The preset `paper` is the network of AG-REPA (arXiv 2603.01006): 24 blocks of width 1024."""

    depth: int = 24  # blocks; each has an attention and a feed-forward branch
    width: int = 1024
    heads: int = 16
    mels: int = 100  # mel bins of x_t and of the velocity
    cond: int = 1124  # channels of the condition: token embedding, then reference mel; 0 for none
    ff_ratio: int = 4  # inner width of the feed-forward, as a multiple of `width`
    dropout: float = 0.2  # dropout of the attention weights and in the feed-forward, while training
    max_frames: int = 2048  # length of the position table

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "mels", "cond", "ff_ratio", "max_frames"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name}: expected an integer, got {value!r:.60}")
            if value < 1 and name != "cond":
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads ({self.heads}), got {self.width}")
        if self.width % 2:
            raise ValueError(f"width: expected an even number (sinusoids come in pairs), got {self.width}")
        if self.cond < 0:
            raise ValueError(f"cond: expected 0 or more channels, got {self.cond}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DiTConfig:
        """One of `demo`, `small`, `base`, `paper`, with fields changed by keyword."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], **changes)


PRESETS = {
    "demo": DiTConfig(depth=8, width=128, heads=4, mels=64, cond=96 + 64, dropout=0.0),
    "small": DiTConfig(depth=12, width=384, heads=6, cond=256 + 100, dropout=0.1),
    "base": DiTConfig(depth=12, width=768, heads=12, cond=512 + 100, dropout=0.1),
    "paper": DiTConfig(),
}


def position_table(frames: int, width: int) -> Tensor:
    """Fixed sinusoids [frames, width]: sin on even channels, cos on odd, base 10000 (arXiv 1706.03762)."""
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angle = torch.arange(frames, dtype=torch.float64).unsqueeze(1) * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


def time_sinusoid(t: Tensor, width: int) -> Tensor:
    """t [B] in [0, 1] -> [B, width]: cosines, then sines, of t itself; longest period 10000."""
    half = width // 2
    rate = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10000.0) / half))
    angle = t.unsqueeze(1) * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Attention(nn.Module):
    """Self-attention branch: h [B, T, D] -> [B, T, D]; key mask [B, 1, 1, T] bool, True = attend."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, key_mask: Tensor | Packing | None = None) -> Tensor:
        batch, frames, width = h.shape
        qkv = self.qkv(h).view(batch, frames, 3, self.heads, width // self.heads)
        dropout = self.dropout if self.training else 0.0
        if isinstance(key_mask, Packing):
            return self.out(key_mask.attention(qkv, dropout))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, frames, width))


class FeedForward(nn.Module):
    """Position-wise branch with exact GELU: h [B, T, D] -> [B, T, D]. It takes a mask to have Attention's signature."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, h: Tensor, key_mask: Tensor | Packing | None = None) -> Tensor:
        return self.down(F.dropout(F.gelu(self.up(h)), self.dropout, self.training))


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one branch, each [B, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class DiT(FixedBuffers):
    """Diffusion transformer with adaLN-zero modulation (arXiv 2212.09748); its residual stream is made of one op.

    `branches[2 l]` is the attention of block l and `branches[2 l + 1]` its feed-forward; layers are 0-based. At its
    initialisation every block is the identity and the velocity is zero.

    Raises:
        TypeError: config is no `DiTConfig`.
    """

    positions: Tensor
    recompute: bool  # activation checkpointing: while training, backward runs each branch's forward again
    packed: bool  # attention over the valid frames alone, by xformers; see `packed.Packing`

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        if not isinstance(config, DiTConfig):
            raise TypeError(f"config: expected a DiTConfig, got {type(config).__name__}")
        self.config = config
        self.recompute = self.packed = False
        width = config.width
        self.input = nn.Linear(config.mels + config.cond, width)
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, config.depth * 6 * width)
        self.branches = nn.ModuleList()
        for _ in range(config.depth):
            self.branches.append(Attention(width, config.heads, config.dropout))
            self.branches.append(FeedForward(width, config.ff_ratio * width, config.dropout))
        self.output_norm = nn.LayerNorm(width, eps=EPS)
        self.output = nn.Linear(width, config.mels)
        self.register_buffer("positions", self.constants()["positions"], persistent=False)
        self._initialise()

    def constants(self) -> dict[str, Tensor]:
        """The buffer with one row for each position."""
        return {"positions": position_table(self.config.max_frames, self.config.width)}

    def _initialise(self) -> None:
        """Initialise every block as the identity and the velocity as zero (adaLN-zero)."""
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)
        for branch in self.branches:
            if isinstance(branch, Attention):
                nn.init.xavier_uniform_(branch.qkv.weight)
                nn.init.zeros_(branch.qkv.bias)
                last = branch.out
            else:
                assert isinstance(branch, FeedForward)
                nn.init.xavier_uniform_(branch.up.weight)
                nn.init.zeros_(branch.up.bias)
                last = branch.down
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def depth(self) -> int:
        return self.config.depth

    def open(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Modulation]]:
        """The residual stream before block 0 [B, T, D], and the modulation of each of the 2 L branches."""
        self._check_input(x_t, t, cond, mask)
        x = x_t if cond is None else torch.cat([x_t, cond], dim=-1)
        if mask is not None:
            # Padding may hold nan. Attention gives a padded frame the weight 0, and 0 * nan would reach every frame;
            # so it would reach the weights' gradients.
            x = torch.where(mask.unsqueeze(-1), x, 0)
        x = self.input(x)
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        wide = torch.promote_types(self.positions.dtype, x.dtype)
        embedded = self.time(time_sinusoid(t.to(wide), self.config.width).to(x.dtype))
        m = self.modulation(F.silu(embedded)).view(t.shape[0], self.depth, 6, self.config.width)
        # Chunk order of the released network: scale, shift of attention; of feed-forward; the two gates.
        return x, [
            Modulation(scale=m[:, layer, 2 * j], shift=m[:, layer, 2 * j + 1], gate=m[:, layer, 4 + j])
            for layer in range(self.depth)
            for j in (0, 1)
        ]

    def close(self, x: Tensor) -> Tensor:
        """From the residual stream after the last block [R, T, D] to the velocity [R, T, M]."""
        return self.output(self.output_norm(x))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        mask: Tensor | None = None,
        hidden_layers: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Velocity at (x_t, t).

        Args:
            x_t: [B, T, M] noisy mel.
            t: [B] in [0, 1], 0 = noise, 1 = data.
            cond: [B, T, C], or None for a model without a condition.
            mask: [B, T] bool, True = real frame. No frame attends to padded frames, and what x_t and cond hold there,
                nan included, does not change the others.
            hidden_layers: 0-based blocks whose output (the residual stream, [B, T, D]) is returned too.

        Returns:
            velocity [B, T, M]; with `hidden_layers`, also {layer: hidden state}.

        Raises:
            ValueError: a shape or a layer does not fit.
        """
        wanted = frozenset(() if hidden_layers is None else hidden_layers)
        if not wanted <= frozenset(range(self.depth)):
            raise ValueError(f"hidden_layers: expected 0-based layers below {self.depth}, got {sorted(wanted)}")
        x, modulation = self.open(x_t, t, cond, mask)
        key_mask: Tensor | Packing | None = self.key_mask(mask)
        if self.packed and mask is not None:
            key_mask = Packing(mask)
        hidden: dict[int, Tensor] = {}
        h = ops.layer_norm_modulate(x, modulation[0].shift, modulation[0].scale, eps=EPS)
        last = len(self.branches) - 1
        for i, branch in enumerate(self.branches):
            if self.recompute and self.training and torch.is_grad_enabled():
                out = checkpoint(branch, h, key_mask, use_reentrant=False)
            else:
                out = branch(h, key_mask)
            gate = modulation[i].gate
            if i < last:
                opening = modulation[i + 1]
                x, h = ops.gated_residual_norm(x, out, gate, opening.shift, opening.scale, eps=EPS)
            else:
                x = ops.gated_residual(x, out, gate)
            if i % 2 and i // 2 in wanted:
                hidden[i // 2] = x
        velocity = self.close(x)
        return velocity if hidden_layers is None else (velocity, hidden)

    def key_mask(self, mask: Tensor | None) -> Tensor | None:
        """[B, T] bool -> [B, 1, 1, T] for attention."""
        return None if mask is None else mask[:, None, None, :]

    def _check_input(self, x_t: Tensor, t: Tensor, cond: Tensor | None, mask: Tensor | None) -> None:
        c = self.config
        for name, value in (("x_t", x_t), ("t", t), ("cond", cond), ("mask", mask)):
            if not isinstance(value, Tensor) and (value is not None or name in ("x_t", "t")):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if x_t.dim() != 3 or x_t.shape[2] != c.mels or 0 in x_t.shape:
            raise ValueError(f"x_t: expected non-empty [batch, frames, {c.mels}], got {list(x_t.shape)}")
        batch, frames, _ = x_t.shape
        if frames > c.max_frames:
            raise ValueError(f"x_t has {frames} frames, more than max_frames={c.max_frames} of the DiTConfig")
        if t.shape != (batch,):
            raise ValueError(f"t: expected [{batch}], got {list(t.shape)}")
        if (cond is None) != (c.cond == 0) or (cond is not None and cond.shape != (batch, frames, c.cond)):
            got = "None" if cond is None else list(cond.shape)
            raise ValueError(f"cond: expected {[batch, frames, c.cond] if c.cond else None}, got {got}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, frames)):
            raise ValueError(f"mask: expected bool {[batch, frames]}, got {mask.dtype} {list(mask.shape)}")

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], heads: int = 16, dropout: float = 0.2) -> DiT:
        """Load the network from a checkpoint in the layout of AG-REPA's released code.

        Sizes are read from the shapes, except the number of heads, which the shapes do not show. Token tables, teacher
        projections and alignment heads in the state dict belong to other modules and are ignored
        (`TokenConditioner.from_released` reads the tables).

        Raises:
            ValueError: names the first missing key, or the shape that does not fit.
        """
        layers = {int(m[1]) for key in state_dict if (m := re.match(r"blocks\.(\d+)\.", key))}
        for key in ("input_proj.weight", "output_layer.1.weight", "blocks.0.ff.0.weight"):
            if key not in state_dict:
                raise ValueError(f"released checkpoint: no {key!r} among its {len(state_dict)} keys")
        width, channels = state_dict["input_proj.weight"].shape
        mels = state_dict["output_layer.1.weight"].shape[0]
        config = DiTConfig(
            depth=max(layers) + 1,
            width=width,
            heads=heads,
            mels=mels,
            cond=channels - mels,
            ff_ratio=state_dict["blocks.0.ff.0.weight"].shape[0] // width,
            dropout=dropout,
            max_frames=state_dict["pos_emb"].shape[-2] if "pos_emb" in state_dict else 2048,
        )
        model = cls(config)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        renamed = {}
        for name, source in released_names(config).items():
            rows, *rest = shapes[name]
            expected = [rows // len(source), *rest]
            for key in source:
                if key not in state_dict:
                    raise ValueError(f"released checkpoint: no {key!r} (for {name})")
                if list(state_dict[key].shape) != expected:
                    raise ValueError(
                        f"released checkpoint: {key!r} is {list(state_dict[key].shape)}, expected {expected}"
                    )
            renamed[name] = torch.cat([state_dict[key] for key in source])
        model.load_state_dict(renamed)
        return model


def released_names(config: DiTConfig) -> dict[str, list[str]]:
    """{name of our parameter: released names}; several are concatenated on the first axis."""
    names = {}
    for kind in ("weight", "bias"):
        names[f"input.{kind}"] = [f"input_proj.{kind}"]
        names[f"time.0.{kind}"] = [f"time_embed.0.{kind}"]
        names[f"time.2.{kind}"] = [f"time_embed.2.{kind}"]
        names[f"modulation.{kind}"] = [f"blocks.{n}.time_mlp.1.{kind}" for n in range(config.depth)]
        names[f"output_norm.{kind}"] = [f"output_layer.0.{kind}"]
        names[f"output.{kind}"] = [f"output_layer.1.{kind}"]
        for n in range(config.depth):
            names[f"branches.{2 * n}.qkv.{kind}"] = [f"blocks.{n}.attn.in_proj_{kind}"]
            names[f"branches.{2 * n}.out.{kind}"] = [f"blocks.{n}.attn.out_proj.{kind}"]
            names[f"branches.{2 * n + 1}.up.{kind}"] = [f"blocks.{n}.ff.0.{kind}"]
            names[f"branches.{2 * n + 1}.down.{kind}"] = [f"blocks.{n}.ff.3.{kind}"]
    return names
