"""The gate: outputs are checked against a reference before they are timed, and wrong ones are never compared.

The error of a tensor is |out - reference| / |reference| in root mean square, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXPRESSION_FACTOR = 2.0  # largest ratio of our error to that of the PyTorch expression in the same dtype


@dataclass(frozen=True)
class Check:
    """Whether a provider's outputs are right. `error` is that of the output that is worst relative to its bound."""

    passed: bool
    error: float | None  # relative rms error of the worst output; None if it cannot be computed
    reason: str | None = None


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Relative rms error in float64; absolute if the reference is all zero."""
    difference = output.detach().double() - reference.detach().double().to(output.device)
    size = reference.detach().double().square().mean().sqrt().item()
    error = difference.square().mean().sqrt().item()
    return error / size if size > 0 else error


def check(
    outputs: Sequence[Tensor],
    reference: Sequence[Tensor],
    bounds: Mapping[str, float],
    expression: Sequence[Tensor] | None = None,
) -> Check:
    """Check a provider's outputs against the reference.

    Args:
        outputs: the provider's tensors, in the order of `bounds`.
        reference: the same of the reference (float64 if the case can afford it).
        bounds: {name of the output: largest relative rms error}.
        expression: outputs of the plain PyTorch expression in the same dtype, or None. With it the error may also be at
            most twice the expression's (or one ulp of the dtype if that is more).
    """
    if len(outputs) != len(bounds):
        return Check(False, None, f"{len(outputs)} outputs, expected {len(bounds)}: {', '.join(bounds)}")
    worst: float | None = None
    for i, (name, limit) in enumerate(bounds.items()):
        out, wanted = outputs[i], reference[i]
        if out.shape != wanted.shape:
            return Check(False, worst, f"{name}: shape {list(out.shape)}, expected {list(wanted.shape)}")
        if not out.isfinite().all():
            return Check(False, worst, f"{name}: not finite")
        error = relative_error(out, wanted)
        worst = error if worst is None else max(worst, error)
        if error > limit:
            return Check(False, worst, f"{name}: relative error {error:.2e}, allowed {limit:.0e}")
        if expression is not None:
            ulp = torch.finfo(out.dtype).eps if out.is_floating_point() else 0.0
            allowed = max(EXPRESSION_FACTOR * relative_error(expression[i], wanted), ulp)
            if error > allowed:
                reason = f"{name}: relative error {error:.2e}, the plain expression allows {allowed:.2e}"
                return Check(False, worst, reason)
    return Check(True, worst)
