"""The residual-stream ops: forward, backward and both, over rows, width and dtype.

x, branch [B, T, D]; gate, shift, scale [B, D]; rows = B T. Least bytes: every tensor of R D elements once (forward of
gated_residual_norm reads x and branch and writes x' and h; its backward reads dx', dh, x', branch and writes dx and
dbranch), and the modulation and its gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agrepa_fast import ops
from agrepa_fast.reference import residual as oracle

from ..case import Outputs, Problem, Provider, Setup, Unavailable, compiled, dtype_of, modes, optional

TITLE = "Residual-stream ops"
EPS = 1e-6

# Tensors of R D elements moved (forward, backward), tensors of B D elements read forward, operations per element.
COST = {
    "gated_residual_norm": ((4, 6), 3, (10, 20)),
    "layer_norm_modulate": ((2, 3), 2, (8, 16)),
    "gated_residual": ((3, 3), 1, (2, 4)),
}
# Relative rms bounds of outputs in R D; gradients summed over tokens get sqrt(T) of room.
BOUND = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3}


def problems(scale: str, device: torch.device) -> list[Problem]:
    norm, open_, close = COST
    rms: list[Problem] = []
    if scale == "toy":
        sizes = [(op, mode, 2, 8, 24, "float32") for op in COST for mode in ("forward", "backward", "both")]
        rms = [_problem(norm, "both", 2, 8, 24, "float32", "rms", rivals=False)]
    elif scale == "quick" and device.type == "cpu":
        sizes = [(norm, mode, 4, 256, 384, "float32") for mode in ("forward", "backward", "both")]
        sizes += [(norm, "both", 4, 938, 1024, "float32")]
        sizes += [(op, "both", 4, 256, 384, "float32") for op in (open_, close)]
    else:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        every = ("forward", "backward", "both")
        sizes = [(norm, mode, 64, 512, 1024, dtype) for mode in every[:2]]
        sizes += [(norm, mode, 4, 938, 1024, dtype) for mode in every]
        sizes += [(norm, mode, 32, 256, width, dtype) for width in (384, 768, 1152, 1536) for mode in every[:2]]
        sizes += [(norm, mode, 4, 256, 384, dtype) for mode in every]
        sizes += [(op, mode, 32, 256, 1024, dtype) for op in (open_, close) for mode in every[:2]]
        if device.type == "cuda":
            sizes += [(norm, mode, 32, 256, 1024, "float32") for mode in every[:2]]
            rms = [_problem(op, m, 64, 512, 1024, dtype, "rms", True) for op in (norm, open_) for m in every[:2]]
    return [_problem(*size, "layer", rivals=scale != "toy" or size[0] == norm) for size in sizes] + rms


def _problem(op: str, mode: str, batch: int, frames: int, width: int, dtype: str, norm: str, rivals: bool) -> Problem:
    (large_forward, large_backward), small, (flops_forward, flops_backward) = COST[op]
    size = dtype_of(dtype).itemsize
    row, modulation = batch * frames * width, batch * width
    moved = {
        "forward": large_forward * row + small * modulation,
        "backward": large_backward * row + 2 * small * modulation,
    }
    flops = {"forward": flops_forward * row, "backward": flops_backward * row}
    for count in (moved, flops):
        count["both"] = count["forward"] + count["backward"]
    # A problem with the default, LayerNorm, does not name its norm, so that stored results keep their keys.
    named = {"op": op} if norm == "layer" else {"op": op, "norm": norm}
    return Problem(
        params={**named, "mode": mode, "rows": batch * frames, "width": width, "batch": batch, "dtype": dtype},
        dtype=dtype,
        bytes=moved[mode] * size,
        flops=flops[mode],
        build=functools.partial(_build, op, mode, batch, frames, width, dtype, norm),
    )


def expression(op: str, norm: str = "layer") -> Callable[..., Outputs]:
    """The op in plain PyTorch, in the input's dtype."""

    def close(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return x + gate.unsqueeze(1) * branch

    def open_(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = (F.layer_norm if norm == "layer" else F.rms_norm)(x, (x.shape[-1],), eps=EPS)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        x = close(x, branch, gate)
        return x, open_(x, shift, scale)

    if op == "gated_residual_norm":
        return both
    if op == "gated_residual":
        return lambda *inputs: (close(*inputs),)
    return lambda *inputs: (open_(*inputs),)


def ours(op: str, norm: str = "layer", of: ModuleType = ops) -> Callable[..., Outputs]:
    """The library's op, or the one of its reference, as a function that returns a tuple."""
    options = {} if op == "gated_residual" else {"eps": EPS, **({} if norm == "layer" else {"norm": norm})}
    function = functools.partial(getattr(of, op), **options)
    return function if op == "gated_residual_norm" else lambda *inputs: (function(*inputs),)


def liger(op: str) -> Callable[..., Outputs]:
    """Liger's LayerNorm after an eager gate and before an eager modulation, since its LayerNorm has neither."""
    layer_norm = _function("liger_kernel.transformers.functional", "liger_layer_norm")

    def open_(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        one, zero = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
        normed = layer_norm(x, one, zero, EPS)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    return _gated(op, open_)


def liger_modulated(op: str) -> Callable[..., Outputs]:
    """Liger's modulated RMSNorm after an eager gate. Its backward sums shift's and scale's gradients by atomics."""
    modulated = _function("liger_kernel.transformers.functional", "liger_modulated_rms_norm")

    def open_(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated(x, None, scale, shift, EPS, in_place=False)

    return _gated(op, open_)


def liger_added() -> Callable[..., Outputs]:
    """Liger's fused add and RMSNorm, after an eager gate and before an eager modulation."""
    added = _function("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")

    def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        normed, x = added(gate.unsqueeze(1) * branch, x, x.new_ones(x.shape[-1]), EPS, in_place=False)
        return x, normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    return both


def quack_added() -> Callable[..., Outputs]:
    """quack's RMSNorm that adds the residual, after an eager gate and before an eager modulation."""
    rmsnorm = _function("quack", "rmsnorm")

    def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        width = x.shape[-1]
        added = (gate.unsqueeze(1) * branch).reshape(-1, width)
        normed, summed = rmsnorm(added, x.new_ones(width), residual=x.reshape(-1, width), eps=EPS, prenorm=True)
        normed = normed.view(x.shape)
        return summed.view(x.shape), normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    return both


def _gated(op: str, open_: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """`open_` as the whole op, after an eager gate if the op has one."""

    def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        x = x + gate.unsqueeze(1) * branch
        return x, open_(x, shift, scale)

    return both if op == "gated_residual_norm" else lambda *inputs: (open_(*inputs),)


def _function(module: str, name: str) -> Callable[..., Any]:
    """A rival's function.

    Raises:
        Unavailable: its package, or this version of it, does not have the function.
    """
    attribute = getattr(optional(module), name, None)
    if attribute is None:
        raise Unavailable(f"the installed {module.partition('.')[0]} has no {name}")
    function: Callable[..., Any] = attribute
    return function


def _build(
    op: str, mode: str, batch: int, frames: int, width: int, dtype: str, norm: str, device: torch.device
) -> Setup:
    draw = functools.partial(torch.randn, device=device)
    names = {
        "gated_residual_norm": ("x", "branch", "gate", "shift", "scale"),
        "layer_norm_modulate": ("x", "shift", "scale"),
        "gated_residual": ("x", "branch", "gate"),
    }[op]
    large = ("x", "branch")
    inputs = tuple(draw(batch, frames, width) if name in large else draw(batch, width) for name in names)
    results = ("x'", "h") if op == "gated_residual_norm" else ("h",)
    gradients = tuple(draw(batch, frames, width).to(dtype_of(dtype)) for _ in results)
    inputs = tuple(value.to(dtype_of(dtype)).requires_grad_(mode != "forward") for value in inputs)

    def provider(name: str, role: str, function: Callable[[], Callable[..., Outputs]]) -> Provider:
        return Provider(name, role, lambda: modes(function(), inputs, gradients, mode), capturable=True)

    def reference() -> Outputs:
        wide = tuple(value.detach().double().requires_grad_(mode != "forward") for value in inputs)
        return modes(ours(op, norm, of=oracle), wide, tuple(g.double() for g in gradients), mode)()

    providers = [
        provider("ours", "ours", lambda: ours(op, norm)),
        provider("eager", "rival", lambda: expression(op, norm)),
        provider("compiled", "rival", lambda: compiled(expression(op, norm))),
    ]
    if device.type == "cuda":
        tuned = "max-autotune-no-cudagraphs"
        providers.append(provider("compiled, max-autotune", "rival", lambda: compiled(expression(op, norm), tuned)))
        if norm == "rms":
            providers.append(provider("Liger modulated RMSNorm", "rival", lambda: liger_modulated(op)))
            if op == "gated_residual_norm":
                providers.append(provider("Liger fused add + RMSNorm", "rival", liger_added))
                providers.append(provider("quack rmsnorm(residual=)", "rival", quack_added))
        elif op != "gated_residual":
            providers.append(provider("Liger", "rival", lambda: liger(op)))
    room = frames**0.5
    bounds = dict.fromkeys(results, BOUND[dtype]) if mode != "backward" else {}
    if mode != "forward":
        bounds |= {f"d{name}": BOUND[dtype] * (1 if name in large else room) for name in names}
    return Setup(tuple(providers), reference, bounds, expression="eager")
