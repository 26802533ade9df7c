"""A user's metric: a function of the baseline's and the ablated output that replaces FoG-A's ratio.

`metric(baseline, ablated)` takes two outputs [B, ...] of the same samples and returns [B] scores, 0 for no change.
If the frames have a mask, it gets the mask (bool [B, T]) as a third argument. Both outputs are then [B, T, ...], with 0
where the mask is False.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import ops
from ..models.process import Process
from .scores import normalised_change

Metric = Callable[..., Tensor]


def metric_name(metric: str | Metric) -> str:
    """The name of a metric in `LayerScores.metric`."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


class VelocityRatio:
    """A metric for `attribute_layers`: FoG-A's ratio for a `DiT` that predicts the noise or the data, not the velocity.

    Both outputs, [B, T, M], are converted to the velocity before they are compared. For eps and x0 the ratio differs
    from that of the network's own output; for velocity and v it is the same.

    Args:
        process: what the network predicts, and on which path.
        metric: "rms" or "squared" (see `scores.normalised_change`).
    """

    def __init__(self, process: Process, metric: str = "rms") -> None:
        self.process = process
        self.__name__ = metric  # what the scores and tables call it

    def __call__(self, baseline: Tensor, ablated: Tensor, mask: Tensor | None = None) -> Tensor:
        raise ValueError("VelocityRatio: only for a DiT, whose inputs x_t and t it reads")

    def at(self, inputs: Mapping[str, Tensor]) -> Metric:
        """The metric of outputs at these inputs: x_t [B, T, M], t [B]."""

        def ratio(baseline: Tensor, ablated: Tensor, mask: Tensor | None = None) -> Tensor:
            rows = slice(baseline.shape[0])  # the control is one sample, the first
            x_t, t = inputs["x_t"][rows], inputs["t"][rows]
            velocities = [self.process.velocity(x_t, output, t) for output in (baseline, ablated)]
            change, energy = ops.velocity_delta(torch.stack(velocities), mask)
            return normalised_change(change, energy, self.__name__)[0]

        return ratio


def measure_with(metric: Metric, velocity: Tensor, mask: Tensor | None, control: Tensor | None) -> Tensor:
    """Rows [U + 2 + C, B]: scores of the units, the baseline's mean square, the score of no change and, with a control,
    its score (that of sample 0, in every column).

    Args:
        velocity: [S, B, ...]; stream 0 is the baseline. mask: [B, T] or None. control: [1, ...] or None.

    Raises:
        TypeError, ValueError: the metric does not return a floating point tensor [B].
    """
    base = velocity[0] if mask is None else torch.where(_over_bins(mask, velocity[0]), velocity[0], 0)
    energy = base.float().square().flatten(1).mean(1)
    rows = [
        *(score_of(metric, velocity[0], ablated, mask) for ablated in velocity[1:]),
        energy,
        score_of(metric, base, base, mask),
    ]
    if control is not None:
        control_score = score_of(metric, base[:1], control, None if mask is None else mask[:1])
        rows.append(control_score.expand(base.shape[0]))
    return torch.stack([row.double() for row in rows])


def _over_bins(mask: Tensor, output: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (output.dim() - 2))


def score_of(metric: Metric, baseline: Tensor, ablated: Tensor, mask: Tensor | None) -> Tensor:
    """[B] scores of two outputs [B, ...], set to 0 outside of the mask [B, T]; errors as in `measure_with`."""
    if mask is not None:
        baseline, ablated = (torch.where(_over_bins(mask, output), output, 0) for output in (baseline, ablated))
    score = metric(baseline, ablated) if mask is None else metric(baseline, ablated, mask)
    name, samples = metric_name(metric), baseline.shape[0]
    if not isinstance(score, Tensor) or not score.is_floating_point():
        got = score.dtype if isinstance(score, Tensor) else type(score).__name__
        raise TypeError(f"metric {name}: expected a floating tensor [{samples}], one score a sample, got {got}")
    if score.shape != (samples,):
        raise ValueError(f"metric {name}: expected [{samples}], one score a sample, got {list(score.shape)}")
    return score.detach()
