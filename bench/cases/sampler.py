"""Sampling with guidance: Euler steps on the swayed grid, noise [B, T, M] -> mel [B, T, M].

Ours runs both halves of the guidance in one batch; the straightforward loop runs one after the other. Least work:
2 (points - 1) forwards.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from agrepa_fast.models.cost import forward_flops
from agrepa_fast.models.dit import PRESETS, DiTConfig
from agrepa_fast.models.flow import sample

from ..case import Outputs, Problem, Provider, Run, Setup, dtype_of
from ..published import published, random_dit
from .foga import TOY, draw_inputs, precision
from .train_step import RELEASED_FORM

TITLE = "Sampler"
GUIDANCE = 3.0
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [_problem("toy", TOY, 2, 16, 4, "float32")]
    if device.type == "cpu":
        points = 8 if scale == "quick" else 32
        return [_problem("demo", PRESETS["demo"], 4, 128, points, "float32")]
    names = ("small", "paper") if scale == "full" else ("small",)
    return [_problem(name, PRESETS[name], 4, 938, 32, "bfloat16") for name in names]


def _problem(name: str, config: DiTConfig, batch: int, frames: int, points: int, dtype: str) -> Problem:
    forwards = 2 * (points - 1)
    flops = forward_flops(config, batch, frames)
    weights = config.depth * (4 + 2 * config.ff_ratio + 6) * config.width**2
    moved = (points - 1) * weights + forwards * config.depth * 12 * batch * frames * config.width
    return Problem(
        params={"preset": name, "points": points, "frames": frames, "batch": batch, "dtype": dtype},
        dtype=dtype,
        bytes=moved * dtype_of(dtype).itemsize,
        flops=forwards * flops,
        build=functools.partial(_build, config, batch, frames, points, dtype),
    )


def _build(config: DiTConfig, batch: int, frames: int, points: int, dtype: str, device: torch.device) -> Setup:
    model = random_dit(config, device).eval()
    drawn = draw_inputs(config, batch, frames, device)
    noise, cond = drawn["x_t"], drawn["cond"]
    tokens = config.cond - config.mels  # the null condition has no tokens and keeps the reference mel
    null = torch.cat([torch.zeros_like(cond[..., :tokens]), cond[..., tokens:]], dim=-1)

    def ours() -> Run:
        def run() -> Outputs:
            with precision(dtype, device):
                return (sample(model, noise, cond, null, points=points, guidance=GUIDANCE),)

        return run

    def straight(keep_weights: bool) -> Run:
        network = published(model, keep_weights).eval()

        def run() -> Outputs:
            with precision("float32" if keep_weights else dtype, device):
                return (euler(network, noise, cond, null, points),)

        return run

    def cast() -> Run:
        network = published(model, keep_weights=False).eval().to(dtype_of(dtype))
        start, condition, empty = (value.to(dtype_of(dtype)) for value in (noise, cond, null))
        return lambda: (euler(network, start, condition, empty, points),)

    def reference() -> Outputs:
        network = published(model, keep_weights=False).double().eval()
        return (euler(network, noise.double(), cond.double(), null.double(), points),)

    providers = (
        Provider("ours", "ours", ours),
        Provider(RELEASED_FORM[dtype], "published", lambda: straight(True)),
        Provider("two forwards a step, SDPA", "rival", lambda: straight(False)),
        *([Provider(f"two forwards a step, SDPA, {dtype} model", "rival", cast)] if dtype != "float32" else ()),
    )
    return Setup(providers, reference, {"mel": BOUND[dtype]})


@torch.no_grad()
def euler(network: torch.nn.Module, x: Tensor, cond: Tensor, null: Tensor, points: int) -> Tensor:
    """The published sampler: two forwards for each step, guided, on the grid 1 - cos(pi t / 2)."""
    grid = [1 - math.cos(math.pi / 2 * i / (points - 1)) for i in range(points)]
    for start, end in itertools.pairwise(grid):
        t = torch.full((x.shape[0],), start, device=x.device, dtype=x.dtype)
        with_cond, _ = network(x, t, cond)
        without, _ = network(x, t, null)
        x = x + (end - start) * (without + GUIDANCE * (with_cond - without))
    return x
