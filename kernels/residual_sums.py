"""Add up the partial rows of the backward of the residual stream, in a fixed order and without atomics."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, alignment, launch, unspecialised

ROWS, _COLUMNS, _WARPS = 64, 32, 4  # tile: partial rows, columns; warps
# weight and bias have a launch of their own, in which they take the places of these.
_PLACE = {"bias": "shift", "weight": "scale"}


class Sums(NamedTuple):
    """The tensors that the kernel adds up, or writes; None for those that are absent."""

    shift: Any = None
    scale: Any = None
    gate: Any = None


@triton.jit
def _sum_kernel(
    partials,
    sums,
    stream_scale_ptr,
    sample_index_ptr,
    sizes,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add up the partial rows of one sample, in their order; partial row p belongs to sequence p // per_sequence."""
    sequences, per_sequence, width = sizes[0] >> 4, sizes[1] >> 4, (sizes[2] >> 4) * UNIT
    tiles = tl.cdiv(width, BLOCK_D)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    c = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_c = c < width
    if sample_index_ptr is None:
        first = sample * per_sequence
        last = first + per_sequence
    else:
        first = sample * 0
        last = first + sequences * per_sequence
    shift = tl.zeros((BLOCK_P, BLOCK_D), ACC)
    scale = tl.zeros((BLOCK_P, BLOCK_D), ACC)
    gate = tl.zeros((BLOCK_P, BLOCK_D), ACC)
    start = first
    while start < last:
        p = start + tl.arange(0, BLOCK_P)
        in_sample = p < last
        sequence = p // per_sequence
        if sample_index_ptr is not None:
            in_sample = in_sample & (tl.load(sample_index_ptr + sequence, mask=in_sample, other=-1) == sample)
        mask = in_sample[:, None] & in_c[None, :]
        offsets = p[:, None] * width + c[None, :]
        if sums.shift is not None:
            shift += tl.load(partials.shift + offsets, mask=mask, other=0.0)
        if sums.scale is not None:
            scale += tl.load(partials.scale + offsets, mask=mask, other=0.0)
        if sums.gate is not None:
            rows = tl.load(partials.gate + offsets, mask=mask, other=0.0)
            if stream_scale_ptr is not None:
                rows *= tl.load(stream_scale_ptr + sequence, mask=in_sample, other=0.0).to(ACC)[:, None]
            gate += rows
        start += BLOCK_P
    out = sample * width + c
    if sums.shift is not None:
        tl.store(sums.shift + out, tl.sum(shift, axis=0), mask=in_c)
    if sums.scale is not None:
        tl.store(sums.scale + out, tl.sum(scale, axis=0), mask=in_c)
    if sums.gate is not None:
        tl.store(sums.gate + out, tl.sum(gate, axis=0), mask=in_c)


def add_up(
    partials: dict[str, Tensor],
    sums: dict[str, Tensor],
    *,
    width: int,
    samples: int,
    sequences: int,
    per_sequence: int,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
) -> None:
    """Add up the partial rows of each sample, by the names of the gradients.

    partials [sequences * per_sequence, width] each; sums [samples, width]. gate's rows are multiplied by stream_scale
    [sequences]. sample_index [sequences] as in the op."""
    rows = next(iter(partials.values()))
    launch(
        _sum_kernel,
        rows.device,
        samples * triton.cdiv(width, _COLUMNS),
        *(Sums(**{_PLACE.get(name, name): value for name, value in each.items()}) for each in (partials, sums)),
        stream_scale,
        sample_index,
        (unspecialised(sequences), unspecialised(per_sequence), unspecialised(width // alignment(width))),
        num_warps=_WARPS,
        BLOCK_P=ROWS,
        BLOCK_D=_COLUMNS,
        UNIT=alignment(width),
        ACC=accumulator(rows)[1],
    )
