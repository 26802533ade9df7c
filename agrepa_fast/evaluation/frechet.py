"""Frechet audio distance: clips pooled to one feature vector [d] each, sets of clips compared as Gaussians.

FD = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), means m and unbiased covariances S (Kilgour et al.,
Interspeech 2019; Heusel et al., NeurIPS 2017). With S2 = R R and the set's centred features X [n, d],
tr((S1 S2)^(1/2)) is the sum of the singular values of X R / sqrt(n - 1): real and non-negative for any n, also where
the covariance of few clips is singular, which breaks the usual square root of a product. Everything is in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..teachers.base import Teacher
from ..teachers.registry import build_teacher
from .bootstrap import Estimate
from .metric import Metric
from .recordings import Recording

SIZES = 15  # of the subsets that FAD-infinity extrapolates from
MOST_RESAMPLES, LEAST_RESAMPLES = 100, 25  # 25 to 200 are enough for a standard error (Efron and Tibshirani)
WORK = 1e9  # features cubed, summed over the distances of all resamples: bounds the time
NORMAL = 1.959963984540054  # 97.5 % of the standard normal distribution


@dataclass(frozen=True)
class Gaussian:
    """The reference's statistics: mean [d], trace of the covariance, and the covariance's square root [d, d]."""

    mean: Tensor
    trace: Tensor
    root: Tensor
    clips: int


def gaussian(features: Tensor) -> Gaussian:
    """Statistics of features [n, d], n at least 2."""
    features = features.double()
    values, vectors = torch.linalg.eigh(torch.cov(features.T).reshape(features.shape[1], -1))
    values = values.clamp_min(0)  # rounding leaves tiny negative ones
    root = (vectors * values.sqrt()) @ vectors.T
    return Gaussian(features.mean(0), values.sum(), root, features.shape[0])


def frechet_distance(features: Tensor, reference: Gaussian) -> float:
    """FD of features [n, d], n at least 2, from the reference."""
    return _distance(features.double() @ reference.root, features.double(), reference)


def _distance(mapped: Tensor, features: Tensor, reference: Gaussian) -> float:
    """mapped: features @ reference.root, computed once for all subsets of the rows."""
    n, d = features.shape
    centred = (mapped - mapped.mean(0)) / (n - 1) ** 0.5
    # The squares of the singular values, from the smaller of the two Gram matrices.
    gram = centred.T @ centred if n > d else centred @ centred.T
    overlap = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
    shift = (features.mean(0) - reference.mean).square().sum()
    # The true value is never negative; equal sets give rounding noise around 0.
    return max(0.0, (shift + features.var(0).sum() + reference.trace - 2 * overlap).item())


def extrapolated(features: Tensor, reference: Gaussian, seed: int = 0) -> float:
    """FAD-infinity: the distance that infinitely many clips would have (Chong and Forsyth, CVPR 2020; Gui et al.,
    ICASSP 2024).

    The bias of FD over n clips is linear in 1/n. FD is computed on random subsets of 15 sizes between half of the
    clips and all of them, and a line in 1/n is fitted; its value at 1/n = 0 is the estimate. Subsets are drawn without
    replacement: with it, the line would end at the biased value of all clips. The reference stays whole.
    """
    features = features.double()
    return _extrapolated(features @ reference.root, features, reference, seed)


def _extrapolated(mapped: Tensor, features: Tensor, reference: Gaussian, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    n = features.shape[0]
    sizes = sorted({round(size) for size in np.linspace(n / 2, n, SIZES).tolist()})
    distances = []
    for size in sizes:
        rows = torch.randperm(n, generator=generator)[:size]
        distances.append(_distance(mapped[rows], features[rows], reference))
    _, intercept = np.polyfit(1 / np.array(sizes), np.array(distances), 1)
    return float(intercept)


class FrechetDistance(Metric):
    """FAD of a teacher's features, averaged over each clip."""

    of_sets = True

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self.teacher = teacher.to(device)
        self.device = device
        self.key = f"fad/{teacher.name}"
        self.title = f"Frechet audio distance ({teacher.name})"
        self.tool = f"teacher {teacher.name}, {teacher.width} features averaged over each clip"
        self.columns = {"FAD": "lower", "FAD-infinity": "lower"}
        self.sample_rate = teacher.sample_rate
        self.note = (
            "FAD grows as the number of clips falls: compare rows of equally many clips. FAD-infinity extrapolates to "
            "infinitely many (Chong and Forsyth, 2020; Gui et al., 2024) and may come out slightly below 0. Intervals "
            "are the value plus and minus 1.96 bootstrap standard errors over the row's clips, for this reference."
        )

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        """The mean feature frame [d]."""
        lengths = torch.tensor([waveform.numel()])
        features, mask = self.teacher(waveform.unsqueeze(0).to(self.device), lengths, self.sample_rate)
        if not mask.any():
            raise UserError(f"too short for a frame of the teacher {self.teacher.name}")
        pooled = features[0][mask[0]].double().mean(0).cpu()
        if not pooled.isfinite().all():
            raise UserError(f"the teacher {self.teacher.name} gives NaN or infinity")
        return pooled

    def fingerprint(self) -> str:
        """Digest of what the teacher makes of one second of noise: of its weights, its layer and its code."""
        noise = torch.randn(self.sample_rate, generator=torch.Generator().manual_seed(0)).mul(0.1)
        features, _ = self.teacher(noise.unsqueeze(0).to(self.device), torch.tensor([noise.numel()]), self.sample_rate)
        return hashlib.sha256(features.cpu().numpy().tobytes()).hexdigest()

    def estimate(self, measured: Tensor, reference: Tensor | None, seed: int) -> tuple[dict[str, Estimate], str]:
        """FAD with two clips and more, FAD-infinity with more than twice as many clips as features."""
        if reference is None or min(measured.shape[0], reference.shape[0]) < 2:
            n = 0 if reference is None else reference.shape[0]
            raise UserError(f"FAD needs two clips or more on both sides, got {measured.shape[0]} and {n}")
        base = gaussian(reference)
        measured = measured.double()
        mapped = measured @ base.root
        n, d = measured.shape
        few = min(n, base.clips) <= d
        if few:
            # The spread of a resample says nothing where the covariance is singular.
            return {"FAD": Estimate(_distance(mapped, measured, base))}, (
                f"{n} clips and {base.clips} of the reference for {d} features: a singular covariance, biased upward"
            )
        estimators: dict[str, Callable[[Tensor, int], float]] = {
            "FAD": lambda rows, draw: _distance(mapped[rows], measured[rows], base)
        }
        note = f"no FAD-infinity: it needs more than {2 * d} clips, twice the number of features"
        if n > 2 * d:
            note = ""
            estimators["FAD-infinity"] = lambda rows, draw: _extrapolated(mapped[rows], measured[rows], base, draw)
        resamples = max(LEAST_RESAMPLES, min(MOST_RESAMPLES, int(WORK / (d**3 * (SIZES + 1)))))
        drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
        estimates = {}
        for name, estimator in estimators.items():
            value = estimator(torch.arange(n), seed)
            # A resample repeats clips, which biases its distance upward: percentiles would lie too high. The spread is
            # not shifted by it, only somewhat too wide.
            error = float(np.std([estimator(rows, draw) for draw, rows in enumerate(drawn)], ddof=1))
            low = value - NORMAL * error
            estimates[name] = Estimate(value, max(0.0, low) if name == "FAD" else low, value + NORMAL * error)
        return estimates, note

    def difference(self, measured: Tensor, other: Tensor, seed: int) -> dict[str, Estimate]:
        """None: a distance of a set is no mean over clips."""
        return {}


def build_frechet(name: str, device: torch.device) -> FrechetDistance:
    """The metric of a teacher by name or path (`teachers.build_teacher`).

    Raises:
        UserError: unknown teacher, or its weights cannot be used."""
    return FrechetDistance(build_teacher(name), device)
