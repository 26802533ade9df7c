"""The residual stream of a DiT as one op: close one branch, open the next.

    x' = x + stream_scale * gate * branch        h = norm(x') * (1 + scale) + shift

A DiT is a chain of it. Modulation is indexed by sample and never expanded, so that the streams of a layer
ablation share it; `stream_scale` switches a branch off for a stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import residual as reference
from . import dispatch
from .library import FusedOp, eager


def _check(
    x: Tensor,
    branch: Tensor | None,
    modulation: dict[str, Tensor],
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    join: Tensor | None,
    norm: str,
) -> None:
    """Shapes, dtypes and devices of a residual-stream call; ValueError/TypeError with names and shapes."""
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [sequences, time, width], got {list(x.shape)}")
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm: expected "layer" or "rms", got {norm!r}')
    sequences, frames, width = x.shape
    floating = {"x": x, "branch": branch, **modulation, "stream_scale": stream_scale, "join": join}
    for name, value in {**floating, "sample_index": sample_index}.items():
        if value is None:
            continue
        if value.device != x.device:
            raise ValueError(f"{name}: expected on x's device {x.device}, got {value.device}")
        if name in floating and not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    if branch is not None and (branch.dim() != 3 or branch.shape[1:] != x.shape[1:] or branch.shape[0] > sequences):
        raise ValueError(
            f"branch: expected [at most {sequences}, {frames}, {width}] beside x {list(x.shape)}, "
            f"got {list(branch.shape)}"
        )
    if join is not None:
        if join.dim() != 3 or join.shape[1:] != x.shape[1:] or not join.shape[0] or join.dtype != x.dtype:
            raise ValueError(
                f"join: expected {x.dtype} [at least 1, {frames}, {width}] beside x {list(x.shape)}, "
                f"got {join.dtype} {list(join.shape)}"
            )
        sequences += join.shape[0]
    first = next(iter(modulation.values()))
    for name, value in modulation.items():
        if value.dim() != 2 or value.shape[1] != width or value.shape[0] != first.shape[0] or 0 in value.shape:
            rows = first.shape[0] if first.dim() == 2 and first.shape[0] else sequences
            raise ValueError(f"{name}: expected [{rows}, {width}], got {list(value.shape)}")
    if sample_index is None:
        if first.shape[0] != sequences:
            raise ValueError(
                f"modulation has {first.shape[0]} rows for {sequences} sequences: "
                "give sample_index, the modulation row of each sequence"
            )
    elif sample_index.shape != (sequences,) or sample_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"sample_index: expected int64 [{sequences}], got {sample_index.dtype} {list(sample_index.shape)}"
        )
    if stream_scale is not None and stream_scale.shape != (sequences,):
        raise ValueError(f"stream_scale: expected [{sequences}], got {list(stream_scale.shape)}")


def _check_rows(sample_index: Tensor, rows: int) -> None:
    """IndexError unless every entry is a row of the modulation. For CPU tensors: reading others makes the host wait."""
    low, high = (int(bound) for bound in sample_index.aminmax())
    if low < 0 or high >= rows:
        missing = low if low < 0 else high
        raise IndexError(f"sample_index: no row {missing}, the modulation has rows 0 to {rows - 1}")


_paths: dict[tuple[Any, ...], bool] = {}  # of the eager calls seen: whether they run the kernels


def _kernels_run(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    join: Tensor | None,
    norm: str,
) -> bool:
    """Check the arguments and choose the path; shapes, dtypes and devices that passed once are not checked again."""
    key: tuple[Any, ...] | None = None
    if eager(x):
        arguments = (x, branch, gate, shift, scale, stream_scale, sample_index, join)
        signature = [None if value is None else (value.shape, value.dtype, value.device) for value in arguments]
        key = (dispatch.MODE, dispatch.TRITON, dispatch.INTERPRETED, norm, *signature)
    path = None if key is None else _paths.get(key)
    if path is None:
        modulation = {"gate": gate, "shift": shift, "scale": scale}
        given = {name: value for name, value in modulation.items() if value is not None}
        _check(x, branch, given, stream_scale, sample_index, join, norm)
        path = dispatch.use_kernels(x)
        if key is not None:
            if len(_paths) >= 10_000:  # as many lengths of batches
                _paths.clear()
            _paths[key] = path
    if sample_index is not None and key is not None and x.device.type == "cpu":
        _check_rows(sample_index, next(m.shape[0] for m in (gate, scale) if m is not None))
    return path


def _forward_only(join: Tensor, *others: Tensor | None) -> None:
    """ValueError where a call with `join` would be differentiated."""
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (join, *others)):
        raise ValueError("join: it has no gradient, and an argument requires one: call the op under torch.no_grad()")


# Registered ops. Each returns fresh contiguous tensors; `_stats` gives what the backward needs of the norm. The forward
# ones with a branch take `join` last; their gradients know nothing of it (`_forward_only`).


def _stats(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Empty mean (no elements for rms) and rstd [R, T]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rstd = x.new_empty(x.shape[:2], dtype=dtype)
    return (x.new_empty((0,), dtype=dtype) if rms else torch.empty_like(rstd)), rstd


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _joined(x: Tensor, join: Tensor | None) -> Tensor:
    """Empty x' [R, T, D]."""
    return x.new_empty((x.shape[0] + (0 if join is None else join.shape[0]), *x.shape[1:]))


def _fake_gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    eps: float,
    rms: bool,
    join: Tensor | None = None,
) -> tuple[Tensor, ...]:
    x_new = _joined(x, join)
    return x_new, _empty(x_new), *_stats(x_new, rms)


def _stream_gradient(stream_scale: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0,)) if stream_scale is None else _empty(stream_scale)


def _run_gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    eps: float,
    rms: bool,
    join: Tensor | None = None,
) -> tuple[Tensor, ...]:
    from ..kernels import residual as kernels

    return kernels.forward(x, branch, gate, shift, scale, stream_scale, sample_index, eps, rms, join=join)


def _run_gated_residual_norm_backward(
    grad_h: Tensor,
    grad_x_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> tuple[Tensor, ...]:
    from ..kernels import residual as kernels

    *grads, stream = kernels.backward(
        grad_x_new, grad_h, x_new, branch, gate, scale, stream_scale, sample_index, mean, rstd, rms
    )
    return *grads, _stream_gradient(None, gate) if stream is None else stream


def _run_layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, sample_index: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, ...]:
    from ..kernels import residual as kernels

    return kernels.forward(x, None, None, shift, scale, None, sample_index, eps, rms)[1:]


def _run_layer_norm_modulate_backward(
    grad_h: Tensor, x: Tensor, scale: Tensor, sample_index: Tensor | None, mean: Tensor, rstd: Tensor, rms: bool
) -> tuple[Tensor, ...]:
    from ..kernels import residual as kernels

    grads = kernels.backward(None, grad_h, x, None, None, scale, None, sample_index, mean, rstd, rms)
    return grads[0], *grads[3:5]


def _run_gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    join: Tensor | None = None,
) -> Tensor:
    from ..kernels import residual as kernels

    return kernels.forward(x, branch, gate, None, None, stream_scale, sample_index, 0.0, False, join=join)[0]


def _run_gated_residual_backward(
    grad: Tensor, branch: Tensor, gate: Tensor, stream_scale: Tensor | None, sample_index: Tensor | None
) -> tuple[Tensor, ...]:
    from ..kernels import residual as kernels

    grads = kernels.backward(grad, None, grad, branch, gate, None, stream_scale, sample_index, None, None, False)
    return *grads[1:3], _stream_gradient(None, gate) if grads[5] is None else grads[5]


def _save_gated_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, stream_scale, sample_index, _, rms, _ = inputs
    x_new, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_new, branch, gate, scale, stream_scale, sample_index, mean, rstd)
    ctx.rms, ctx.shift_dtype = rms, shift.dtype


def _gated_residual_norm_gradient(ctx: Any, grad_x_new: Tensor | None, grad_h: Tensor | None, *_: Any) -> Any:
    x_new, branch, gate, scale, stream_scale, sample_index, mean, rstd = ctx.saved_tensors
    if grad_h is None:
        # h was not used: only the sum has a gradient.
        if grad_x_new is None:
            return (None,) * 10
        grad_branch, grad_gate, grad_stream = GATED_RESIDUAL_BACKWARD(
            grad_x_new, branch, gate, stream_scale, sample_index
        )
        return grad_x_new, grad_branch, grad_gate, None, None, _if(stream_scale, grad_stream), *(None,) * 4
    grad_x, grad_branch, grad_gate, grad_shift, grad_scale, grad_stream = GATED_RESIDUAL_NORM_BACKWARD(
        grad_h, grad_x_new, x_new, branch, gate, scale, stream_scale, sample_index, mean, rstd, ctx.rms
    )
    grad_shift = grad_shift.to(ctx.shift_dtype)
    grad_stream = _if(stream_scale, grad_stream)
    return grad_x, grad_branch, grad_gate, grad_shift, grad_scale, grad_stream, *(None,) * 4


def _if(given: Tensor | None, grad: Tensor) -> Tensor | None:
    return None if given is None else grad


def _save_layer_norm_modulate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, sample_index, _, rms = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, sample_index, mean, rstd)
    ctx.rms, ctx.shift_dtype = rms, shift.dtype


def _layer_norm_modulate_gradient(ctx: Any, grad_h: Tensor | None, *_: Any) -> Any:
    if grad_h is None:
        return (None,) * 6
    grad_x, grad_shift, grad_scale = LAYER_NORM_MODULATE_BACKWARD(grad_h, *ctx.saved_tensors, ctx.rms)
    return grad_x, grad_shift.to(ctx.shift_dtype), grad_scale, None, None, None


def _save_gated_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])


def _gated_residual_gradient(ctx: Any, grad: Tensor) -> Any:
    grad_branch, grad_gate, grad_stream = GATED_RESIDUAL_BACKWARD(grad, *ctx.saved_tensors)
    return grad, grad_branch, grad_gate, _if(ctx.saved_tensors[2], grad_stream), None, None


GATED_RESIDUAL_NORM = FusedOp(
    "gated_residual_norm(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? stream_scale, "
    "Tensor? sample_index, float eps, bool rms, Tensor? join=None) "
    "-> (Tensor x_new, Tensor h, Tensor mean, Tensor rstd)",
    _run_gated_residual_norm,
    _fake_gated_residual_norm,
    (_save_gated_residual_norm, _gated_residual_norm_gradient),
)
GATED_RESIDUAL_NORM_BACKWARD = FusedOp(
    "gated_residual_norm_backward(Tensor grad_h, Tensor? grad_x_new, Tensor x_new, Tensor branch, Tensor gate, "
    "Tensor scale, Tensor? stream_scale, Tensor? sample_index, Tensor mean, Tensor rstd, bool rms) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_gated_residual_norm_backward,
    lambda grad_h, grad_x_new, x_new, branch, gate, scale, stream_scale, sample_index, mean, rstd, rms: (
        *(_empty(t) for t in (x_new, branch, gate, scale, scale)),
        _stream_gradient(stream_scale, gate),
    ),
)
LAYER_NORM_MODULATE = FusedOp(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? sample_index, float eps, bool rms) "
    "-> (Tensor h, Tensor mean, Tensor rstd)",
    _run_layer_norm_modulate,
    lambda x, shift, scale, sample_index, eps, rms: (_empty(x), *_stats(x, rms)),
    (_save_layer_norm_modulate, _layer_norm_modulate_gradient),
)
LAYER_NORM_MODULATE_BACKWARD = FusedOp(
    "layer_norm_modulate_backward(Tensor grad_h, Tensor x, Tensor scale, Tensor? sample_index, Tensor mean, "
    "Tensor rstd, bool rms) -> (Tensor, Tensor, Tensor)",
    _run_layer_norm_modulate_backward,
    lambda grad_h, x, scale, sample_index, mean, rstd, rms: (_empty(x), _empty(scale), _empty(scale)),
)
GATED_RESIDUAL = FusedOp(
    "gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? stream_scale, Tensor? sample_index, "
    "Tensor? join=None) -> Tensor",
    _run_gated_residual,
    lambda x, branch, gate, stream_scale, sample_index, join=None: _joined(x, join),
    (_save_gated_residual, _gated_residual_gradient),
)
GATED_RESIDUAL_BACKWARD = FusedOp(
    "gated_residual_backward(Tensor grad, Tensor branch, Tensor gate, Tensor? stream_scale, Tensor? sample_index) "
    "-> (Tensor, Tensor, Tensor)",
    _run_gated_residual_backward,
    lambda grad, branch, gate, stream_scale, sample_index: (
        _empty(branch),
        _empty(gate),
        _stream_gradient(stream_scale, gate),
    ),
)


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
    join: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and open the next branch.

    `x' = x + stream_scale * gate * branch`, `h = norm(x') (1 + scale) + shift` (adaLN of DiT,
    arXiv 2212.09748; the per-stream scale is FoG-A's gate m_k, arXiv 2603.01006).

    Args:
        x: residual stream [S, T, D], floating; S = R, the sequences of the results, without `join`.
        branch: [R' <= S, T, D]; the sequences past R' take no branch (their scale is 0).
        gate, shift, scale: [B, D], any floating dtype.
        stream_scale: [R] or None for 1; where it is 0 the branch is not read, and its gradients are 0.
        sample_index: int64 or int32 [R], the modulation row of each sequence, 0 <= row < B; None when R == B. On the
            CPU another row is an IndexError; on a GPU, where reading the values would make the host wait, a kernel
            gives nan for it and the reference path stops the device.
        join: [R - S, T, D] in x's dtype: sequences that come after x's and take no branch, as after
            `torch.cat([x, join])`, whose copy is not made. It may be a part of x. Forward only.
        eps: added to the variance ("layer") or mean square ("rms").
        norm: "layer" or "rms", without affine parameters.

    Returns:
        x' and h, both [R, T, D] in x's dtype; statistics in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: on a shape, dtype or device that does not fit, naming it; with `join`, on an argument
            that requires a gradient while gradients are enabled.
    """
    if join is not None:
        _forward_only(join, x, branch, gate, shift, scale, stream_scale)
    if _kernels_run(x, branch, gate, shift, scale, stream_scale, sample_index, join, norm):
        rms = norm == "rms"
        return GATED_RESIDUAL_NORM(x, branch, gate, shift, scale, stream_scale, sample_index, eps, rms, join)[:2]
    return reference.gated_residual_norm(
        x,
        branch,
        gate,
        shift,
        scale,
        stream_scale=stream_scale,
        sample_index=sample_index,
        join=join,
        eps=eps,
        norm=norm,
    )


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    sample_index: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> Tensor:
    """`norm(x) (1 + scale) + shift`: opens the chain. Arguments as `gated_residual_norm`; returns [R, T, D]."""
    if _kernels_run(x, None, None, shift, scale, None, sample_index, None, norm):
        return LAYER_NORM_MODULATE(x, shift, scale, sample_index, eps, norm == "rms")[0]
    return reference.layer_norm_modulate(x, shift, scale, sample_index=sample_index, eps=eps, norm=norm)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    *,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
    join: Tensor | None = None,
) -> Tensor:
    """`x + stream_scale * gate * branch`: closes the chain. Arguments as `gated_residual_norm`; returns [R, T, D]."""
    if join is not None:
        _forward_only(join, x, branch, gate, stream_scale)
    if _kernels_run(x, branch, gate, None, None, stream_scale, sample_index, join, "layer"):
        return GATED_RESIDUAL(x, branch, gate, stream_scale, sample_index, join)
    return reference.gated_residual(x, branch, gate, stream_scale=stream_scale, sample_index=sample_index, join=join)
