"""First-order estimates of the ablation scores of a `DiT`: a few backward passes serve all layers.

m_k is the scale of unit k's residual branches (1 in the network, 0 in FoG-A's ablation), one for each sample: [U, N].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.dit import EPS, DiT
from .native import between
from .networks import by_name
from .plan import AblationPlan
from .runner import check_finite, check_frames, probing
from .scores import METRICS, LayerScores, normalised_change, whole_number
from .statistics import spearman


@dataclass(frozen=True, eq=False)
class FirstOrderScores:
    """Estimated scores, with the error that the random draws of u cause.

    Attributes:
        draw_stderr: [U] the relative standard error of the mean of `||dv/dm_k||^2` over the samples."""

    scores: LayerScores
    draw_stderr: Tensor

    def rank_correlation(self, exact: LayerScores) -> float:
        """Spearman's rho between this estimate and exact scores of the same units.

        Raises:
            ValueError: the units differ.
        """
        if exact.names != self.scores.names:
            raise ValueError(f"expected exact scores of {self.scores.names}, got {exact.names}")
        return spearman(self.scores.mean, exact.mean)


def first_order_scores(
    model: DiT,
    inputs: Mapping[str, Any] | Sequence[Any],
    blocks: Sequence[int] | None = None,
    metric: str = "rms",
    draws: int = 8,
    branches: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> FirstOrderScores:
    """Estimate FoG-A by the derivative: removing unit k changes v by about -dv/dm_k.

    `||dv/dm_k||^2` is the mean of `(u^T dv/dm_k)^2` over u ~ N(0, I) (Hutchinson, 1990), so that `draws` backward
    passes serve all units. The derivative itself is only an estimate, as an ablation is not a small change. Compare
    with exact scores (`rank_correlation`) before you select layers by it.

    Args:
        model, inputs, blocks, metric, branches: as in `attribute_layers`.
        draws: number of random cotangents u, at least 2.
        generator: draws u, on the velocity's device; None: a generator with seed 0.

    Raises:
        TypeError, ValueError: on a model, shapes, layers or a number of draws that do not fit.
    """
    whole_number("draws", draws, 2)  # the standard error needs two
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    named, plan = _checked(model, inputs, blocks, branches)
    mask = named.get("mask")
    with probing(model), torch.enable_grad():
        velocity, gates = _velocity(model, plan, named)
        if generator is None:
            generator = torch.Generator(velocity.device).manual_seed(0)
        squares = []
        for n in range(draws):
            u = torch.randn(velocity.shape, generator=generator, device=velocity.device, dtype=velocity.dtype)
            if mask is not None:
                u = torch.where(mask.unsqueeze(-1), u, 0)
            (projection,) = torch.autograd.grad(velocity, gates, u, retain_graph=n + 1 < draws)
            squares.append(projection.double().square())
    # Divide the sum over valid frames and bins, as the exact score is a mean.
    frames = velocity.shape[1] if mask is None else mask.sum(1)
    change = (torch.stack(squares) / (frames * velocity.shape[2])).cpu()
    _, energy = ops.velocity_delta(velocity.detach().expand(2, *velocity.shape), mask)
    check_finite(plan, change.mean(0), energy.cpu())
    by_draw = change.mean(2)
    scores = _scores(plan, named, normalised_change(change.mean(0), energy.double().cpu(), metric), metric, branches)
    return FirstOrderScores(scores, by_draw.std(0) / draws**0.5 / by_draw.mean(0))


def gradient_norm_scores(
    model: DiT,
    inputs: Mapping[str, Any] | Sequence[Any],
    target: Tensor,
    blocks: Sequence[int] | None = None,
    branches: Sequence[str] | None = None,
) -> LayerScores:
    """The "gradient norm" control: `|dL/dm_k|` of each sample's flow-matching loss against `target` [N, T, M].

    It measures how the loss, not the velocity, depends on a layer's strength. It takes one backward pass.

    Raises:
        TypeError, ValueError: on a model, shapes or layers that do not fit.
    """
    named, plan = _checked(model, inputs, blocks, branches)
    if not isinstance(target, Tensor) or not target.is_floating_point():
        raise TypeError(f"target: expected a floating tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != named["x_t"].shape:
        raise ValueError(f"target: expected {list(named['x_t'].shape)} as x_t, got {list(target.shape)}")
    mask = named.get("mask")
    with probing(model), torch.enable_grad():
        velocity, gates = _velocity(model, plan, named)
        _, loss = ops.velocity_delta((velocity - target).expand(2, *velocity.shape), mask)
        (gradient,) = torch.autograd.grad(loss.sum(), gates)
    check_finite(plan, gradient.cpu(), loss.flatten().cpu())
    return _scores(plan, named, gradient.abs().double().cpu(), "gradient", branches)


def _checked(
    model: DiT, inputs: Any, blocks: Sequence[int] | None, branches: Sequence[str] | None
) -> tuple[dict[str, Tensor], AblationPlan]:
    if not isinstance(model, DiT):
        raise TypeError(f"model: expected an agrepa_fast.DiT, got {type(model).__name__}")
    named = by_name(inputs)
    if "mask" in named:
        check_frames(named["mask"].flatten(1).sum(1))
    return named, AblationPlan.build(model.depth, blocks, branches)


def _velocity(model: DiT, plan: AblationPlan, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The velocity [N, T, M] as a function of m [U, N], at 1."""
    mask = inputs.get("mask")
    x, modulation = model.open(inputs["x_t"], inputs["t"], inputs.get("cond"), mask)
    gates = torch.ones(len(plan.units), x.shape[0], device=x.device, dtype=x.dtype, requires_grad=True)
    rows = torch.arange(x.shape[0], device=x.device)
    key_mask = model.key_mask(mask)
    h = ops.layer_norm_modulate(x, modulation[0].shift, modulation[0].scale, eps=EPS)
    for i, branch in enumerate(model.branches):
        scales = [gate for unit, gate in zip(plan.units, gates) if unit.skips(i)]
        x, h = between(modulation, i, x, branch(h, key_mask), rows, scales[0] if scales else None)
    return model.close(x), gates


def _scores(
    plan: AblationPlan,
    inputs: dict[str, Tensor],
    by_sample: Tensor,
    metric: str,
    branches: Sequence[str] | None,
) -> LayerScores:
    return LayerScores(
        layers=tuple(unit.layer for unit in plan.units),
        by_sample=by_sample,
        metric=metric,
        branches=None if branches is None else tuple(str(unit.branch) for unit in plan.units),
        t=inputs["t"].detach().float().cpu(),
    )
