"""`projection_cosine_loss`, the alignment loss on many rows.

hidden [B, T, D] -> 1 - cos(hidden W^T + b, target), mean over rows.

Rivals: REPA's published loop over samples (arXiv 2410.06940), its vectorised form, that compiled, and Liger's nearest
    op.
"head" puts REPA's projector (Linear, SiLU, Linear, SiLU, Linear) before it. Least work: the matrix products. Least
bytes:
hidden, weight and target once, and their gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agrepa_fast import ops

from ..case import Outputs, Problem, Provider, Setup, compiled, dtype_of, modes, optional

TITLE = "Alignment loss"
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [_problem(part, mode, 3, 5, (6, 8, 4), "float32") for part in PARTS for mode in ("forward", "both")]
    if device.type == "cpu":
        if scale == "quick":
            return [_problem(part, "both", 16, 64, (384, 512, 768), "float32") for part in PARTS]
        return [
            _problem(part, mode, 32, 128, (384, 1024, 768), "float32") for part in PARTS for mode in ("forward", "both")
        ]
    sizes = [(part, mode, 256, 256, (1152, 2048, 768)) for part in PARTS for mode in ("both", "forward")]
    if scale == "full":
        sizes += [("op", "both", 32, 256, (1152, 2048, 768)), ("op", "both", 64, 938, (1024, 1024, 1280))]
    return [_problem(*size, "bfloat16") for size in sizes]


def _problem(part: str, mode: str, batch: int, frames: int, widths: tuple[int, int, int], dtype: str) -> Problem:
    entry, hidden, teacher = widths
    rows = batch * frames
    matrices = hidden * teacher + (entry * hidden + hidden * hidden if part == "head" else 0)
    start = entry if part == "head" else hidden
    factor = 1 if mode == "forward" else 3  # backward: two products for each of forward's
    moved = rows * (start + teacher) + matrices
    if mode == "both":
        moved += rows * start + 2 * matrices + rows * (start + teacher)
    return Problem(
        params={"part": part, "mode": mode, "rows": rows, "widths": "x".join(map(str, widths)), "dtype": dtype},
        dtype=dtype,
        bytes=moved * dtype_of(dtype).itemsize,
        flops=factor * 2 * rows * matrices,
        build=functools.partial(_build, part, mode, batch, frames, widths, dtype),
    )


def per_sample(projected: Tensor, target: Tensor) -> Tensor:
    """REPA's published loss plus 1: a Python loop over the samples."""
    loss = projected.new_zeros(())
    for y, z in zip(projected, target):
        loss = loss + 1 - (F.normalize(y, dim=-1) * F.normalize(z, dim=-1)).sum(-1).mean()
    return loss / projected.shape[0]


def vectorised(projected: Tensor, target: Tensor) -> Tensor:
    """REPA's loss in one expression, in float32."""
    y, z = projected.to(_wide(projected)), target.to(_wide(target))
    return (1 - F.cosine_similarity(y, z, dim=-1)).mean()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _inner(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The projector up to its last Linear (nothing for "op")."""
    for weight, bias in zip(weights[0::2], weights[1::2]):
        x = F.silu(F.linear(x, weight, bias))
    return x


def _rival(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Outputs]:
    def run(target: Tensor, x: Tensor, *weights: Tensor) -> Outputs:
        return (loss(F.linear(_inner(x, weights[:-2]), *weights[-2:]), target),)

    return run


def _ours(target: Tensor, x: Tensor, *weights: Tensor) -> Outputs:
    return (ops.projection_cosine_loss(_inner(x, weights[:-2]), weights[-2], weights[-1], target),)


def liger() -> Callable[..., Outputs]:
    """Liger's chunked distillation loss with its soft term alone. It projects the teacher too, here by the identity."""
    loss = optional("liger_kernel.chunked_loss.cosine_similarity_loss")
    module = loss.LigerFusedLinearCosineSimilarityLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)

    def run(target: Tensor, x: Tensor, *weights: Tensor) -> Outputs:
        y, z = _inner(x, weights[:-2]).flatten(0, 1), target.flatten(0, 1)
        labels = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)  # no label is ignore_index
        same = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        return (module(y, weights[-2], z, same, labels, weights[-1]),)

    return run


PARTS = ("op", "head")


def _build(
    part: str, mode: str, batch: int, frames: int, widths: tuple[int, int, int], dtype: str, device: torch.device
) -> Setup:
    entry, hidden, teacher = widths
    shapes = [(entry, hidden), (hidden, hidden)] if part == "head" else []
    shapes.append((hidden, teacher))
    names, values = ["hidden"], [torch.randn(batch, frames, shapes[0][0], device=device)]
    for i, (inner, outer) in enumerate(shapes):
        names += [f"weight{i}", f"bias{i}"]
        values += [torch.randn(outer, inner, device=device) * inner**-0.5, 0.1 * torch.randn(outer, device=device)]
    kind = dtype_of(dtype)
    inputs = tuple(value.to(kind).requires_grad_(mode == "both") for value in values)
    target = torch.randn(batch, frames, teacher, device=device).to(kind)
    one = (torch.ones((), device=device),)

    def provider(name: str, role: str, make: Callable[[], Callable[..., Outputs]], capturable: bool = True) -> Provider:
        def build_call() -> Any:
            function = functools.partial(make(), target)
            probe = function(*inputs)[0]
            return modes(function, inputs, (one[0].to(probe.dtype),), mode)

        return Provider(name, role, build_call, capturable)

    def reference() -> Outputs:
        wide = tuple(value.detach().double().requires_grad_(mode == "both") for value in inputs)
        function = functools.partial(_rival(vectorised), target.double())
        return modes(function, wide, (one[0].double(),), mode)()

    providers = [
        provider("ours", "ours", lambda: _ours),
        provider("per-sample loop", "published", lambda: _rival(per_sample)),
        provider("vectorised", "rival", lambda: _rival(vectorised)),
        provider("vectorised, compiled", "rival", lambda: compiled(_rival(vectorised))),
        # Its backward compares the upstream gradient with 1 on the host.
        provider("Liger", "rival", liger, capturable=False),
    ]
    if device.type == "cuda":
        tuned = "max-autotune-no-cudagraphs"
        providers.append(provider("compiled, max-autotune", "rival", lambda: compiled(_rival(vectorised), tuned)))
    bounds = {"loss": BOUND[dtype]}
    if mode == "both":
        bounds |= {f"d{name}": BOUND[dtype] * (1 if name == "hidden" else 4) for name in names}
    return Setup(tuple(providers), reference, bounds)
