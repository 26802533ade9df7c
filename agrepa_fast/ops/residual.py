"""The residual stream of a DiT as one op: close one branch, open the next.

    x' = x + stream_scale * gate * branch        h = (norm(x') * weight + bias) * (1 + scale) + shift

A DiT is a chain of this op. Modulation is indexed by sample and never expanded, so that the streams of a layer ablation
share it. `stream_scale` switches a branch off for a stream.

The three ops share the signature of `_forward`; arguments that an op does not have are None.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..reference import residual as reference
from . import dispatch
from .arguments import check_eps, check_floating, check_tensor
from .library import FusedOp, eager


def _forward(
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
) -> tuple[Tensor, ...] | Tensor:
    """Returns x' (with a branch); h, mean (empty for rms), rstd [R, T] (with a norm). The signature is the schema."""
    from ..kernels import residual as kernels

    outputs = kernels.forward(x, branch, gate, shift, scale, weight, bias, stream_scale, sample_index, join, eps, norm)
    return outputs if len(outputs) > 1 else outputs[0]


def _fake_forward(a: Any) -> tuple[Tensor, ...] | Tensor:
    sequences = a.x.shape[0] + (0 if a.join is None else a.join.shape[0])
    x_new = a.x.new_empty((sequences, *a.x.shape[1:]))
    if a.scale is None:
        return x_new
    rstd = x_new.new_empty(x_new.shape[:2], dtype=torch.promote_types(x_new.dtype, torch.float32))
    mean = rstd.new_empty((0,)) if a.norm == "rms" else torch.empty_like(rstd)
    h = torch.empty_like(x_new)
    return (h, mean, rstd) if a.branch is None else (x_new, h, mean, rstd)


def _save(ctx: Any, a: Any, outputs: tuple[Tensor, ...] | Tensor) -> None:
    normed = mean = rstd = None
    if a.scale is not None:
        normed = a.x if a.branch is None else outputs[0]
        mean, rstd = outputs[-2:]
        ctx.mark_non_differentiable(mean, rstd)
        ctx.shift_dtype = a.shift.dtype
    ctx.set_materialize_grads(False)
    modulation = (a.branch, a.gate, a.scale, a.weight, a.bias, a.stream_scale, a.sample_index)
    ctx.save_for_backward(normed, *modulation, mean, rstd)
    ctx.norm = a.norm


def _gradient(ctx: Any, *grads: Tensor | None) -> dict[str, Tensor | None]:
    normed, branch, gate, scale, *others = ctx.saved_tensors
    grad_x_new = None if branch is None else grads[0]
    grad_h = None if scale is None else grads[0 if branch is None else 1]
    if grad_h is None:  # h is unused or does not exist: only the sum has a gradient
        if grad_x_new is None:
            return {}
        normed = scale = None
    inputs = (grad_h, grad_x_new, normed, branch, gate, scale, *others, ctx.norm)
    names = _differentiated(RESIDUAL_BACKWARD.arguments(*inputs))
    gradients = dict(zip(names, RESIDUAL_BACKWARD(*inputs), strict=True))
    if grad_h is None:
        return {"x": grad_x_new, **gradients}
    return {**gradients, "shift": gradients["shift"].to(ctx.shift_dtype)}


def _backward(
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
) -> list[Tensor]:
    """Gradients of the arguments that `_differentiated` names; that of shift has scale's dtype.

    normed: the normalised tensor: x', or x without a branch."""
    from ..kernels import residual_backward as kernels

    grads = kernels.backward(
        grad_h, grad_x_new, normed, branch, gate, scale, weight, bias, stream_scale, sample_index, mean, rstd, norm
    )
    return list(grads.values())


def _differentiated(a: Any) -> list[str]:
    """The arguments of the forward for which `_backward` returns gradients, in its order."""
    names = []
    if a.grad_h is not None:
        names += ["x", "shift", "scale", *(name for name in ("weight", "bias") if getattr(a, name) is not None)]
    if a.branch is not None:
        names += ["branch", "gate", *(() if a.stream_scale is None else ["stream_scale"])]
    return names


def _fake_backward(a: Any) -> list[Tensor]:
    like = a._asdict() | {"x": a.normed, "shift": a.scale}
    return [like[name].new_empty(like[name].shape) for name in _differentiated(a)]


def _op(name: str, outputs: int) -> FusedOp:
    return FusedOp(
        name,
        _forward,
        _fake_forward,
        outputs=outputs,
        save=_save,
        gradient=_gradient,
        reference=getattr(reference, name),
    )


GATED_RESIDUAL_NORM = _op("gated_residual_norm", outputs=4)
LAYER_NORM_MODULATE = _op("layer_norm_modulate", outputs=3)
GATED_RESIDUAL = _op("gated_residual", outputs=1)
RESIDUAL_BACKWARD = FusedOp("residual_backward", _backward, _fake_backward)


def _check(a: Any, needed: tuple[str, ...]) -> None:
    """Check shapes, dtypes and devices of a call. ValueError and TypeError name the argument and its shape."""
    floating = ("x", "branch", "gate", "shift", "scale", "weight", "bias", "stream_scale", "join")
    for name in (*floating, "sample_index"):
        value = getattr(a, name)
        if value is None and name not in needed:
            continue
        if name in floating:
            check_floating(name, value)
        else:
            check_tensor(name, value)
        if value.device != a.x.device:
            raise ValueError(f"{name}: expected on x's device {a.x.device}, got {value.device}")
    x = a.x
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [sequences, time, width], got {list(x.shape)}")
    check_eps(a.eps)
    if a.norm not in ("layer", "rms"):
        raise ValueError(f'norm: expected "layer" or "rms", got {a.norm!r}')
    sequences, frames, width = x.shape
    if a.branch is not None:
        branch = a.branch
        if branch.dim() != 3 or branch.shape[1:] != x.shape[1:] or branch.shape[0] > sequences:
            raise ValueError(
                f"branch: expected [at most {sequences}, {frames}, {width}] beside x {list(x.shape)}, "
                f"got {list(branch.shape)}"
            )
    if a.join is not None:
        join = a.join
        if join.dim() != 3 or join.shape[1:] != x.shape[1:] or not join.shape[0] or join.dtype != x.dtype:
            raise ValueError(
                f"join: expected {x.dtype} [at least 1, {frames}, {width}] beside x {list(x.shape)}, "
                f"got {join.dtype} {list(join.shape)}"
            )
        sequences += join.shape[0]
    _check_modulation(a, sequences)
    for name, value in (("weight", a.weight), ("bias", a.bias)):
        if value is not None and value.shape != (width,):
            raise ValueError(f"{name}: expected [{width}], got {list(value.shape)}")
    if a.stream_scale is not None and a.stream_scale.shape != (sequences,):
        raise ValueError(f"stream_scale: expected [{sequences}], got {list(a.stream_scale.shape)}")


def _check_modulation(a: Any, sequences: int) -> None:
    """Check gate, shift and scale (per sample [B, D] or per token [B, T, D]; one B) and sample_index [sequences]."""
    _, frames, width = a.x.shape
    modulation = {name: getattr(a, name) for name in ("gate", "shift", "scale") if getattr(a, name) is not None}
    index = a.sample_index
    counts = [value.shape[0] for value in modulation.values() if value.dim() in (2, 3) and value.shape[0]]
    rows = counts[0] if counts else sequences
    if any(count != rows for count in counts):  # the error names the one that differs from the others
        rows = sequences if index is None and sequences in counts else max(counts, key=counts.count)
    for name, value in modulation.items():
        if value.shape not in ((rows, width), (rows, frames, width)):
            expected = f"[{rows}, {width}] or, per token, [{rows}, {frames}, {width}]"
            raise ValueError(f"{name}: expected {expected}, got {list(value.shape)}")
    if index is None:
        if rows != sequences:
            raise ValueError(
                f"modulation has {rows} rows for {sequences} sequences: "
                "give sample_index, the modulation row of each sequence"
            )
    elif index.shape != (sequences,) or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"sample_index: expected int64 [{sequences}], got {index.dtype} {list(index.shape)}")


def _check_rows(sample_index: Tensor, rows: int) -> None:
    """IndexError unless every entry is a row of the modulation. Only for CPU tensors: else the host would wait."""
    low, high = (int(bound) for bound in sample_index.aminmax())
    if low < 0 or high >= rows:
        missing = low if low < 0 else high
        raise IndexError(f"sample_index: no row {missing}, the modulation has rows 0 to {rows - 1}")


_UNKNOWN = object()
# {layout of an eager call that passed the checks: the kernel prepared for it, or None where the reference runs}
_calls: dict[tuple[Any, ...], Any] = {}


def _layout(op: FusedOp, a: Any) -> tuple[Any, ...] | None:
    """Everything that the checks, the choice of the path and the kernel's preparation depend on.

    None if a compiler or a mode runs the call, or an argument is no tensor."""
    if not eager(a.x):
        return None
    layout = [op, dispatch.MODE, dispatch.TRITON, dispatch.INTERPRETED, a.eps, a.norm]
    try:
        for value in a[:-2]:
            if value is None:
                layout.append(None)
            else:
                layout += (value.shape, value.stride(), value.dtype, value.device)
    except (AttributeError, RuntimeError):  # no tensor, which the checks refuse, or one without strides
        return None
    return tuple(layout)


def _prepare(op: FusedOp, a: Any) -> Any:
    """Check the arguments; return the kernel prepared for them, or None if the reference runs."""
    _check(a, op.needed)
    if not dispatch.use_kernels(a.x):
        return None
    from ..kernels import residual as kernels

    return functools.partial(kernels.run, kernels.prepare(kernels.Inputs(*_alike(a)[:-2]), a.eps, a.norm))


def _alike(a: Any) -> Any:
    """The arguments with shift and scale of one rank, since the kernels read both in the same way."""
    if a.scale is None or a.scale.dim() == a.shift.dim():
        return a
    name = "scale" if a.scale.dim() == 2 else "shift"
    return a._replace(**{name: getattr(a, name).unsqueeze(1).expand(-1, a.x.shape[1], -1)})  # a view, not a copy


def _has_gradient(a: Any) -> bool:
    """Whether a gradient of the call will be wanted."""
    if torch.is_grad_enabled():
        for value in a:  # `any` over a generator takes more than twice as long
            if value is not None and getattr(value, "requires_grad", False):
                return True
    return False


def _run(op: FusedOp, *arguments: Any) -> Any:
    """Returns the outputs of the reference, or of the kernels (with the statistics of the norm if there is a gradient).

    An eager call of tensors laid out as in an earlier call launches the kernel that was prepared then."""
    a = op.arguments(*arguments)
    if a.join is not None and _has_gradient(a):
        raise ValueError("join: it has no gradient, and an argument requires one: call the op under torch.no_grad()")
    layout = _layout(op, a)
    if layout is None:
        _check(a, op.needed)
        return op(*_alike(a)) if dispatch.use_kernels(a.x) else op.in_pytorch(a)
    kernel = _calls.get(layout, _UNKNOWN)
    if kernel is _UNKNOWN:
        kernel = _prepare(op, a)
        if len(_calls) >= 10_000:  # batches of as many lengths
            _calls.clear()
        _calls[layout] = kernel
    if a.sample_index is not None and a.x.device.type == "cpu":
        _check_rows(a.sample_index, (a.scale if a.gate is None else a.gate).shape[0])
    if kernel is None:
        return op.in_pytorch(a)
    a, gradient = _alike(a), _has_gradient(a)

    def launch() -> Any:
        outputs = kernel(a[:-2], statistics=gradient)
        return outputs if len(outputs) > 1 else outputs[0]

    return op.differentiable(launch, *a) if gradient else launch()


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
    join: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and open the next branch.

    `x' = x + stream_scale * gate * branch`, `h = (norm(x') * weight + bias) (1 + scale) + shift` (adaLN of DiT,
    arXiv 2212.09748; the per-stream scale is FoG-A's gate m_k, arXiv 2603.01006).

    Args:
        x: residual stream [S, T, D], floating; S = R, the sequences of the results, without `join`.
        branch: [R' <= S, T, D]; the sequences past R' take no branch (their scale is 0).
        gate, shift, scale: each [B, D], or [B, T, D] where modulation differs from token to token; any floating dtype.
        weight, bias: [D] or None; the norm's own, of any floating dtype.
        stream_scale: [R] or None for 1; where it is 0 the branch is not read, and its gradients are 0.
        sample_index: int64 or int32 [R], the modulation row of each sequence, 0 <= row < B; None when R == B. On the
            CPU another row is an IndexError; on a GPU, where reading the values would make the host wait, a kernel
            gives nan for it and the reference path stops the device.
        join: [R - S, T, D] in x's dtype: sequences that come after x's and take no branch, as after
            `torch.cat([x, join])`, whose copy is not made. It may be a part of x. Forward only.
        eps: added to the variance ("layer") or mean square ("rms").
        norm: "layer" or "rms".

    Returns:
        x' and h, both [R, T, D] in x's dtype; statistics in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: on a shape, dtype or device that does not fit, naming it; with `join`, on an argument
            that requires a gradient while gradients are enabled.
    """
    arguments = (x, branch, gate, shift, scale, weight, bias, stream_scale, sample_index, join, eps, norm)
    return _run(GATED_RESIDUAL_NORM, *arguments)[:2]


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    sample_index: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> Tensor:
    """`(norm(x) * weight + bias) (1 + scale) + shift`, which opens the chain.

    Arguments as `gated_residual_norm`; returns [R, T, D]."""
    arguments = (x, None, None, shift, scale, weight, bias, None, sample_index, None, eps, norm)
    outputs = _run(LAYER_NORM_MODULATE, *arguments)
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    *,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
    join: Tensor | None = None,
) -> Tensor:
    """`x + stream_scale * gate * branch`, which closes the chain.

    Arguments as `gated_residual_norm`; returns [R, T, D]."""
    arguments = (x, branch, gate, None, None, None, None, stream_scale, sample_index, join, 0.0, "layer")
    return _run(GATED_RESIDUAL, *arguments)
