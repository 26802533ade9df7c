"""Loss, probe inputs and sampler of flow matching and diffusion; `process` says which paths and outputs there are.

The default is flow matching on the rectified path: x_t = (1 - t) e + t x, velocity u = x - e, t = 0 noise, t = 1 data;
x, e, x_t, u [B, T, M]; t [B]. e is N(0, sigma^2) with sigma = 0.5 (arXiv 2603.01006).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .process import SIGMA, Process

__all__ = ["FLOW_MATCHING", "SIGMA", "Process", "flow_matching_loss", "path", "probe_inputs", "sample", "sway"]

FLOW_MATCHING = Process()


def path(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the rectified path, and its velocity: x, noise [B, T, M], t [B] -> x_t, u [B, T, M]."""
    return FLOW_MATCHING.point(x, noise, t)


def flow_matching_loss(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample over its valid frames: [B, T, M], mask [B, T] -> [B], float32 or wider.

    output, target: of whatever the network predicts; the velocity in flow matching.

    Masked frames contribute exactly zero loss and gradient, whatever they hold. A sample without valid frames gives 0.
    """
    error = output.to(torch.promote_types(output.dtype, torch.float32)) - target
    if mask is None:
        return error.square().mean(dim=(-2, -1))
    # Select before squaring: the gradient of the square at a masked nan would be nan.
    error = torch.where(mask.unsqueeze(-1), error, 0).square().mean(-1)
    return error.sum(-1) / mask.sum(-1).clamp_min(1)


def probe_inputs(
    x: Tensor,
    cond: Tensor | None,
    mask: Tensor | None,
    t_grid: Sequence[float],
    generator: torch.Generator | None = None,
    *,
    sigma: float | None = None,
    process: Process = FLOW_MATCHING,
    names: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Inputs of `attribute_layers` on the path: every sample at every t of the grid, folded into the batch.

    Args:
        x: [B, ...] clean data, [B, T, M] for a mel.
        cond, mask: [B, ...], or None.
        t_grid: G values in [0, 1]; 0 is noise.
        sigma: standard deviation of the noise in training (F5-TTS: 1); None for that of the process.
        process: whose path x_t lies on. Its parametrisation does not matter here.
        names: {"x_t", "t", "cond", "mask": what the model's forward calls it}; others stay.
        extra: further arguments of the forward, by the model's names. Tensors whose first size is B are repeated.

    Returns:
        {name: [G B, ...]}, t-major. A sample keeps one noise draw over the grid, so that only t differs.

    Raises:
        ValueError, TypeError: the grid is empty or has a value outside [0, 1]; an unknown name; a sigma of 0 or less;
            an argument of another kind, or of another number of samples.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected non-empty floating [batch, ...], got {got}")
    if isinstance(t_grid, str) or not isinstance(t_grid, Iterable):
        raise TypeError(f"t_grid: expected values in [0, 1], got {t_grid!r:.60}")
    t_grid = [float(t) for t in t_grid]
    if not t_grid or not all(0 <= t <= 1 for t in t_grid):
        raise ValueError(f"t_grid: expected at least one value, each in [0, 1], got {t_grid}")
    for name, value in (("cond", cond), ("mask", mask)):
        if value is not None and (not isinstance(value, Tensor) or value.shape[:1] != x.shape[:1]):
            got = str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a tensor of x's {x.shape[0]} samples, got {got}")
    if not isinstance(process, Process) or not isinstance(generator, torch.Generator | None):
        got = f"{type(process).__name__} and {type(generator).__name__}"
        raise TypeError(f"process, generator: expected a Process and a torch.Generator or None, got {got}")
    if not isinstance(names, Mapping | None) or not isinstance(extra, Mapping | None):
        raise TypeError(f"names, extra: expected mappings, got {type(names).__name__} and {type(extra).__name__}")
    sigma = process.noise_std if sigma is None else sigma
    if not isinstance(sigma, Real) or not 0 < sigma < math.inf:
        raise ValueError(f"sigma: expected a standard deviation above 0, got {sigma!r:.60}")
    own = ("x_t", "t", "cond", "mask")
    names = {name: name for name in own} | dict(names or {})
    if set(names) != set(own):
        raise ValueError(f"names: expected some of {', '.join(own)}, got {next(n for n in names if n not in own)!r}")
    noise = sigma * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    batch, grid = x.shape[0], len(t_grid)

    def over_grid(value: Any) -> Any:
        carries = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        return value.repeat(grid, *[1] * (value.dim() - 1)) if carries else value

    t = torch.tensor(t_grid, device=x.device, dtype=torch.float32).repeat_interleave(batch)
    x_t, _ = process.point(over_grid(x), over_grid(noise), t)
    inputs = {"x_t": x_t, "t": t, "cond": cond, "mask": mask}
    named = {names[name]: over_grid(value) for name, value in inputs.items() if value is not None}
    return named | {name: over_grid(value) for name, value in (extra or {}).items()}


def sway(t: Tensor, coefficient: float = -1.0) -> Tensor:
    """Sway sampling (F5-TTS, arXiv 2410.06885): t + c (cos(pi t / 2) - 1 + t); c < 0 puts more steps near noise."""
    return t + coefficient * (torch.cos(math.pi / 2 * t) - 1 + t)


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    noise: Tensor,
    cond: Tensor | None = None,
    null_cond: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    points: int = 32,
    guidance: float = 3.0,
    method: str = "euler",
    sway_coefficient: float | None = -1.0,
    process: Process = FLOW_MATCHING,
) -> Tensor:
    """Integrate the ordinary differential equation of a process from noise to data.

    Args:
        model: called as model(x_t, t, cond, mask) -> what it predicts [B, T, M], the velocity by default.
        noise: [B, T, M], drawn from N(0, sigma^2), the state at t = 0. The process says which sigma.
        cond, null_cond: [B, T, C]; with null_cond, classifier-free guidance
            v = v_null + guidance (v_cond - v_null), both halves in one batch. It is the same for every parametrisation,
            as each follows linearly from any other.
        mask: [B, T] bool.
        points: grid points from t = 0 to t = 1, at least 2 (points - 1 steps). eps begins at `process.first_t`.
        method: "euler" (on a curved path `Process.step`, which is DDIM's) or "midpoint" (two evaluations a step).
        sway_coefficient: see `sway`; None for a uniform grid.

    Returns:
        [B, T, M] at t = 1.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, got {points}")
    if method not in ("euler", "midpoint"):
        raise ValueError(f'method: expected "euler" or "midpoint", got {method!r}')
    guided = null_cond is not None and guidance != 1.0
    if null_cond is not None and guided:
        if cond is None:
            raise ValueError("null_cond: guidance needs cond as well")
        cond = torch.cat([cond, null_cond])
        mask = None if mask is None else mask.repeat(2, 1)
    batch = noise.shape[0]

    def predict(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state, the network's output there, and its time [B]."""
        if not guided:
            return x, model(x, time.expand(batch), cond, mask), time.expand(batch)
        with_cond, without = model(x.repeat(2, 1, 1), time.expand(2 * batch), cond, mask).chunk(2)
        return x, torch.lerp(without, with_cond, guidance), time.expand(batch)

    grid = torch.linspace(0, 1, points, device=noise.device)
    if sway_coefficient is not None:
        grid = sway(grid, sway_coefficient)
    if process.first_t:
        grid = process.first_t + (1 - process.first_t) * grid
    x = noise
    if process != FLOW_MATCHING:
        x = x * float(process.coefficients(torch.tensor(process.first_t))[1])
    intervals = list(itertools.pairwise(grid.unbind()))
    for number, (start, end) in enumerate(intervals):
        step = end - start
        at = predict(x, start)
        if method == "midpoint":
            middle = process.step(x, start, 0.5 * step, at, last=False)
            at = predict(middle, start + 0.5 * step)
        x = process.step(x, start, step, at, last=number == len(intervals) - 1)
    return x
