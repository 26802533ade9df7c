"""Pooling and row losses by themselves: masked_mean, velocity_delta and cosine_loss, with a mask as in training.

x [B, T, D] and mask [B, T] -> mean over valid frames [B, D]; velocity [S, B, T, M] -> change [S - 1, B], energy [B]; y,
target [B, T, W] -> 1 - cos, mean over the valid rows. Least bytes: the inputs once, and in backward the gradient (and
the inputs again if it depends on them).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from agrepa_fast import ops
from agrepa_fast.reference import cosine, pooling

from ..case import Outputs, Problem, Provider, Setup, compiled, dtype_of, modes

TITLE = "Pooling and row losses"
BOUND = {"float32": 1e-5, "bfloat16": 5e-3}
OPS = ("masked_mean", "velocity_delta", "cosine_loss")

# Tensors of all elements moved (forward, backward) and operations per element (forward, backward).
COST = {"masked_mean": ((1, 1), (1, 1)), "velocity_delta": ((1, 2), (4, 4)), "cosine_loss": ((2, 3), (6, 8))}


def problems(scale: str, device: torch.device) -> list[Problem]:
    """`velocity_delta` has only a forward, since a probe differentiates nothing."""
    shapes: dict[str, tuple[int, ...]]
    if scale == "toy":
        shapes = {"masked_mean": (2, 8, 24), "velocity_delta": (3, 2, 8, 6), "cosine_loss": (2, 8, 24)}
    elif device.type == "cpu":
        shapes = {"masked_mean": (8, 256, 384), "velocity_delta": (13, 4, 256, 80), "cosine_loss": (8, 256, 768)}
    else:
        shapes = {"masked_mean": (64, 938, 1024), "velocity_delta": (25, 16, 938, 80), "cosine_loss": (64, 938, 768)}
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return [_problem(op, "forward" if op == "velocity_delta" else "both", shapes[op], dtype) for op in OPS]


def _problem(op: str, mode: str, shape: tuple[int, ...], dtype: str) -> Problem:
    elements = math.prod(shape)
    moved, work = (forward + (backward if mode == "both" else 0) for forward, backward in COST[op])
    return Problem(
        params={"op": op, "mode": mode, "shape": "x".join(map(str, shape)), "dtype": dtype},
        dtype=dtype,
        bytes=moved * elements * dtype_of(dtype).itemsize,
        flops=work * elements,
        build=functools.partial(_build, op, mode, shape, dtype),
    )


def masked_mean(mask: Tensor, x: Tensor) -> Outputs:
    """The mean in plain PyTorch, in float32 or wider."""
    kept = torch.where(mask[..., None], x.to(_wide(x)), 0)
    return ((kept.sum(1) / mask.sum(1).clamp_min(1)[:, None]).to(x.dtype),)


def velocity_delta(mask: Tensor, velocity: Tensor) -> Outputs:
    v = torch.where(mask[..., None], velocity.to(_wide(velocity)), 0)
    count = mask.sum(1).clamp_min(1) * v.shape[-1]
    return (v[1:] - v[0]).square().sum((-2, -1)) / count, v[0].square().sum((-2, -1)) / count


def cosine_loss(mask: Tensor, y: Tensor, target: Tensor) -> Outputs:
    rows = 1 - F.cosine_similarity(y.to(_wide(y)), target.to(_wide(target)), dim=-1)
    return (torch.where(mask, rows, 0).sum() / mask.sum().clamp_min(1),)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


EXPRESSIONS: dict[str, Callable[..., Outputs]] = {
    "masked_mean": masked_mean,
    "velocity_delta": velocity_delta,
    "cosine_loss": cosine_loss,
}


def ours(op: str, pooling: ModuleType = ops, cosine: ModuleType = ops) -> Callable[..., Outputs]:
    """The library's op, or the one of its reference, with the signature of the expressions."""
    if op == "masked_mean":
        return lambda mask, x: (pooling.masked_mean(x, mask),)
    if op == "velocity_delta":
        return lambda mask, velocity: pooling.velocity_delta(velocity, mask)
    return lambda mask, y, target: (cosine.cosine_loss(y, target, mask=mask),)


def _build(op: str, mode: str, shape: tuple[int, ...], dtype: str, device: torch.device) -> Setup:
    kind = dtype_of(dtype)
    frames = torch.arange(shape[-2], device=device)
    lengths = torch.randint((shape[-2] + 1) // 2, shape[-2] + 1, (shape[-3], 1), device=device)
    mask = frames < lengths
    differentiated = torch.randn(shape, device=device).to(kind).requires_grad_(mode == "both")
    fixed = (torch.randn(shape, device=device).to(kind),) if op == "cosine_loss" else ()
    outputs = EXPRESSIONS[op](mask, differentiated.detach(), *fixed)
    gradients = tuple(torch.randn_like(output) for output in outputs)

    def call(function: Callable[..., Outputs], *, wide: bool = False) -> Callable[[], Outputs]:
        def convert(value: Tensor) -> Tensor:
            return value.detach().double() if wide else value

        x = convert(differentiated)
        if wide and mode == "both":
            x.requires_grad_()
        rest, upstream = tuple(map(convert, fixed)), tuple(map(convert, gradients))
        return modes(lambda value: function(mask, value, *rest), (x,), upstream, mode)

    providers = [
        Provider("ours", "ours", lambda: call(ours(op)), capturable=True),
        Provider("eager", "rival", lambda: call(EXPRESSIONS[op]), capturable=True),
        Provider("compiled", "rival", lambda: call(compiled(EXPRESSIONS[op])), capturable=True),
    ]
    if device.type == "cuda":
        tuned = "max-autotune-no-cudagraphs"
        make = lambda: call(compiled(EXPRESSIONS[op], tuned))  # noqa: E731
        providers.append(Provider("compiled, max-autotune", "rival", make, capturable=True))
    names = ("change", "energy") if op == "velocity_delta" else ("mean" if op == "masked_mean" else "loss",)
    bounds = dict.fromkeys(names, BOUND[dtype])
    if mode == "both":
        bounds["gradient"] = BOUND[dtype]
    return Setup(tuple(providers), lambda: call(ours(op, pooling, cosine), wide=True)(), bounds, expression="eager")
