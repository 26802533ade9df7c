"""The Frechet distance against its closed form, against scipy's matrix square root, and its small-sample behaviour."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.frechet import FrechetDistance, build_frechet, extrapolated, frechet_distance, gaussian
from agrepa_fast.evaluation.recordings import Recording


@pytest.fixture(scope="module")
def metric() -> FrechetDistance:
    return build_frechet("spectral", torch.device("cpu"))


def random_features(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64) / d**0.5
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def by_scipy(a: torch.Tensor, b: torch.Tensor) -> float:
    """The published formula, with the square root of the product of the covariances."""
    s1, s2 = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    shift = a.numpy().mean(0) - b.numpy().mean(0)
    return float(shift @ shift + np.trace(s1 + s2 - 2 * root.real))


def whitened(n: int, d: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Features whose sample mean is `mean` and whose sample covariance is diag(std^2), exactly."""
    x = random_features(n, d, 0)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_two_gaussians_in_closed_form() -> None:
    """With diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    a, b = whitened(40, 3, [0, 1, 2], [1, 2, 0.5]), whitened(30, 3, [1, 1, 0], [3, 2, 1])
    assert frechet_distance(a, gaussian(b)) == pytest.approx(1 + 4 + 4 + 0.25, rel=1e-9)


@pytest.mark.parametrize("n, d", [(50, 1), (50, 7), (400, 60), (61, 60)])
def test_scipy_agrees(n: int, d: int) -> None:
    a, b = random_features(n, d, 1, shift=0.3), random_features(2 * n, d, 2, scale=1.5)
    if d == 1:
        expected = (a.mean() - b.mean()).item() ** 2 + (a.std() - b.std()).item() ** 2
    else:
        expected = by_scipy(a, b)
    assert frechet_distance(a, gaussian(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_fewer_clips_than_features(n: int) -> None:
    """The nuclear norm of the centred features stands for the root of a singular product: take it from their SVD."""
    a, b = random_features(n, 20, 3), random_features(100, 20, 4)
    cov = np.cov(b.numpy(), rowvar=False)
    values, vectors = np.linalg.eigh(cov)
    centred = (a - a.mean(0)).numpy() @ (vectors * np.sqrt(values)) / math.sqrt(n - 1)
    shift = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = shift + a.var(0).sum().item() + np.trace(cov) - 2 * np.linalg.svd(centred, compute_uv=False).sum()
    assert frechet_distance(a, gaussian(b)) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_distance_zero_of_itself_and_float32_is_not_trusted() -> None:
    a = random_features(200, 30, 5, shift=1000.0).float()
    assert frechet_distance(a, gaussian(a)) < 1e-5 * torch.cov(a.double().T).trace()


def test_the_extrapolation_removes_the_bias() -> None:
    """For equal distributions the true distance is 0; FD over n clips is not, and the extrapolation is near it."""
    base = gaussian(random_features(20_000, 10, 6))
    plain, corrected = [], []
    for seed in range(12):
        a = random_features(80, 10, 100 + seed)
        plain.append(frechet_distance(a, base))
        corrected.append(extrapolated(a, base, seed))
    assert abs(np.mean(corrected)) < 0.2 * np.mean(plain)
    assert np.mean(plain) > 0.1


def test_the_metric_says_what_it_cannot_do(metric: FrechetDistance) -> None:
    reference = random_features(300, 6, 7)
    for few in (random_features(1, 6, 8), random_features(0, 6, 8)):
        with pytest.raises(UserError, match="two clips or more"):
            metric.estimate(few, reference, 0)
    with pytest.raises(UserError, match="two clips or more on both sides, got 5 and 0"):
        metric.estimate(random_features(5, 6, 8), None, 0)
    for measured, base in ((random_features(6, 6, 9), reference), (random_features(90, 6, 9), reference[:6])):
        estimates, note = metric.estimate(measured, base, 0)
        assert set(estimates) == {"FAD"}
        assert estimates["FAD"].low is None
        assert "biased upward" in note
    estimates, note = metric.estimate(random_features(12, 6, 9), reference, 0)
    assert (set(estimates), note) == (
        {"FAD"},
        "no FAD-infinity: it needs more than 12 clips, twice the number of features",
    )
    estimates, note = metric.estimate(random_features(13, 6, 9), reference, 0)
    assert (set(estimates), note) == ({"FAD", "FAD-infinity"}, "")


def test_the_interval_covers_the_expected_distance(metric: FrechetDistance) -> None:
    """The expectation of FAD over 20 clips is taken from many sets; at least 85 % of intervals must hold it."""
    reference = random_features(2000, 12, 10)
    base = gaussian(reference)
    expected = np.mean([frechet_distance(random_features(20, 12, 1000 + i, 0.5), base) for i in range(400)])
    held = 0
    for i in range(40):
        estimate = metric.estimate(random_features(20, 12, 5000 + i, 0.5), reference, i)[0]["FAD"]
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= expected <= estimate.high
        assert estimate.high - estimate.low < 2 * expected
    assert held >= 34


def test_features_are_the_mean_over_the_clips_own_frames(metric: FrechetDistance) -> None:
    sound = torch.randn(8000, generator=torch.Generator().manual_seed(0)) * 0.1
    clip = Recording("a", None, "", "speech")  # type: ignore[arg-type]
    features, mask = metric.teacher(sound.unsqueeze(0), torch.tensor([8000]), 16_000)
    torch.testing.assert_close(metric.measure(sound, clip, None), features[0, mask[0]].double().mean(0))


def test_the_fingerprint_follows_the_weights() -> None:
    first, second = (build_frechet("spectral", torch.device("cpu")) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    second.teacher.bank.mul_(1.001)  # type: ignore[operator, union-attr]
    assert first.fingerprint() != second.fingerprint()
