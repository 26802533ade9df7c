"""Floating point operations of a DiT, from its sizes: multiply-adds count twice, pointwise work is left out."""

from __future__ import annotations

from .dit import DiTConfig


def block_flops(config: DiTConfig, sequences: int, frames: int) -> int:
    """One block: its four matrices on every frame, and attention's two products."""
    matrices = (4 + 2 * config.ff_ratio) * config.width**2
    return 2 * sequences * frames * matrices + 4 * sequences * frames**2 * config.width


def ends_flops(config: DiTConfig, sequences: int, streams: int, frames: int) -> int:
    """Input Linear, time embedding, modulation of all blocks; output Linear for every stream."""
    width = config.width
    entry = 2 * sequences * frames * (config.mels + config.cond) * width
    time = 2 * sequences * (8 * width**2 + config.depth * 6 * width**2)
    return entry + time + 2 * streams * sequences * frames * width * config.mels


def forward_flops(config: DiTConfig, sequences: int, frames: int) -> int:
    """One forward. A training step is three: backward has two products for each of the forward's."""
    return config.depth * block_flops(config, sequences, frames) + ends_flops(config, sequences, 1, frames)
