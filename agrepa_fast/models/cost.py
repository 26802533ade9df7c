"""Floating point operations of a DiT from its sizes. A multiply-add counts as two; pointwise work is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dit import DiTConfig


def branch_flops(width: int, ff_ratio: int, frames: int) -> tuple[int, int]:
    """Operations of a block's attention and of its feed-forward on one sequence; attention's two products count."""
    attention = 8 * frames * width**2 + 4 * frames**2 * width
    return attention, 4 * ff_ratio * frames * width**2


def block_flops(config: DiTConfig, sequences: int, frames: int) -> int:
    """Operations of one block."""
    return sequences * sum(branch_flops(config.width, config.ff_ratio, frames))


def ends_flops(config: DiTConfig, sequences: int, streams: int, frames: int) -> int:
    """Input Linear, time embedding and modulation of all blocks, and the output Linear for every stream."""
    width = config.width
    entry = 2 * sequences * frames * (config.mels + config.cond) * width
    time = 2 * sequences * (8 * width**2 + config.depth * 6 * width**2)
    return entry + time + 2 * streams * sequences * frames * width * config.mels


def forward_flops(config: DiTConfig, sequences: int, frames: int) -> int:
    """One forward. A training step needs three times as much: backward has two products for each of the forward's."""
    return config.depth * block_flops(config, sequences, frames) + ends_flops(config, sequences, 1, frames)
