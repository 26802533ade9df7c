"""A metric of the user's own: a function of the baseline's and the ablated output, in place of FoG-A's ratio.

`metric(baseline, ablated)` takes two outputs [B, ...] of the same samples and returns [B] scores, 0 for no change.
Where a mask says which frames count it is called with a third argument, bool [B, T]; both outputs are then [B, T, ...],
and 0 where it is False.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[..., Tensor]


def metric_name(metric: str | Metric) -> str:
    """What `LayerScores.metric` says of it."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def measure_with(metric: Metric, velocity: Tensor, mask: Tensor | None, control: Tensor | None) -> Tensor:
    """Rows [U + 2 + C, B]: the score of each unit, the baseline's mean square, the score of no change at all, and the
    control's score (of sample 0, in every column).

    Args:
        velocity: [S, B, ...]; stream 0 is the baseline. mask: [B, T] or None. control: [1, ...] or None.

    Raises:
        TypeError, ValueError: the metric returns no floating [B].
    """
    if mask is not None:
        kept = mask.reshape(*mask.shape, *[1] * (velocity.dim() - 3))
        velocity = torch.where(kept, velocity, 0)
        control = control if control is None else torch.where(kept[:1], control, 0)
    base = velocity[0]
    energy = base.float().square().flatten(1).mean(1)
    rows = [
        *(_score(metric, base, ablated, mask) for ablated in velocity[1:]),
        energy,
        _score(metric, base, base, mask),
    ]
    if control is not None:
        one = _score(metric, base[:1], control, None if mask is None else mask[:1])
        rows.append(one.expand(base.shape[0]))
    return torch.stack([row.double() for row in rows])


def _score(metric: Metric, baseline: Tensor, ablated: Tensor, mask: Tensor | None) -> Tensor:
    score = metric(baseline, ablated) if mask is None else metric(baseline, ablated, mask)
    name, samples = metric_name(metric), baseline.shape[0]
    if not isinstance(score, Tensor) or not score.is_floating_point():
        got = score.dtype if isinstance(score, Tensor) else type(score).__name__
        raise TypeError(f"metric {name}: expected a floating tensor [{samples}], one score a sample, got {got}")
    if score.shape != (samples,):
        raise ValueError(f"metric {name}: expected [{samples}], one score a sample, got {list(score.shape)}")
    return score.detach()
