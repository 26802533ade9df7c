"""The residual stream: one forward and one backward kernel for its three ops.

    x' = x + s gate branch        h = (norm(x') weight + bias) (1 + scale) + shift        norm: layer or rms

x, branch [R, T, D]; s [R]; weight, bias [D]. gate, shift and scale are per sample [B, D] or per token [B, T, D], and
are read through the sample of each sequence, never expanded.
Without shift and scale there is no norm (`gated_residual`); without branch there is no sum (`layer_norm_modulate`). The
rows of `join` [J, T, D] follow those of x and have no branch, so that x and join need not be concatenated.

Bytes per row of D elements of b bytes (modulation per sample is read once per program, from L2 after the first):
    forward   gated_residual_norm  4 D b + 8    read x, branch; write x', h, mean, rstd
              layer_norm_modulate  2 D b + 8    gated_residual 3 D b    a row of join: D b less (no branch)
    backward  gated_residual_norm  6 D b + 8    read dx', dh, x', branch; write dx, dbranch
              layer_norm_modulate  3 D b + 8    gated_residual 3 D b (dx is dx' itself)
    per token: D b more for each of gate, shift and scale in the forward; in the backward to read gate and scale, and to
    write each gradient (in float32 where sequences share samples, which are then added up)
The backward recomputes the normalised row from x', which the next op holds anyway: saving it would move 2 D b more
bytes. The sums over tokens (dshift, dscale, dgate per sample, dweight, dbias) leave at most `programs` partial rows
each. Another kernel adds them up in a fixed order, without atomics, so every run has the same bits. See
residual_backward.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    LaunchConfig,
    accumulator,
    alignment,
    chunks,
    configuration,
    fresh,
    launch,
    strided,
    unspecialised,
)

# Most registers of a thread in the forward of rows of 513 to 2048. A multiprocessor then holds three blocks of eight
# warps in place of two, and six of four warps in place of five; loads, stores and barriers stay the same. In narrower
# rows, and with a weight or bias of the norm, the compiler would spill.
_REGISTERS = 80


class Inputs(NamedTuple):
    """Tensors that a kernel reads; None for those that are absent. The forward's come first, in the order of the op."""

    x: Any = None  # in the backward the normalised tensor: x' with a branch, x without
    branch: Any = None
    gate: Any = None
    shift: Any = None
    scale: Any = None
    weight: Any = None
    bias: Any = None
    stream_scale: Any = None
    sample_index: Any = None
    join: Any = None
    grad_x_new: Any = None
    grad_h: Any = None
    mean: Any = None
    rstd: Any = None


class Strides(NamedTuple):
    """Strides in units of UNIT: (between sequences or samples, between rows) of each tensor that may be a view.

    They change from batch to batch, like the sizes, and are passed as `unspecialised`."""

    x: tuple[int, int] = (0, 0)
    join: tuple[int, int] = (0, 0)
    branch: tuple[int, int] = (0, 0)
    gate: tuple[int, int] = (0, 0)
    shift: tuple[int, int] = (0, 0)
    scale: tuple[int, int] = (0, 0)
    grad_x_new: tuple[int, int] = (0, 0)
    grad_h: tuple[int, int] = (0, 0)


class Sizes(NamedTuple):
    """Numbers that change from batch to batch."""

    own: int  # sequences of x, before those of join
    active: int  # sequences that have a branch
    samples: int  # rows of modulation, B
    frames: int  # T
    tokens: int  # per program


class Results(NamedTuple):
    """Tensors that the forward kernel writes. Without a gradient nobody needs mean and rstd."""

    x_new: Any = None
    h: Any = None
    mean: Any = None
    rstd: Any = None


@triton.jit
def _sample(sample_index_ptr, sequence, samples, ACC: tl.constexpr):
    """The modulation row of a sequence, and 1.0; or 0 and nan if the row does not exist.

    A kernel cannot raise an error, and must not read a row that does not exist. So the sequence becomes nan."""
    if sample_index_ptr is None:
        row = sequence
    else:
        row = tl.load(sample_index_ptr + sequence).to(tl.int64)
    known = (row >= 0) & (row < samples)
    return tl.where(known, row, 0), tl.where(known, 1.0, float("nan")).to(ACC)


@triton.jit
def _place(sample_index_ptr, sizes, ACC: tl.constexpr):
    """The sizes that a program needs, its sequence, its tokens from first to last - 1, and `_sample` of it."""
    frames, tokens = sizes.frames >> 4, sizes.tokens >> 4  # `unspecialised` on the host
    per_sequence = tl.cdiv(frames, tokens)
    sequence = (tl.program_id(0) // per_sequence).to(tl.int64)
    first = (tl.program_id(0) % per_sequence) * tokens
    last = tl.minimum(first + tokens, frames)
    sample, known = _sample(sample_index_ptr, sequence, sizes.samples >> 4, ACC)
    return sizes.own >> 4, sizes.active >> 4, frames, sequence, first, last, sample, known


@triton.jit
def _stream_scale(stream_scale_ptr, sequence, active, ACC: tl.constexpr):
    """s of a sequence; 0 for sequences that have no branch."""
    if stream_scale_ptr is None:
        s = (sequence < active).to(ACC)
    else:
        s = tl.load(stream_scale_ptr + sequence, mask=sequence < active, other=0.0).to(ACC)
    return s


@triton.jit
def _times(s, gate):
    """s gate; 0 where s is 0, also for a gate that is not finite."""
    return tl.where(s != 0, s * gate, 0.0)


@triton.jit
def _wide(stride):
    """Decode a stride, in 64 bits: rows may be 2^31 elements apart."""
    return (stride.to(tl.int64) - 8) >> 4  # without the subtraction Triton's interpreter takes 2^31 for negative


@triton.jit
def _rows(pointer, stride, outer, t, c, mask, UNIT: tl.constexpr):
    """Load rows t of a sequence or sample, [tokens, columns]."""
    pointers = pointer + (UNIT * (outer * _wide(stride[0]) + t * _wide(stride[1])))[:, None]
    return tl.load(pointers + c[None, :], mask=mask, other=0.0)


@triton.jit
def _row(pointer, stride, outer, c, in_c, UNIT: tl.constexpr):
    """Load the row of a sample, [columns]."""
    return tl.load(pointer + UNIT * (outer * _wide(stride[0])) + c, mask=in_c, other=0.0)


@triton.jit
def _store_rows(pointer, row, c, value, mask, WIDTH: tl.constexpr):
    """Write rows of a contiguous tensor."""
    tl.store(pointer + (row * WIDTH)[:, None] + c[None, :], value, mask=mask)


@triton.jit
def _forward_kernel(
    inputs,
    results,
    strides,
    sizes,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    NORM_PER_TOKEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    own, active, frames, sequence, first, last, sample, known = _place(inputs.sample_index, sizes, ACC)

    c = tl.arange(0, BLOCK_D)
    in_c = c < WIDTH
    if inputs.branch is not None:
        s = _stream_scale(inputs.stream_scale, sequence, active, ACC) * known
        # If s is 0, no token of the branch is read.
        branch_last = tl.where(s != 0, last, first)
        if not GATE_PER_TOKEN:
            gate = _times(s, _row(inputs.gate, strides.gate, sample, c, in_c, UNIT).to(ACC))[None, :]
    if results.h is not None:
        if inputs.weight is not None:
            weight = tl.load(inputs.weight + c, mask=in_c, other=0.0).to(ACC)[None, :]
        if inputs.bias is not None:
            bias = tl.load(inputs.bias + c, mask=in_c, other=0.0).to(ACC)[None, :]
        if not NORM_PER_TOKEN:
            shift = _row(inputs.shift, strides.shift, sample, c, in_c, UNIT).to(ACC)[None, :]
            scale = 1.0 + _row(inputs.scale, strides.scale, sample, c, in_c, UNIT).to(ACC)[None, :]

    # One load serves both tensors: which of them a sequence reads is chosen before the loop.
    source_ptr, source, source_stride = inputs.x, sequence, strides.x
    if inputs.join is not None:
        joins = sequence >= own
        source_ptr = tl.where(joins, inputs.join, inputs.x)
        source = tl.where(joins, sequence - own, sequence)
        source_sequence = tl.where(joins, strides.join[0], strides.x[0])
        source_row = tl.where(joins, strides.join[1], strides.x[1])
        source_stride = (source_sequence, source_row)

    # `while`, not `range`: the interpreter cannot take a range over kernel values under NumPy 2.4.
    start = first
    while start < last:
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_t = t < last
        row = sequence * frames + t
        mask = in_t[:, None] & in_c[None, :]
        x = _rows(source_ptr, source_stride, source, t, c, mask, UNIT).to(ACC)
        if inputs.branch is not None:
            read = (t < branch_last)[:, None] & in_c[None, :]
            if GATE_PER_TOKEN:
                gate = _times(s, _rows(inputs.gate, strides.gate, sample, t, c, read, UNIT).to(ACC))
            # Round x' as it is stored, because the backward applies the statistics to the stored numbers. If the
            # mean is much larger than the deviation, statistics of other numbers would be far off.
            x += gate * _rows(inputs.branch, strides.branch, sequence, t, c, read, UNIT).to(ACC)
            x = x.to(results.x_new.dtype.element_ty).to(ACC)
            _store_rows(results.x_new, row, c, x, mask, WIDTH)
        if results.h is not None:
            if NORM_PER_TOKEN:
                shift = _rows(inputs.shift, strides.shift, sample, t, c, mask, UNIT).to(ACC)
                scale = 1.0 + _rows(inputs.scale, strides.scale, sample, t, c, mask, UNIT).to(ACC)
            if not RMS:
                total = tl.sum(x, axis=1)
                mean = total / WIDTH
                if results.mean is not None:
                    tl.store(results.mean + row, mean, mask=in_t)
                # Centre before squaring: E[x^2] - E[x]^2 loses precision if the mean is large. Padding stays 0.
                x = tl.where(mask, x - mean[:, None], 0.0)
            square = tl.sum(x * x, axis=1)
            rstd = known * tl.rsqrt(square / WIDTH + EPS)
            if results.rstd is not None:
                tl.store(results.rstd + row, rstd, mask=in_t)
            y = x * rstd[:, None]
            if inputs.weight is not None:
                y *= weight
            if inputs.bias is not None:
                y += bias
            _store_rows(results.h, row, c, y * scale + shift, mask, WIDTH)
        start += BLOCK_T


def dense(vector: Tensor | None) -> Tensor | None:
    """The vector, or a contiguous copy."""
    return None if vector is None else vector.contiguous()


def per_token(modulation: Tensor | None) -> bool:
    return modulation is not None and modulation.dim() == 3


@functools.lru_cache(maxsize=4096)
def plan(
    config: LaunchConfig, shape: tuple[int, ...], strides: Strides, own: int, active: int, samples: int
) -> tuple[int, Strides, Sizes, dict[str, Any]]:
    """Programs per sequence, strides in units, sizes, and the constants of the tile; cached by shape."""
    sequences, frames, width = shape
    unit = alignment(*(stride for each in strides for stride in each))
    per_sequence, tokens = chunks(sequences, frames, config)
    sizes = Sizes(*map(unspecialised, (own, active, samples, frames, tokens)))
    in_units = Strides(*((unspecialised(outer // unit), unspecialised(row // unit)) for outer, row in strides))
    tile = {"WIDTH": width, "BLOCK_D": triton.next_power_of_2(width), "BLOCK_T": config.block_t, "UNIT": unit}
    return per_sequence, in_units, sizes, tile


class Prepared(NamedTuple):
    """What the forward needs besides its tensors. It follows from their shapes, strides, dtypes and device."""

    copied: tuple[str, ...]  # inputs to copy first, since the kernel reads a dimension of theirs as contiguous
    shape: torch.Size  # of x' and h
    dtype: torch.dtype  # of the statistics
    programs: int
    strides: Strides
    sizes: Sizes
    num_warps: int
    registers: int
    constants: dict[str, Any]


def prepare(inputs: Inputs, eps: float, norm: str, config: LaunchConfig | None = None) -> Prepared:
    """Prepare the forward of checked inputs, see `forward`."""
    x, branch, join, gate, scale = inputs.x, inputs.branch, inputs.join, inputs.gate, inputs.scale
    copies, strides = {}, {}
    for name in ("x", "join", "branch", "gate", "shift", "scale"):
        copies[name], strides[name] = strided(getattr(inputs, name))
    for name in ("weight", "bias", "stream_scale", "sample_index"):
        copies[name] = dense(getattr(inputs, name))
    own = x.shape[0]
    shape = x.shape if join is None else torch.Size((own + join.shape[0], *x.shape[1:]))
    config = config or configuration("residual_forward", shape[2], x.device)
    active = 0 if branch is None else branch.shape[0]
    per_sequence, in_units, sizes, tile = plan(config, shape, Strides(**strides), own, active, samples(gate, scale))
    dtype, acc = accumulator(x)
    affine = inputs.weight is not None or inputs.bias is not None
    limited = 512 < shape[2] <= 2048 and not affine and acc is tl.float32
    return Prepared(
        tuple(name for name, copy in copies.items() if copy is not getattr(inputs, name)),
        shape,
        dtype,
        shape[0] * per_sequence,
        in_units,
        sizes,
        config.num_warps,
        _REGISTERS if limited else 255,
        {
            "EPS": eps,
            "RMS": norm == "rms",
            "GATE_PER_TOKEN": per_token(gate),
            "NORM_PER_TOKEN": per_token(scale),
            "ACC": acc,
            **tile,
        },
    )


def run(prepared: Prepared, tensors: Sequence[Tensor | None], statistics: bool) -> tuple[Tensor, ...]:
    """Launch the forward kernel on tensors laid out as the prepared ones, in the order of `Inputs`.

    Returns `forward`'s tensors, without mean and rstd if `statistics` is false."""
    inputs = Inputs(*tensors)
    if prepared.copied:
        inputs = inputs._replace(**{name: getattr(inputs, name).contiguous() for name in prepared.copied})
    x, shape = inputs.x, prepared.shape
    out = fresh(x) if inputs.join is None else x.new_empty(shape)  # x' or, without a branch, h
    if inputs.scale is None:
        outputs: tuple[Tensor, ...] = (out,)
        results = Results(out)
    else:
        outputs = (out,) if inputs.branch is None else (out, fresh(out))
        mean = rstd = None
        if statistics:
            rstd = torch.empty_strided(shape[:2], (shape[1], 1), dtype=prepared.dtype, device=x.device)
            mean = rstd.new_empty((0,)) if prepared.constants["RMS"] else fresh(rstd)
        results = Results(None if inputs.branch is None else out, outputs[-1], mean, rstd)
        if mean is not None and rstd is not None:
            outputs += (mean, rstd)
    launch(
        _forward_kernel,
        x.device,
        prepared.programs,
        inputs,
        results,
        prepared.strides,
        prepared.sizes,
        num_warps=prepared.num_warps,
        registers=prepared.registers,
        **prepared.constants,
    )
    return outputs


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    join: Tensor | None,
    eps: float,
    norm: str,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, ...]:
    """Run the forward kernel on checked arguments; `branch` and `gate`, or `shift` and `scale`, may be None.

    x [S, T, D], join [R - S, T, D] in x's dtype (only beside a branch; None where S = R), branch [R' <= S, T, D],
    gate, shift, scale [B, D] or [B, T, D] (shift and scale alike), weight, bias [D], stream_scale, sample_index [R].

    Returns:
        x' [R, T, D] (with a branch); h [R, T, D], mean (empty for rms) and rstd [R, T] in float32 or float64 (with
        scale). All contiguous.
    """
    inputs = Inputs(x, branch, gate, shift, scale, weight, bias, stream_scale, sample_index, join)
    return run(prepare(inputs, eps, norm, config), inputs, statistics=True)


def samples(gate: Tensor | None, scale: Tensor | None) -> int:
    """Number of rows of modulation, B."""
    modulation = scale if gate is None else gate
    assert modulation is not None, "an op has a gate or a scale"
    return modulation.shape[0]
