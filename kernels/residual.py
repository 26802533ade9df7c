"""The residual stream: one forward and one backward kernel for its three ops.

    x' = x + s gate branch        h = norm(x') (1 + scale) + shift        norm: layer or rms, no affine

x, branch [R, T, D]; gate, shift, scale [B, D], read through the sample of each sequence, never expanded; s [R].
Without shift and scale there is no norm (`gated_residual`), without branch no sum (`layer_norm_modulate`). The rows of
`join` [J, T, D] come after those of x, without a branch: what would be a copy of both into one tensor is not made.

Bytes per row of D elements of b bytes (the modulation is read once per program, from L2 after the first):
    forward   gated_residual_norm  4 D b + 8    read x, branch; write x', h, mean, rstd
              layer_norm_modulate  2 D b + 8    gated_residual 3 D b    a row of join: D b less (no branch)
    backward  gated_residual_norm  6 D b + 8    read dx', dh, x', branch; write dx, dbranch
              layer_norm_modulate  3 D b + 8    gated_residual 3 D b (dx is dx' itself)
The normalised row is recomputed from x', which the next op holds anyway: saving it would cost 2 D b more. The
sums over tokens (dshift, dscale, dgate) leave at most `programs` partial rows each, which one more kernel adds
up in a fixed order: no atomics, the same bits in every run.
"""

from __future__ import annotations

import functools
from typing import Any

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
    row_contiguous,
)

# Strides and sizes change from batch to batch; specialising on them would compile the kernels again and again.
_STRIDES = ["x_sequence", "x_row", "branch_sequence", "branch_row", "gate_row", "scale_row"]
_SIZES = ["active", "samples", "frames", "tokens"]
_JOIN = ["join_sequence", "join_row", "own"]
_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 64, 32, 4  # tile of the kernel that adds up partial rows


@triton.jit
def _sample(sample_index_ptr, sequence, samples, ACC: tl.constexpr):
    """Modulation row of a sequence, and 1.0 if there is one, else nan.

    A kernel cannot raise; a row that does not exist must not be read either: the sequence turns into nan."""
    if sample_index_ptr is None:
        row = sequence
    else:
        row = tl.load(sample_index_ptr + sequence).to(tl.int64)
    known = (row >= 0) & (row < samples)
    return tl.where(known, row, 0), tl.where(known, 1.0, float("nan")).to(ACC)


@triton.jit
def _stream_scale(stream_scale_ptr, sequence, active, ACC: tl.constexpr):
    """s of a sequence; 0 for one past the branch's end, whose branch row does not exist."""
    if stream_scale_ptr is None:
        s = (sequence < active).to(ACC)
    else:
        s = tl.load(stream_scale_ptr + sequence, mask=sequence < active, other=0.0).to(ACC)
    return s


@triton.jit
def _times(s, gate):
    """s gate; 0 where s is 0, also for a gate that is not finite."""
    return tl.where(s != 0, s * gate, 0.0)


@triton.jit(do_not_specialize=[*_STRIDES, "shift_row", *_SIZES, *_JOIN])
def _forward_kernel(
    x_ptr,
    join_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    stream_scale_ptr,
    sample_index_ptr,
    out_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    x_sequence,
    x_row,
    join_sequence,
    join_row,
    branch_sequence,
    branch_row,
    gate_row,
    shift_row,
    scale_row,
    own,
    active,
    samples,
    frames,
    tokens,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    per_sequence = tl.cdiv(frames, tokens)
    sequence = (tl.program_id(0) // per_sequence).to(tl.int64)
    first = (tl.program_id(0) % per_sequence) * tokens
    last = tl.minimum(first + tokens, frames)
    sample, known = _sample(sample_index_ptr, sequence, samples, ACC)

    c = tl.arange(0, BLOCK_D)
    in_c = c < WIDTH
    if branch_ptr is not None:
        s = _stream_scale(stream_scale_ptr, sequence, active, ACC) * known
        gate_ptrs = gate_ptr + UNIT * (sample * gate_row)
        gate = _times(s, tl.load(gate_ptrs + c, mask=in_c, other=0.0).to(ACC))
        # No token of the branch is read where s is 0.
        branch_last = tl.where(s != 0, last, first)
    if h_ptr is not None:
        shift_ptrs = shift_ptr + UNIT * (sample * shift_row)
        scale_ptrs = scale_ptr + UNIT * (sample * scale_row)
        shift = tl.load(shift_ptrs + c, mask=in_c, other=0.0).to(ACC)
        scale = 1.0 + tl.load(scale_ptrs + c, mask=in_c, other=0.0).to(ACC)

    # One load serves both tensors: whose rows a sequence reads is chosen once, before the loop.
    source_ptr, source, source_sequence, source_row = x_ptr, sequence, x_sequence, x_row
    if join_ptr is not None:
        joins = sequence >= own
        source_ptr = tl.where(joins, join_ptr, x_ptr)
        source = tl.where(joins, sequence - own, sequence)
        source_sequence = tl.where(joins, join_sequence, x_sequence)
        source_row = tl.where(joins, join_row, x_row)

    # `while`, not `range`: the interpreter cannot take a range over kernel values under NumPy 2.4.
    start = first
    while start < last:
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_t = t < last
        row = sequence * frames + t
        x_ptrs = source_ptr + (UNIT * (source * source_sequence + t * source_row))[:, None]
        mask = in_t[:, None] & in_c[None, :]
        x = tl.load(x_ptrs + c[None, :], mask=mask, other=0.0).to(ACC)
        if branch_ptr is not None:
            branch_ptrs = branch_ptr + (UNIT * (sequence * branch_sequence + t * branch_row))[:, None]
            out_ptrs = out_ptr + (row * WIDTH)[:, None]
            read = (t < branch_last)[:, None]
            # Rounded as it is stored: the backward sees x' in its own dtype, and must apply the statistics to the
            # numbers that they were taken of. Where the mean is large beside the deviation, others are far off.
            x += gate[None, :] * tl.load(branch_ptrs + c[None, :], mask=read & in_c[None, :], other=0.0).to(ACC)
            x = x.to(out_ptr.dtype.element_ty).to(ACC)
            tl.store(out_ptrs + c[None, :], x, mask=mask)
        if h_ptr is not None:
            if not RMS:
                total = tl.sum(x, axis=1)
                mean = total / WIDTH
                tl.store(mean_ptr + row, mean, mask=in_t)
                # Centred before squaring: E[x^2] - E[x]^2 cancels when the mean is large. Padding stays 0.
                x = tl.where(mask, x - mean[:, None], 0.0)
            square = tl.sum(x * x, axis=1)
            rstd = known * tl.rsqrt(square / WIDTH + EPS)
            tl.store(rstd_ptr + row, rstd, mask=in_t)
            h_ptrs = h_ptr + (row * WIDTH)[:, None]
            tl.store(h_ptrs + c[None, :], x * rstd[:, None] * scale[None, :] + shift[None, :], mask=mask)
        start += BLOCK_T


@triton.jit(do_not_specialize=["out_sequence", "out_row", "h_sequence", "h_row", *_STRIDES, *_SIZES])
def _backward_kernel(
    grad_out_ptr,
    grad_h_ptr,
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    stream_scale_ptr,
    sample_index_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    shift_partial_ptr,
    scale_partial_ptr,
    gate_partial_ptr,
    stream_partial_ptr,
    out_sequence,
    out_row,
    h_sequence,
    h_row,
    x_sequence,
    x_row,
    branch_sequence,
    branch_row,
    gate_row,
    scale_row,
    active,
    samples,
    frames,
    tokens,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """x_ptr is the normalised tensor: x' after a branch, x without one. With y = norm(x'), w = dh (1 + scale):

    dx = dx' + rstd (w - mean(w) - y mean(w y))     (rms: without mean(w))
    dbranch = s gate dx        dgate = sum s branch dx        dscale = sum dh y        dshift = sum dh

    The gate's partial rows are sum branch dx, without s: ds is then one inner product with the gate."""
    per_sequence = tl.cdiv(frames, tokens)
    sequence = (tl.program_id(0) // per_sequence).to(tl.int64)
    first = (tl.program_id(0) % per_sequence) * tokens
    last = tl.minimum(first + tokens, frames)
    sample, known = _sample(sample_index_ptr, sequence, samples, ACC)

    c = tl.arange(0, BLOCK_D)
    in_c = c < WIDTH
    # Sums over tokens stay in a whole tile: adding up its rows needs other threads and is done once, at the end.
    if branch_ptr is not None:
        s = _stream_scale(stream_scale_ptr, sequence, active, ACC) * known
        gate_ptrs = gate_ptr + UNIT * (sample * gate_row)
        gate = _times(s, tl.load(gate_ptrs + c, mask=in_c, other=0.0).to(ACC))
        gate_sum = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        branch_last = tl.where(s != 0, last, first)
        grad_branch_last = tl.where(sequence < active, last, first)
    if grad_h_ptr is not None:
        scale_ptrs = scale_ptr + UNIT * (sample * scale_row)
        scale = 1.0 + tl.load(scale_ptrs + c, mask=in_c, other=0.0).to(ACC)
        shift_sum = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        scale_sum = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    start = first
    while start < last:
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_t = t < last
        row = sequence * frames + t
        mask = in_t[:, None] & in_c[None, :]
        if branch_ptr is not None:
            # Read here, far from its use: behind the sums over the row its latency would come on top of theirs.
            branch_ptrs = branch_ptr + (UNIT * (sequence * branch_sequence + t * branch_row))[:, None]
            read = (t < branch_last)[:, None]
            branch = tl.load(branch_ptrs + c[None, :], mask=read & in_c[None, :], other=0.0)
        out_offsets = (UNIT * (sequence * out_sequence + t * out_row))[:, None]
        if grad_out_ptr is not None:
            dx = tl.load(grad_out_ptr + out_offsets + c[None, :], mask=mask, other=0.0).to(ACC)
        else:
            dx = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if grad_h_ptr is not None:
            x_ptrs = x_ptr + (UNIT * (sequence * x_sequence + t * x_row))[:, None]
            dh_ptrs = grad_h_ptr + (UNIT * (sequence * h_sequence + t * h_row))[:, None]
            rstd = tl.load(rstd_ptr + row, mask=in_t, other=0.0)
            mean = tl.zeros_like(rstd) if RMS else tl.load(mean_ptr + row, mask=in_t, other=0.0)
            x = tl.load(x_ptrs + c[None, :], mask=mask, other=0.0).to(ACC)
            y = (x - mean[:, None]) * rstd[:, None]
            dh = tl.load(dh_ptrs + c[None, :], mask=mask, other=0.0).to(ACC)
            shift_sum += dh
            scale_sum += dh * y
            w = dh * scale[None, :]
            inner = tl.sum(w * y, axis=1)
            if not RMS:
                total = tl.sum(w, axis=1)
                w -= (total / WIDTH)[:, None]
            dx += rstd[:, None] * (w - y * (inner / WIDTH)[:, None])
        if grad_x_ptr is not None:
            grad_x_ptrs = grad_x_ptr + (row * WIDTH)[:, None]
            tl.store(grad_x_ptrs + c[None, :], dx, mask=mask)
        if branch_ptr is not None:
            grad_branch_ptrs = grad_branch_ptr + (row * WIDTH)[:, None]
            written = (t < grad_branch_last)[:, None]
            gate_sum += dx * branch.to(ACC)
            tl.store(grad_branch_ptrs + c[None, :], gate[None, :] * dx, mask=written & in_c[None, :])
        start += BLOCK_T

    partial = tl.program_id(0).to(tl.int64) * WIDTH
    if grad_h_ptr is not None:
        tl.store(shift_partial_ptr + partial + c, tl.sum(shift_sum, axis=0), mask=in_c)
        tl.store(scale_partial_ptr + partial + c, tl.sum(scale_sum, axis=0), mask=in_c)
    if branch_ptr is not None:
        gate_total = tl.sum(gate_sum, axis=0)
        tl.store(gate_partial_ptr + partial + c, gate_total, mask=in_c)
        if stream_partial_ptr is not None:
            stream = tl.sum(tl.load(gate_ptrs + c, mask=in_c, other=0.0).to(ACC) * gate_total)
            # Nothing was read where s is 0; a gate that is not finite would make 0 gate nan.
            tl.store(stream_partial_ptr + tl.program_id(0), tl.where(s != 0, stream, 0.0))


@triton.jit(do_not_specialize=["sequences", "per_sequence", "width"])
def _sum_kernel(
    shift_partial_ptr,
    scale_partial_ptr,
    gate_partial_ptr,
    stream_scale_ptr,
    sample_index_ptr,
    grad_shift_ptr,
    grad_scale_ptr,
    grad_gate_ptr,
    sequences,
    per_sequence,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add up the partial rows of one sample, in their order; partial row p belongs to sequence p // per_sequence."""
    width = width * UNIT
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
        mine = p < last
        sequence = p // per_sequence
        if sample_index_ptr is not None:
            mine = mine & (tl.load(sample_index_ptr + sequence, mask=mine, other=-1) == sample)
        mask = mine[:, None] & in_c[None, :]
        offsets = p[:, None] * width + c[None, :]
        if grad_shift_ptr is not None:
            shift += tl.load(shift_partial_ptr + offsets, mask=mask, other=0.0)
            scale += tl.load(scale_partial_ptr + offsets, mask=mask, other=0.0)
        if grad_gate_ptr is not None:
            rows = tl.load(gate_partial_ptr + offsets, mask=mask, other=0.0)
            if stream_scale_ptr is not None:
                rows *= tl.load(stream_scale_ptr + sequence, mask=mine, other=0.0).to(ACC)[:, None]
            gate += rows
        start += BLOCK_P
    out = sample * width + c
    if grad_shift_ptr is not None:
        tl.store(grad_shift_ptr + out, tl.sum(shift, axis=0), mask=in_c)
        tl.store(grad_scale_ptr + out, tl.sum(scale, axis=0), mask=in_c)
    if grad_gate_ptr is not None:
        tl.store(grad_gate_ptr + out, tl.sum(gate, axis=0), mask=in_c)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _samples(*modulation: Tensor | None) -> int:
    return next(m.shape[0] for m in modulation if m is not None)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of all but the last dimension, which is contiguous."""
    return (0, 0) if tensor is None else tensor.stride()[:-1]


def _row_stride(modulation: Tensor | None) -> int:
    return 0 if modulation is None else modulation.stride(0)


@functools.lru_cache(maxsize=4096)
def _plan(
    config: LaunchConfig, shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[int, int, tuple[int, ...], dict[str, Any]]:
    """(programs per sequence, tokens per program, strides in units, the tile's constants); the same for every call
    of a shape."""
    sequences, frames, width = shape
    unit = alignment(*strides)
    tile = {"WIDTH": width, "BLOCK_D": triton.next_power_of_2(width), "BLOCK_T": config.block_t, "UNIT": unit}
    return *chunks(sequences, frames, config), tuple(stride // unit for stride in strides), tile


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    eps: float,
    rms: bool,
    config: LaunchConfig | None = None,
    join: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run the forward kernel on checked arguments; `branch` and `gate`, or `shift` and `scale`, may be None.

    x [S, T, D], join [R - S, T, D] in x's dtype (only beside a branch; None where S = R), branch [R' <= S, T, D],
    gate, shift, scale [B, D], stream_scale [R], sample_index [R].

    Returns:
        x' [R, T, D] (None without branch), h [R, T, D], mean (empty for rms) and rstd [R, T] in float32 or float64
        (None without scale), all contiguous.
    """
    x, own = row_contiguous(x), x.shape[0]
    shape = x.shape
    if join is not None:
        join = row_contiguous(join)
        shape = torch.Size((own + join.shape[0], *shape[1:]))
    branch, gate, shift, scale = [None if m is None else row_contiguous(m) for m in (branch, gate, shift, scale)]
    stream_scale, sample_index = _dense(stream_scale), _dense(sample_index)
    config = config or configuration("residual_forward", shape[2], x.device)
    dtype, acc = accumulator(x)
    out = fresh(x) if join is None else x.new_empty(shape)  # x' or, without a branch, h
    x_new = None if branch is None else out
    h = mean = rstd = None
    if scale is not None:
        h = out if x_new is None else fresh(out)
        rstd = torch.empty(shape[:2], dtype=dtype, device=x.device)
        mean = rstd.new_empty((0,)) if rms else fresh(rstd)
    strides = (*_strides(x), *_strides(join), *_strides(branch), *(_row_stride(m) for m in (gate, shift, scale)))
    per_sequence, tokens, strides, tile = _plan(config, shape, strides)
    launch(
        _forward_kernel,
        x.device,
        shape[0] * per_sequence,
        *(x, join, branch, gate, shift, scale, stream_scale, sample_index, x_new, h, mean, rstd),
        *strides,
        *(own, 0 if branch is None else branch.shape[0], _samples(gate, scale), shape[1], tokens),
        num_warps=config.num_warps,
        EPS=eps,
        RMS=rms,
        ACC=acc,
        **tile,
    )
    return x_new, h, mean, rstd


def backward(
    grad_x_new: Tensor | None,
    grad_h: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rms: bool,
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward kernel and add up its partial rows.

    `x` is the tensor that was normalised (x' after a branch; without norm any tensor shaped like it), mean and
    rstd [R, T] as the forward gave them. One of the two gradients [R, T, D] may be None.

    Returns:
        gradients of x (None without norm: it is `grad_x_new` itself), branch, gate, shift and scale (both in
        scale's dtype) and stream_scale; None for what the forward did not have.
    """
    grad_x_new, grad_h, branch, gate, scale = [
        None if value is None else row_contiguous(value) for value in (grad_x_new, grad_h, branch, gate, scale)
    ]
    stream_scale, sample_index = _dense(stream_scale), _dense(sample_index)
    x = row_contiguous(x)
    shape = sequences, _, width = x.shape
    config = config or configuration("residual_backward", width, x.device)
    dtype, acc = accumulator(x)
    device = x.device
    strides = (*_strides(grad_x_new), *_strides(grad_h), *_strides(x), *_strides(branch))
    per_sequence, tokens, strides, tile = _plan(config, shape, (*strides, _row_stride(gate), _row_stride(scale)))
    programs = sequences * per_sequence
    samples = _samples(gate, scale)

    grad_x = grad_branch = grad_gate = grad_shift = grad_scale = stream = None
    shift_rows = scale_rows = gate_rows = None
    if grad_h is not None and scale is not None:
        grad_x = fresh(x)
        shift_rows, scale_rows = torch.empty((2, programs, width), dtype=dtype, device=device)
        grad_shift, grad_scale = fresh(scale), fresh(scale)
    if branch is not None and gate is not None:
        grad_branch, grad_gate = fresh(branch), fresh(gate)
        gate_rows = torch.empty((programs, width), dtype=dtype, device=device)
        if stream_scale is not None:
            stream = torch.empty((sequences, per_sequence), dtype=dtype, device=device)
    launch(
        _backward_kernel,
        device,
        programs,
        *(grad_x_new, grad_h, None if grad_h is None else x),
        *(branch, gate, scale, stream_scale, sample_index, mean, rstd),
        *(grad_x, grad_branch, shift_rows, scale_rows, gate_rows, stream),
        *strides,
        *(0 if branch is None else branch.shape[0], samples, shape[1], tokens),
        num_warps=config.num_warps,
        # 16 warps a multiprocessor, which is what the rule's number of programs reckons with.
        registers=128 if acc is tl.float32 else 255,
        RMS=rms,
        ACC=acc,
        **tile,
    )
    launch(
        _sum_kernel,
        device,
        samples * triton.cdiv(width, _SUM_COLUMNS),
        *(shift_rows, scale_rows, gate_rows, stream_scale, sample_index, grad_shift, grad_scale, grad_gate),
        *(sequences, per_sequence, width // alignment(width)),
        num_warps=_SUM_WARPS,
        BLOCK_P=_SUM_ROWS,
        BLOCK_D=_SUM_COLUMNS,
        UNIT=alignment(width),
        ACC=acc,
    )
    grad_stream = None
    if stream is not None and stream_scale is not None:
        grad_stream = stream.sum(dim=1).to(stream_scale.dtype)
    return grad_x, grad_branch, grad_gate, grad_shift, grad_scale, grad_stream
