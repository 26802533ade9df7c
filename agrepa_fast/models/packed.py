"""Attention over valid frames alone: all samples' valid frames in one row, with a block-diagonal mask between them.

It uses xformers' memory-efficient attention and is for batches of very different lengths. The number of packed frames
is read from the mask, which waits for the device once per forward; for batches in buckets of fixed lengths SDPA is
better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Packing:
    """The places of a batch's valid frames. mask: [B, T] bool."""

    def __init__(self, mask: Tensor) -> None:
        ops = _xformers()
        self.rows = mask.flatten().nonzero().squeeze(1)
        self.total = mask.numel()
        self.bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(mask.sum(1).tolist())
        self.attend: Any = ops.memory_efficient_attention

    def attention(self, qkv: Tensor, dropout: float) -> Tensor:
        """qkv [B, T, 3, H, d] -> [B, T, H d], zero where the mask is False."""
        batch, frames, _, heads, size = qkv.shape
        packed = qkv.flatten(0, 1).index_select(0, self.rows).unsqueeze(0)
        mixed = self.attend(*packed.unbind(2), attn_bias=self.bias, p=dropout)
        whole = mixed.new_zeros(self.total, heads * size)
        return whole.index_copy(0, self.rows, mixed.flatten(2).squeeze(0)).view(batch, frames, heads * size)


def _xformers() -> Any:
    try:
        import xformers.ops
    except ImportError as error:
        raise ImportError("attention 'xformers' needs xformers: pip install 'agrepa-fast[xformers]'") from error
    return xformers.ops


def check(device: torch.device) -> str | None:
    """Why packed attention cannot run on `device`; None if it can."""
    try:
        _xformers()
    except ImportError as error:
        return str(error)
    return None if device.type == "cuda" else f"xformers' attention needs a CUDA device, this is {device.type}"
