"""Reductions over time: `masked_mean` of hidden states, `velocity_delta` between the streams of a layer ablation.

    masked_mean      m[b] = sum_t valid[b, t] x[b, t] / max(n[b], 1)              x [B, T, D] -> [B, D]
    velocity_delta   change[s, b] = sum valid (v_s - v_0)^2 / (max(n[b], 1) M)    v [S, B, T, M] -> [S - 1, B]
                     energy[b]    = sum valid v_0^2 / (max(n[b], 1) M)            -> [B]

n[b] is the number of valid frames. Frames that are not valid are not read. Every input element is read once:
velocity_delta keeps the baseline's tile in registers while it reads the streams. Bytes, for elements of b bytes and N
valid frames in total: masked_mean N D b forward, B T D b backward; velocity_delta S N M b forward, 2 S N M b backward.
Sums run in float32 (float64 for float64) in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, accumulator, alignment, chunks, configuration, launch, row_contiguous

MEAN_COLUMNS = 64  # columns of a masked_mean tile
_SUM_PARTIALS = 32  # partial sums per tile of the kernel that adds them up for velocity_delta


@triton.jit
def _valid_frames(mask_ptr, mask_row, b, t, frames):
    if mask_ptr is None:
        valid = t < frames
    else:
        valid = tl.load(mask_ptr + b * mask_row + t, mask=t < frames, other=0) != 0
    return valid


@triton.jit(do_not_specialize=["x_batch", "x_row", "mask_row", "frames"])
def _mean_kernel(
    x_ptr,
    mask_ptr,
    mean_ptr,
    count_ptr,
    x_batch,
    x_row,
    mask_row,
    frames,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    tiles: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    b = (tl.program_id(0) // tiles).to(tl.int64)
    c = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_c = c < WIDTH
    total = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    count = tl.zeros((BLOCK_T,), ACC)
    start = 0
    while start < frames:
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid = _valid_frames(mask_ptr, mask_row, b, t, frames)
        x_ptrs = x_ptr + (UNIT * (b * x_batch + t * x_row))[:, None] + c[None, :]
        total += tl.load(x_ptrs, mask=valid[:, None] & in_c[None, :], other=0.0).to(ACC)
        count += valid.to(ACC)
        start += BLOCK_T
    n = tl.sum(count, axis=0)
    tl.store(mean_ptr + b * WIDTH + c, tl.sum(total, axis=0) / tl.maximum(n, 1.0), mask=in_c)
    if tl.program_id(0) % tiles == 0:
        tl.store(count_ptr + b, n)


@triton.jit(do_not_specialize=["grad_row", "mask_row", "frames"])
def _mean_backward_kernel(
    grad_ptr,
    mask_ptr,
    count_ptr,
    grad_x_ptr,
    grad_row,
    mask_row,
    frames,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    tiles: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    time_tiles = tl.cdiv(frames, BLOCK_T)
    c = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = (tl.program_id(0) // tiles // time_tiles).to(tl.int64)
    t = ((tl.program_id(0) // tiles % time_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    in_c = c < WIDTH
    valid = _valid_frames(mask_ptr, mask_row, b, t, frames)
    n = tl.maximum(tl.load(count_ptr + b), 1.0)
    grad = tl.load(grad_ptr + UNIT * (b * grad_row) + c, mask=in_c, other=0.0).to(ACC) / n
    grad_x = tl.where(valid[:, None], grad[None, :], 0.0)
    grad_x_ptrs = grad_x_ptr + ((b * frames + t) * WIDTH)[:, None] + c[None, :]
    tl.store(grad_x_ptrs, grad_x, mask=(t < frames)[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["v_stream", "v_batch", "v_row", "mask_row", "streams", "batch", "frames", "tokens"])
def _delta_kernel(
    v_ptr,
    mask_ptr,
    partial_ptr,
    count_ptr,
    v_stream,
    v_batch,
    v_row,
    mask_row,
    streams,
    batch,
    frames,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write partial sums [B, chunks, S] over a run of tokens of one sample: the baseline's energy, then the changes."""
    per_sample = tl.cdiv(frames, tokens)
    b = (tl.program_id(0) // per_sample).to(tl.int64)
    first = (tl.program_id(0) % per_sample) * tokens
    last = tl.minimum(first + tokens, frames)
    c = tl.arange(0, BLOCK_D)
    in_c = c < WIDTH
    s = tl.arange(0, BLOCK_S)
    sums = tl.zeros((BLOCK_S,), ACC)
    count = tl.zeros((BLOCK_T,), ACC)
    start = first
    while start < last:
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid = _valid_frames(mask_ptr, mask_row, b, t, last)
        mask = valid[:, None] & in_c[None, :]
        offsets = (UNIT * (b * v_batch + t * v_row))[:, None] + c[None, :]
        base = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(ACC)
        sums += tl.where(s == 0, tl.sum(base * base), 0.0)
        count += valid.to(ACC)
        stream = 1
        while stream < streams:
            # A tile of pointers that the loop carries would change its layout in every pass.
            v_stream_ptr = v_ptr + UNIT * (stream * v_stream.to(tl.int64))
            change = tl.load(v_stream_ptr + offsets, mask=mask, other=0.0).to(ACC) - base
            sums += tl.where(s == stream, tl.sum(change * change), 0.0)
            stream += 1
        start += BLOCK_T
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * streams + s, sums, mask=s < streams)
    tl.store(count_ptr + tl.program_id(0), tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["streams", "batch", "per_sample"])
def _delta_sum_kernel(
    partial_ptr,
    partial_count_ptr,
    change_ptr,
    energy_ptr,
    count_ptr,
    streams,
    batch,
    per_sample,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add up the partial sums of one sample, in their order, and divide by its valid elements."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    sums = tl.zeros((BLOCK_P, BLOCK_S), ACC)
    count = tl.zeros((BLOCK_P,), ACC)
    start = b * per_sample
    last = start + per_sample
    while start < last:
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < last)[:, None] & (s < streams)[None, :]
        sums += tl.load(partial_ptr + p[:, None] * streams + s[None, :], mask=mask, other=0.0)
        count += tl.load(partial_count_ptr + p, mask=p < last, other=0.0)
        start += BLOCK_P
    n = tl.maximum(tl.sum(count, axis=0), 1.0) * WIDTH
    means = tl.sum(sums, axis=0) / n
    tl.store(energy_ptr + b + 0 * s, means, mask=s == 0)
    tl.store(change_ptr + (s - 1) * batch + b, means, mask=(s > 0) & (s < streams))
    tl.store(count_ptr + b, n)


@triton.jit(do_not_specialize=["v_stream", "v_batch", "v_row", "mask_row", "streams", "batch", "frames"])
def _delta_backward_kernel(
    grad_change_ptr,
    grad_energy_ptr,
    v_ptr,
    mask_ptr,
    count_ptr,
    grad_v_ptr,
    v_stream,
    v_batch,
    v_row,
    mask_row,
    streams,
    batch,
    frames,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dv_s = 2 (v_s - v_0) dchange_s / n, and dv_0 = 2 v_0 denergy / n - sum_s dv_s; one tile of frames each."""
    time_tiles = tl.cdiv(frames, BLOCK_T)
    b = (tl.program_id(0) // time_tiles).to(tl.int64)
    t = ((tl.program_id(0) % time_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    in_c = c < WIDTH
    mask = _valid_frames(mask_ptr, mask_row, b, t, frames)[:, None] & in_c[None, :]
    written = (t < frames)[:, None] & in_c[None, :]
    n = tl.load(count_ptr + b)
    offsets = (UNIT * (b * v_batch + t * v_row))[:, None] + c[None, :]
    grad_offsets = ((b * frames + t) * WIDTH)[:, None] + c[None, :]
    base = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(ACC)
    grad_base = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    if grad_energy_ptr is not None:
        grad_base += base * (2.0 * tl.load(grad_energy_ptr + b).to(ACC) / n)
    stream = 1
    while stream < streams:
        v_stream_ptr = v_ptr + UNIT * (stream * v_stream.to(tl.int64))
        grad_stream_ptr = grad_v_ptr + stream * (batch.to(tl.int64) * frames * WIDTH)
        grad = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if grad_change_ptr is not None:
            factor = 2.0 * tl.load(grad_change_ptr + (stream - 1) * batch + b).to(ACC) / n
            grad += (tl.load(v_stream_ptr + offsets, mask=mask, other=0.0).to(ACC) - base) * factor
        grad_base -= grad
        tl.store(grad_stream_ptr + grad_offsets, grad, mask=written)
        stream += 1
    tl.store(grad_v_ptr + grad_offsets, grad_base, mask=written)


def _mask_bytes(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """The mask as bytes with contiguous rows, and its stride between rows."""
    if mask is None:
        return None, 0
    mask = row_contiguous(mask)
    return mask.view(torch.uint8), mask.stride(0)


def masked_mean(x: Tensor, mask: Tensor | None, config: LaunchConfig | None = None) -> tuple[Tensor, Tensor]:
    """x [B, T, D], mask [B, T] bool or None -> mean [B, D] in x's dtype, valid frames [B] float32 or float64."""
    x = row_contiguous(x)
    batch, frames, width = x.shape
    config = config or configuration("masked_mean", width, x.device)
    dtype, acc = accumulator(x)
    mean = torch.empty((batch, width), dtype=x.dtype, device=x.device)
    count = torch.empty((batch,), dtype=dtype, device=x.device)
    mask, mask_row = _mask_bytes(mask)
    unit = alignment(x.stride(0), x.stride(1))
    launch(
        _mean_kernel,
        x.device,
        batch * triton.cdiv(width, MEAN_COLUMNS),
        *(x, mask, mean, count, x.stride(0) // unit, x.stride(1) // unit, mask_row, frames),
        num_warps=config.num_warps,
        WIDTH=width,
        BLOCK_T=config.block_t,
        BLOCK_D=MEAN_COLUMNS,
        UNIT=unit,
        ACC=acc,
    )
    return mean, count


def masked_mean_backward(
    grad: Tensor, mask: Tensor | None, count: Tensor, frames: int, config: LaunchConfig | None = None
) -> Tensor:
    """grad [B, D] of the mean -> gradient of x [B, frames, D]; zeros where a frame is not valid."""
    grad = row_contiguous(grad)
    batch, width = grad.shape
    config = config or configuration("masked_mean", width, grad.device)
    grad_x = torch.empty((batch, frames, width), dtype=grad.dtype, device=grad.device)
    mask, mask_row = _mask_bytes(mask)
    unit = alignment(grad.stride(0))
    launch(
        _mean_backward_kernel,
        grad.device,
        batch * triton.cdiv(frames, config.block_t) * triton.cdiv(width, MEAN_COLUMNS),
        *(grad, mask, count, grad_x, grad.stride(0) // unit, mask_row, frames),
        num_warps=config.num_warps,
        WIDTH=width,
        BLOCK_T=config.block_t,
        BLOCK_D=MEAN_COLUMNS,
        UNIT=unit,
        ACC=accumulator(grad)[1],
    )
    return grad_x


def velocity_delta(
    velocity: Tensor, mask: Tensor | None, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """velocity [S, B, T, M], mask [B, T] bool or None -> change [S - 1, B], energy [B], valid elements [B].

    All float32, float64 for float64 input; the number of valid elements is at least M, as a divisor."""
    velocity = row_contiguous(velocity)
    streams, batch, frames, width = velocity.shape
    config = config or configuration("velocity_delta", width, velocity.device)
    dtype, acc = accumulator(velocity)
    device = velocity.device
    per_sample, tokens = chunks(batch, frames, config)
    partial = torch.empty((batch, per_sample, streams), dtype=dtype, device=device)
    partial_count = torch.empty((batch, per_sample), dtype=dtype, device=device)
    change = torch.empty((streams - 1, batch), dtype=dtype, device=device)
    energy, count = (torch.empty((batch,), dtype=dtype, device=device) for _ in range(2))
    mask, mask_row = _mask_bytes(mask)
    unit = alignment(*velocity.stride()[:3])
    block_s = triton.next_power_of_2(streams)
    launch(
        _delta_kernel,
        device,
        batch * per_sample,
        *(velocity, mask, partial, partial_count, *(step // unit for step in velocity.stride()[:3])),
        *(mask_row, streams, batch, frames, tokens),
        num_warps=config.num_warps,
        WIDTH=width,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_T=config.block_t,
        BLOCK_S=block_s,
        UNIT=unit,
        ACC=acc,
    )
    launch(
        _delta_sum_kernel,
        device,
        batch,
        *(partial, partial_count, change, energy, count, streams, batch, per_sample),
        num_warps=1,
        WIDTH=width,
        BLOCK_P=_SUM_PARTIALS,
        BLOCK_S=block_s,
        ACC=acc,
    )
    return change, energy, count


def velocity_delta_backward(
    grad_change: Tensor | None,
    grad_energy: Tensor | None,
    velocity: Tensor,
    mask: Tensor | None,
    count: Tensor,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradients [S - 1, B] of change and [B] of energy -> gradient of velocity [S, B, T, M]."""
    velocity = row_contiguous(velocity)
    streams, batch, frames, width = velocity.shape
    config = config or configuration("velocity_delta", width, velocity.device)
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    mask, mask_row = _mask_bytes(mask)
    unit = alignment(*velocity.stride()[:3])
    launch(
        _delta_backward_kernel,
        velocity.device,
        batch * triton.cdiv(frames, config.block_t),
        None if grad_change is None else grad_change.contiguous(),
        None if grad_energy is None else grad_energy.contiguous(),
        *(velocity, mask, count, grad_velocity, *(step // unit for step in velocity.stride()[:3])),
        *(mask_row, streams, batch, frames),
        num_warps=config.num_warps,
        WIDTH=width,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_T=config.block_t,
        UNIT=unit,
        ACC=accumulator(velocity)[1],
    )
    return grad_velocity
