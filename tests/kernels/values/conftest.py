"""Inputs, fp64 oracles and error bounds of the kernel tests; every uninitialised output starts as nan.

Two bounds per tensor, against `agrepa_fast.reference` in float64: the largest error is at most twice that of the plain
PyTorch expression in the same dtype, and the error's RMS over the exact RMS stays below RMS_BOUND.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agrepa_fast import kernels, ops, reference
from agrepa_fast.kernels import residual_backward  # noqa: F401 (attributes of `kernels`)
from agrepa_fast.kernels.launch import LaunchConfig
from agrepa_fast.reference import pooling, residual  # noqa: F401 (attributes of `reference`)

EPS = 1e-6
# Which modulation has a row for each token.
PER_TOKEN = ("gate, shift, scale", "gate", "shift, scale", "shift", "scale, gate")
# The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RMS_BOUND = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2 if INTERPRETED else 5e-3,
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel should have written and did not is nan."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch) -> None:
    """The ops keep the kernels that they prepared, with the launch configurations and the code of an earlier test."""
    monkeypatch.setattr("agrepa_fast.ops.residual._calls", {})


@pytest.fixture
def small_launches(monkeypatch):
    """Several programs per sequence and several tiles per program, also for a few frames."""
    config = LaunchConfig(block_t=4, num_warps=1, programs=6)
    for module in (kernels.residual, kernels.residual_backward):
        monkeypatch.setattr(module, "configuration", lambda *_: config)


@pytest.fixture(scope="session")
def bench() -> types.ModuleType:
    """This file: test files cannot import one another."""
    return sys.modules[__name__]


@dataclass
class Case:
    """Arguments of `gated_residual_norm`; the two ends of the chain use a part of them."""

    x: Tensor
    branch: Tensor
    gate: Tensor
    shift: Tensor
    scale: Tensor
    stream_scale: Tensor | None = None
    sample_index: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    norm: str = "layer"

    def floating(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def to(self, dtype: torch.dtype) -> Case:
        """A leaf copy in another dtype, on the CPU."""
        return dataclasses.replace(
            self,
            **{name: value.detach().cpu().to(dtype).requires_grad_() for name, value in self.floating().items()},
            sample_index=None if self.sample_index is None else self.sample_index.cpu(),
        )


def make_case(
    device: torch.device,
    width: int = 24,
    *,
    sequences: int = 3,
    frames: int = 5,
    samples: int | None = 2,
    active: int | None = None,
    streams: bool = True,
    dtype: torch.dtype = torch.float32,
    modulation: torch.dtype | None = None,
    norm: str = "layer",
    per_token: str = "",
    affine: bool = False,
    seed: int = 0,
) -> Case:
    """Random arguments with an offset, so that the mean matters; modulation as the chunks of one tensor.

    `per_token` names the modulation that has a row for each token ("gate, shift, scale")."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    index = None
    if samples is not None:
        index = torch.randint(0, samples, (sequences,), generator=generator).to(device)
    rows = samples or sequences
    chunks = randn(rows, 3 * width, dtype=modulation or dtype).chunk(3, dim=1)
    if per_token:
        by_token = randn(rows, frames, 3 * width, dtype=modulation or dtype).chunk(3, dim=2)
        names = ("gate", "shift", "scale")
        chunks = [by_token[i] if name in per_token else chunks[i] for i, name in enumerate(names)]
    gate, shift, scale = chunks
    # One stream out, one half, one doubled and reversed, the rest in.
    s = torch.tensor(([1.0, 0.0, 0.5, -2.0] * sequences)[:sequences]).to(device, modulation or dtype)
    return Case(
        x=randn(sequences, frames, width) + 0.5,
        branch=randn(sequences if active is None else active, frames, width),
        gate=gate,
        shift=shift,
        scale=scale,
        stream_scale=s if streams else None,
        sample_index=index,
        weight=randn(width, dtype=modulation or dtype) if affine else None,
        bias=randn(width, dtype=modulation or dtype) if affine else None,
        norm=norm,
    )


def plain(case: Case, op: str) -> tuple[Tensor, ...]:
    """An op as one would write it in PyTorch, every step in the tensors' own dtype: what errors are compared with."""

    def rows(modulation: Tensor) -> Tensor:
        modulation = modulation if case.sample_index is None else modulation[case.sample_index]
        return modulation if modulation.dim() == 3 else modulation[:, None]

    x = case.x
    if op != "layer_norm_modulate":
        active = case.branch.shape[0]
        branch = case.branch
        if case.stream_scale is not None:
            s = case.stream_scale[:active, None, None]
            branch = s * torch.where(s == 0, 0, branch)
        x = torch.cat([x[:active] + rows(case.gate)[:active] * branch, x[active:]])
        if op == "gated_residual":
            return (x,)
    width = x.shape[-1:]
    normed = F.layer_norm(x, width, eps=EPS) if case.norm == "layer" else F.rms_norm(x, width, eps=EPS)
    normed = normed if case.weight is None else normed * case.weight
    normed = normed if case.bias is None else normed + case.bias
    h = normed * (1 + rows(case.scale)) + rows(case.shift)
    return (x, h) if op == "gated_residual_norm" else (h,)


def call(module: types.ModuleType, case: Case, op: str, join: Tensor | None = None) -> tuple[Tensor, ...]:
    """An op of `agrepa_fast.ops` or of the reference; `join` for the two that have a branch."""
    branch = {"stream_scale": case.stream_scale, "join": join}
    norm = {"norm": case.norm, "eps": EPS, "weight": case.weight, "bias": case.bias}
    arguments = {
        "gated_residual_norm": ((case.x, case.branch, case.gate, case.shift, case.scale), branch | norm),
        "layer_norm_modulate": ((case.x, case.shift, case.scale), norm),
        "gated_residual": ((case.x, case.branch, case.gate), branch),
    }
    tensors, options = arguments[op]
    found = getattr(module, op)(*tensors, sample_index=case.sample_index, **options)
    return found if isinstance(found, tuple) else (found,)


def fused(case: Case, op: str, join: Tensor | None = None) -> tuple[Tensor, ...]:
    """An op as users call it."""
    return call(ops, case, op, join)


def oracle(case: Case, op: str) -> tuple[Tensor, ...]:
    """The op's reference."""
    return call(reference.residual, case, op)


def used(case: Case, op: str) -> list[str]:
    """The differentiable arguments of an op."""
    unused = {
        "layer_norm_modulate": ("branch", "gate", "stream_scale"),
        "gated_residual": ("shift", "scale", "weight", "bias"),
    }
    return [name for name in case.floating() if name not in unused.get(op, ())]


def results(case: Case, op: str, run, output_grads: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    names = used(case, op)
    outputs = run(case, op)
    grads = torch.autograd.grad(
        outputs, [getattr(case, name) for name in names], [g.to(o) for g, o in zip(output_grads, outputs)]
    )
    return {f"output {i}": o for i, o in enumerate(outputs)} | {f"d{n}": g for n, g in zip(names, grads)}


def check(case: Case, op: str, run=fused, seed: int = 1) -> None:
    """Outputs and all gradients of `run` against float64, with the file's bounds."""
    generator = torch.Generator().manual_seed(seed)
    output_grads = [torch.randn(case.x.shape, generator=generator, dtype=torch.float64).to(case.x) for _ in range(2)]
    for name in used(case, op):
        getattr(case, name).requires_grad_()
    found = results(case, op, run, output_grads)
    exact = results(case.to(torch.float64), op, oracle, output_grads)
    same = results(case.to(case.x.dtype), op, plain, output_grads)
    for name, value in found.items():
        if value.numel():
            size = _uncancelled(case, exact) if name == "dstream_scale" else 0.0
            close(name, value, exact[name], same[name], case.x.dtype, _terms(case, name), size)


def check_join(case: Case, op: str, own: int, join: Tensor | None = None) -> None:
    """Outputs of an op that takes the sequences from `own` on as `join` (or the given tensor, the same rows laid out in
    another way) against float64, where they stand in x; with the file's bounds."""
    found = fused(dataclasses.replace(case, x=case.x[:own]), op, case.x[own:] if join is None else join)
    with torch.no_grad():
        exact, same = oracle(case.to(torch.float64), op), plain(case.to(case.x.dtype), op)
    for i, value in enumerate(found):
        close(f"output {i}", value, exact[i], same[i], case.x.dtype)


def plain_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(dim=1)
    kept = torch.where(mask[..., None], x, 0)
    return kept.sum(dim=1) / mask.sum(dim=1).clamp_min(1)[:, None].to(x.dtype)


def plain_delta(v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    n = v.shape[2] if mask is None else mask.sum(dim=1).clamp_min(1)
    if mask is not None:
        v = torch.where(mask[..., None], v, 0)
    return tuple(e.sum(dim=(-2, -1)) / (n * v.shape[-1]) for e in ((v[1:] - v[0]).square(), v[0].square()))


def check_pooling(fused, x: Tensor, mask: Tensor | None) -> None:
    """Outputs and gradient of `masked_mean` or `velocity_delta` against float64; masked frames hold nan."""
    plain = plain_delta if x.dim() == 4 else plain_mean
    oracle = getattr(reference.pooling, "velocity_delta" if x.dim() == 4 else "masked_mean")
    if mask is not None:
        x = torch.where(mask[..., None], x, float("nan"))
    x = x.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    weights = None

    def run(function, value, mask):
        nonlocal weights
        outputs = function(value, mask)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if weights is None:
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        total = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights))
        return [*outputs, torch.autograd.grad(total, value)[0]]

    found = run(fused, x, mask)
    host = None if mask is None else mask.cpu()
    exact = run(oracle, x.detach().cpu().double().requires_grad_(), host)
    same = run(plain, x.detach().cpu().requires_grad_(), host)
    terms = x.shape[-2]
    for i, (value, e, s) in enumerate(zip(found, exact, same)):
        close(f"value {i}", value, e, s, value.dtype, terms)


def _terms(case: Case, name: str) -> int:
    """How many rows a value sums."""
    if name in ("dgate", "dshift", "dscale", "dweight", "dbias"):
        return case.x.shape[0] * case.x.shape[1]
    return case.x[0].numel() if name == "dstream_scale" else 1


def _uncancelled(case: Case, exact: dict[str, Tensor]) -> float:
    """How large ds would be if its terms, the gate times branch times dx, were of random signs.

    It is one number for each stream, and its terms may cancel; their rounding stays."""
    active = case.branch.shape[0]
    s = case.stream_scale[:active, None, None].detach().cpu().double()
    terms = torch.where(s == 0, 0.0, exact["dbranch"] * case.branch.detach().cpu().double() / s)
    return (terms.square().sum() / case.x.shape[0]).sqrt().item()


def close(
    name: str, value: Tensor, exact: Tensor, same: Tensor, dtype: torch.dtype, terms: int = 1, size: float = 0.0
) -> None:
    """The two bounds in a dtype; `terms` is how many values of the same size each element sums, `size` the least RMS
    that errors are compared with."""
    value, same = value.detach().cpu().double(), same.detach().cpu().double()
    assert value.shape == exact.shape, name
    assert value.isfinite().all(), f"{name}: not written, or not finite"
    scale = max(exact.square().mean().sqrt().item(), size) + 1e-30
    error, allowed = (value - exact).abs().max().item(), 2 * (same - exact).abs().max().item()
    slack = 4 * torch.finfo(dtype).eps * exact.abs().max().item() * terms**0.5
    assert error <= allowed + slack, f"{name}: error {error:.3g}, plain PyTorch in {dtype} {allowed / 2:.3g}"
    rms = (value - exact).square().mean().sqrt().item() / scale
    bound = RMS_BOUND[dtype] * terms**0.5
    assert rms <= bound, f"{name}: RMS error {rms:.3g} of the exact RMS, bound {bound:.3g}"
