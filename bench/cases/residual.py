"""The residual-stream ops, forward, backward and both, over rows, width and dtype.

x, branch [B, T, D]; gate, shift, scale [B, D]; rows = B T. Least bytes: every tensor of R D elements once (forward of
gated_residual_norm reads x and branch and writes x' and h; its backward reads dx', dh, x', branch and writes dx,
dbranch), and the modulation and its gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from agrepa_fast import ops

from ..case import Outputs, Problem, Provider, Setup, compiled, dtype_of, modes, optional

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
    if scale == "toy":
        sizes = [(op, mode, 2, 8, 24, "float32") for op in COST for mode in ("forward", "backward", "both")]
    elif scale == "quick" and device.type == "cpu":
        sizes = [(norm, mode, 4, 256, 384, "float32") for mode in ("forward", "backward", "both")]
        sizes += [(norm, "both", 4, 938, 1024, "float32")]
        sizes += [(op, "both", 4, 256, 384, "float32") for op in (open_, close)]
    else:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        every = ("forward", "backward", "both")
        sizes = [(norm, mode, 4, 938, 1024, dtype) for mode in every]
        sizes += [(norm, mode, 32, 256, width, dtype) for width in (384, 768, 1152, 1536) for mode in every[:2]]
        sizes += [(norm, mode, 4, 256, 384, dtype) for mode in every]
        sizes += [(norm, mode, 64, 512, 1024, dtype) for mode in every[:2]]
        sizes += [(op, mode, 32, 256, 1024, dtype) for op in (open_, close) for mode in every[:2]]
        if device.type == "cuda":
            sizes += [(norm, mode, 32, 256, 1024, "float32") for mode in every[:2]]
    return [_problem(*size, rivals=scale != "toy" or size[0] == norm) for size in sizes]


def _problem(op: str, mode: str, batch: int, frames: int, width: int, dtype: str, rivals: bool) -> Problem:
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
    return Problem(
        params={"op": op, "mode": mode, "rows": batch * frames, "width": width, "batch": batch, "dtype": dtype},
        dtype=dtype,
        bytes=moved[mode] * size,
        flops=flops[mode],
        build=functools.partial(_build, op, mode, batch, frames, width, dtype),
    )


def expression(op: str) -> Callable[..., Outputs]:
    """The op as one writes it in PyTorch, in the input's dtype."""

    def close(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return x + gate.unsqueeze(1) * branch

    def open_(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        x = close(x, branch, gate)
        return x, open_(x, shift, scale)

    if op == "gated_residual_norm":
        return both
    if op == "gated_residual":
        return lambda *inputs: (close(*inputs),)
    return lambda *inputs: (open_(*inputs),)


def ours(op: str) -> Callable[..., Outputs]:
    """The library's op, as a function that returns a tuple."""
    function = getattr(ops, op)
    if op == "gated_residual_norm":
        return functools.partial(function, eps=EPS)
    return lambda *inputs: (function(*inputs),)


def liger(op: str) -> Callable[..., Outputs]:
    """Liger's LayerNorm between an eager gate and an eager modulation: it has no op with either."""
    functional = optional("liger_kernel.transformers.functional")

    def open_(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        one, zero = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
        normed = functional.liger_layer_norm(x, one, zero, EPS)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        x = x + gate.unsqueeze(1) * branch
        return x, open_(x, shift, scale)

    return both if op == "gated_residual_norm" else lambda *inputs: (open_(*inputs),)


def _build(op: str, mode: str, batch: int, frames: int, width: int, dtype: str, device: torch.device) -> Setup:
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
        return modes(expression(op), wide, tuple(g.double() for g in gradients), mode)()

    providers = [
        provider("ours", "ours", lambda: ours(op)),
        provider("eager", "rival", lambda: expression(op)),
        provider("compiled", "rival", lambda: compiled(expression(op))),
    ]
    if device.type == "cuda":
        tuned = "max-autotune-no-cudagraphs"
        providers.append(provider("compiled, max-autotune", "rival", lambda: compiled(expression(op), tuned)))
        if op != "gated_residual":
            providers.append(provider("Liger", "rival", lambda: liger(op)))
    room = frames**0.5
    bounds = dict.fromkeys(results, BOUND[dtype]) if mode != "backward" else {}
    if mode != "forward":
        bounds |= {f"d{name}": BOUND[dtype] * (1 if name in large else room) for name in names}
    return Setup(tuple(providers), reference, bounds, expression="eager")
