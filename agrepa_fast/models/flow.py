"""Flow matching on the straight path: x_t = (1 - t) e + t x, velocity u = x - e, t = 0 noise, t = 1 data.

x, e, x_t, u [B, T, M]; t [B]. e is N(0, sigma^2) with sigma = 0.5 (arXiv 2603.01006).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIGMA = 0.5


def path(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the path, and its velocity: x, noise [B, T, M], t [B] -> x_t, u [B, T, M]."""
    step = t[:, None, None].to(x.dtype)
    return torch.lerp(noise, x, step), x - noise


def flow_matching_loss(velocity: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample over its valid frames: [B, T, M], mask [B, T] -> [B], float32 or wider.

    Masked frames contribute exactly zero loss and gradient, whatever they hold. A sample without valid frames gives 0.
    """
    error = velocity.to(torch.promote_types(velocity.dtype, torch.float32)) - target
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
) -> dict[str, Tensor]:
    """Inputs of `attribute_layers` on the path: every sample at every t of the grid, folded into the batch.

    x [B, T, M] clean mel, cond [B, T, C], mask [B, T] -> x_t [G B, T, M], t [G B], cond, mask for G grid
    points, t-major. A sample keeps one noise draw over the grid, so that only t differs.

    Raises:
        ValueError: the grid is empty, or holds a value outside [0, 1].
    """
    if len(t_grid) == 0 or not all(0 <= t <= 1 for t in t_grid):
        raise ValueError(f"t_grid: expected at least one value, each in [0, 1], got {list(t_grid)}")
    noise = SIGMA * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    grid = len(t_grid)
    t = torch.tensor(t_grid, device=x.device, dtype=torch.float32).repeat_interleave(x.shape[0])
    x_t, _ = path(x.repeat(grid, 1, 1), noise.repeat(grid, 1, 1), t)
    inputs = {"x_t": x_t, "t": t}
    if cond is not None:
        inputs["cond"] = cond.repeat(grid, 1, 1)
    if mask is not None:
        inputs["mask"] = mask.repeat(grid, 1)
    return inputs


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
) -> Tensor:
    """Integrate dx/dt = v from noise to data.

    Args:
        model: called as model(x_t, t, cond, mask) -> velocity [B, T, M].
        noise: [B, T, M], drawn from N(0, sigma^2), the state at t = 0.
        cond, null_cond: [B, T, C]; with null_cond, classifier-free guidance
            v = v_null + guidance (v_cond - v_null), both halves in one batch.
        mask: [B, T] bool.
        points: grid points from t = 0 to t = 1, at least 2 (points - 1 steps).
        method: "euler" or "midpoint" (two evaluations a step).
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

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        if not guided:
            return model(x, time.expand(batch), cond, mask)
        with_cond, without = model(x.repeat(2, 1, 1), time.expand(2 * batch), cond, mask).chunk(2)
        return torch.lerp(without, with_cond, guidance)

    grid = torch.linspace(0, 1, points, device=noise.device)
    if sway_coefficient is not None:
        grid = sway(grid, sway_coefficient)
    x = noise
    for start, end in itertools.pairwise(grid.unbind()):
        step = end - start
        v = velocity(x, start)
        if method == "midpoint":
            v = velocity(x + 0.5 * step * v, start + 0.5 * step)
        x = x + step * v
    return x
