"""The backward of the residual stream. residual.py has the formulas and the bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, accumulator, configuration, fresh, launch, strided
from .residual import (
    Inputs,
    Strides,
    _place,
    _row,
    _rows,
    _store_rows,
    _stream_scale,
    _times,
    dense,
    per_token,
    plan,
    samples,
)
from .residual_sums import add_up

# Most registers of a thread. 128 allow 16 warps per multiprocessor, which the rule's number of programs assumes.
# Modulation per token together with the two sums of an affine norm would spill in 128.
_REGISTERS, _PER_TOKEN_AFFINE = 128, 168


class Gradients(NamedTuple):
    """Tensors that the backward kernel writes: rows [R, T, D] or partial sums [programs, D].

    gate, shift and scale are partial sums if the modulation is per sample, and rows if it is per token."""

    x: Any = None
    branch: Any = None
    gate: Any = None
    shift: Any = None
    scale: Any = None
    weight: Any = None
    bias: Any = None
    stream_scale: Any = None  # [programs]


@triton.jit
def _backward_kernel(
    inputs,
    gradients,
    strides,
    sizes,
    RMS: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    NORM_PER_TOKEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """With y = norm(x') and w = dh (1 + scale) weight, the gradient of y:

    dx = dx' + rstd (w - mean(w) - y mean(w y))     (rms: without mean(w))
    dbranch = s gate dx        dgate = sum s branch dx        dscale = sum dh (y weight + bias)        dshift = sum dh
    dweight = sum dh (1 + scale) y                            dbias = sum dh (1 + scale)

    The norm needs two sums over tokens, of v and of v y. v = dh if the modulation is per sample, so that all four
    gradients are multiples of the sums, and v = dh (1 + scale) if it is per token. The gate needs one sum: of branch dx
    without s (so that ds is an inner product with the gate), or of gate branch dx if the gate is per token."""
    _, active, frames, sequence, first, last, sample, known = _place(inputs.sample_index, sizes, ACC)
    GATE_SUMS: tl.constexpr = inputs.branch is not None and (not GATE_PER_TOKEN or gradients.stream_scale is not None)
    AFFINE: tl.constexpr = inputs.weight is not None or inputs.bias is not None
    NORM_SUMS: tl.constexpr = inputs.grad_h is not None and (AFFINE or not NORM_PER_TOKEN)

    c = tl.arange(0, BLOCK_D)
    in_c = c < WIDTH
    # Sums over tokens are kept as a tile. Adding up its rows needs other threads and is done once, at the end.
    if inputs.branch is not None:
        s = _stream_scale(inputs.stream_scale, sequence, active, ACC) * known
        branch_last = tl.where(s != 0, last, first)
        grad_branch_last = tl.where(sequence < active, last, first)
        if not GATE_PER_TOKEN:
            gate = _times(s, _row(inputs.gate, strides.gate, sample, c, in_c, UNIT).to(ACC))[None, :]
    if GATE_SUMS:
        gate_sum = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    if inputs.grad_h is not None:
        # One factor stays in registers through the loop; the other values that the sums need are read again after it.
        if inputs.weight is not None:
            weight = tl.load(inputs.weight + c, mask=in_c, other=0.0).to(ACC)
        if inputs.bias is not None and NORM_PER_TOKEN:
            bias = tl.load(inputs.bias + c, mask=in_c, other=0.0).to(ACC)
        if not NORM_PER_TOKEN:
            factor = 1.0 + _row(inputs.scale, strides.scale, sample, c, in_c, UNIT).to(ACC)
            if inputs.weight is not None:
                factor *= weight
    if NORM_SUMS:
        v_sum = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        vy_sum = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    start = first
    while start < last:
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_t = t < last
        row = sequence * frames + t
        mask = in_t[:, None] & in_c[None, :]
        if inputs.branch is not None:
            # Read the branch long before its use: after the sums over the row its latency would add to theirs.
            read = (t < branch_last)[:, None] & in_c[None, :]
            branch = _rows(inputs.branch, strides.branch, sequence, t, c, read, UNIT)
            if GATE_PER_TOKEN:
                raw_gate = _rows(inputs.gate, strides.gate, sample, t, c, read, UNIT)
        if inputs.grad_x_new is not None:
            dx = _rows(inputs.grad_x_new, strides.grad_x_new, sequence, t, c, mask, UNIT).to(ACC)
        else:
            dx = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if inputs.grad_h is not None:
            rstd = tl.load(inputs.rstd + row, mask=in_t, other=0.0)
            mean = tl.zeros_like(rstd) if RMS else tl.load(inputs.mean + row, mask=in_t, other=0.0)
            x = _rows(inputs.x, strides.x, sequence, t, c, mask, UNIT).to(ACC)
            y = (x - mean[:, None]) * rstd[:, None]
            dh = _rows(inputs.grad_h, strides.grad_h, sequence, t, c, mask, UNIT).to(ACC)
            v = dh
            if NORM_PER_TOKEN:
                v = dh * (1.0 + _rows(inputs.scale, strides.scale, sample, t, c, mask, UNIT).to(ACC))
                dscale = dh * y
                if inputs.weight is not None:
                    dscale *= weight[None, :]
                if inputs.bias is not None:
                    dscale += dh * bias[None, :]
                _store_rows(gradients.shift, row, c, dh, mask, WIDTH)
                _store_rows(gradients.scale, row, c, dscale, mask, WIDTH)
            if NORM_SUMS:
                v_sum += v
                vy_sum += v * y
            w = v
            if not NORM_PER_TOKEN:
                w = v * factor[None, :]
            elif inputs.weight is not None:
                w = v * weight[None, :]
            inner = tl.sum(w * y, axis=1)
            if not RMS:
                total = tl.sum(w, axis=1)
                w -= (total / WIDTH)[:, None]
            dx += rstd[:, None] * (w - y * (inner / WIDTH)[:, None])
        if gradients.x is not None:
            _store_rows(gradients.x, row, c, dx, mask, WIDTH)
        if inputs.branch is not None:
            dgate = dx * branch.to(ACC)
            if GATE_PER_TOKEN:
                gate = _times(s, raw_gate.to(ACC))
                _store_rows(gradients.gate, row, c, _times(s, dgate), mask, WIDTH)
                dgate *= raw_gate.to(ACC)
            if GATE_SUMS:
                gate_sum += dgate
            written = (t < grad_branch_last)[:, None] & in_c[None, :]
            _store_rows(gradients.branch, row, c, gate * dx, written, WIDTH)
        start += BLOCK_T

    partial = tl.program_id(0).to(tl.int64) * WIDTH + c
    if NORM_SUMS:
        v_total, vy_total = tl.sum(v_sum, axis=0), tl.sum(vy_sum, axis=0)
        if not NORM_PER_TOKEN:
            dscale_total = vy_total
            if inputs.weight is not None:
                dscale_total = vy_total * tl.load(inputs.weight + c, mask=in_c, other=0.0).to(ACC)
            if inputs.bias is not None:
                dscale_total += v_total * tl.load(inputs.bias + c, mask=in_c, other=0.0).to(ACC)
            tl.store(gradients.shift + partial, v_total, mask=in_c)
            tl.store(gradients.scale + partial, dscale_total, mask=in_c)
            if AFFINE:
                scale = 1.0 + _row(inputs.scale, strides.scale, sample, c, in_c, UNIT).to(ACC)
                v_total *= scale
                vy_total *= scale
        if inputs.weight is not None:
            tl.store(gradients.weight + partial, vy_total, mask=in_c)
        if inputs.bias is not None:
            tl.store(gradients.bias + partial, v_total, mask=in_c)
    if GATE_SUMS:
        gate_total = tl.sum(gate_sum, axis=0)
        if not GATE_PER_TOKEN:
            tl.store(gradients.gate + partial, gate_total, mask=in_c)
        if gradients.stream_scale is not None:
            if not GATE_PER_TOKEN:
                gate_total *= _row(inputs.gate, strides.gate, sample, c, in_c, UNIT).to(ACC)
            # If s is 0, no branch was read, and a gate that is not finite would make 0 gate nan.
            tl.store(gradients.stream_scale + tl.program_id(0), tl.where(s != 0, tl.sum(gate_total), 0.0))


def backward(
    grad_h: Tensor | None,
    grad_x_new: Tensor | None,
    normed: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: str,
    config: LaunchConfig | None = None,
) -> dict[str, Tensor]:
    """Run the backward kernel and add up its partial rows.

    `normed` is the tensor that was normalised (x' after a branch; None without a norm), mean and rstd [R, T] as the
    forward gave them. One of the two gradients [R, T, D] may be None.

    Returns:
        gradients by argument: x, shift, scale (both in scale's dtype), weight and bias where h has a gradient, branch,
        gate and stream_scale where there is a branch. Without a norm x's gradient is `grad_x_new` itself.
    """
    views = {"x": normed, "branch": branch, "gate": gate, "scale": scale, "grad_x_new": grad_x_new, "grad_h": grad_h}
    strides: dict[str, tuple[int, int]] = {}
    for name, value in views.items():
        views[name], strides[name] = strided(value)
    weight, bias, stream_scale, sample_index = map(dense, (weight, bias, stream_scale, sample_index))
    like = grad_x_new if normed is None else normed
    assert like is not None, "h or x' has a gradient"
    shape = sequences, frames, width = like.shape
    config = config or configuration("residual_backward", width, like.device)
    dtype, acc = accumulator(like)
    affine = weight is not None or bias is not None
    device, batch = like.device, samples(gate, scale)
    active = 0 if branch is None else branch.shape[0]
    per_sequence, in_units, sizes, tile = plan(config, shape, Strides(**strides), sequences, active, batch)
    programs = sequences * per_sequence

    # The kernel writes a gradient itself, or the rows whose sum is the gradient.
    written: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def partial(name: str, of: Tensor) -> None:
        grads[name] = fresh(of)
        if of.dim() == 3 and sample_index is None:
            written[name] = grads[name]  # each row of modulation belongs to one token
        else:
            rows = shape if of.dim() == 3 else (programs, width)
            written[name] = torch.empty(rows, dtype=dtype, device=device)

    if grad_h is not None:
        assert normed is not None, "h is of a normed tensor"
        assert scale is not None, "a norm is modulated"
        grads["x"] = written["x"] = fresh(normed)
        partial("shift", scale)
        partial("scale", scale)
        if weight is not None:
            partial("weight", weight)
        if bias is not None:
            partial("bias", bias)
    if branch is not None:
        assert gate is not None, "a branch has a gate"
        grads["branch"] = written["branch"] = fresh(branch)
        partial("gate", gate)
        if stream_scale is not None:
            written["stream_scale"] = torch.empty((sequences, per_sequence), dtype=dtype, device=device)
    launch(
        _backward_kernel,
        device,
        programs,
        Inputs(
            **views,
            weight=weight,
            bias=bias,
            stream_scale=stream_scale,
            sample_index=sample_index,
            mean=mean,
            rstd=rstd,
        ),
        Gradients(**written),
        in_units,
        sizes,
        num_warps=config.num_warps,
        registers=255 if acc is tl.float64 else _PER_TOKEN_AFFINE if affine and per_token(scale) else _REGISTERS,
        RMS=norm == "rms",
        GATE_PER_TOKEN=per_token(gate),
        NORM_PER_TOKEN=per_token(scale),
        ACC=acc,
        **tile,
    )

    def total(*names: str, **sizes: Any) -> None:
        """Add up the rows of those gradients that exist and are not complete."""
        names = tuple(name for name in names if name in grads and written[name] is not grads[name])
        if names:
            add_up({name: written[name] for name in names}, {name: grads[name] for name in names}, **sizes)

    modulation = {"gate": gate, "shift": scale, "scale": scale}
    samples_of = {"samples": batch, "sequences": sequences, "sample_index": sample_index}
    by_sample, by_token = (
        [name for name in modulation if per_token(modulation[name]) == each] for each in (False, True)
    )
    total(*by_sample, width=width, per_sequence=per_sequence, stream_scale=stream_scale, **samples_of)
    total(*by_token, width=frames * width, per_sequence=1, **samples_of)
    total("weight", "bias", width=width, samples=1, sequences=1, per_sequence=programs)
    if "stream_scale" in written and stream_scale is not None:
        grads["stream_scale"] = written["stream_scale"].sum(dim=1).to(stream_scale.dtype)
    return grads
