"""Intervals hold the true value as often as they say, and a difference is paired."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.evaluation import bootstrap
from agrepa_fast.evaluation.bootstrap import ratio, ratio_difference

ONES = torch.ones(60, dtype=torch.float64)


def normal(seed: int, n: int = 60) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_coverage_of_the_mean() -> None:
    """95 % intervals of 300 samples of 60: the binomial standard error of the coverage is 1.3 %."""
    held = sum(e.low <= 0 <= e.high for e in (ratio(normal(i), ONES, i) for i in range(300)))  # type: ignore[operator]
    assert 0.90 <= held / 300 <= 0.98


def test_coverage_of_a_ratio_of_sums() -> None:
    """Errors in words: clips of 1 to 9 words, each word wrong with probability 0.3."""
    held = 0
    for i in range(200):
        generator = torch.Generator().manual_seed(i)
        words = torch.randint(1, 10, (60,), generator=generator).double()
        errors = torch.binomial(words, torch.full((60,), 0.3, dtype=torch.float64), generator=generator)
        estimate = ratio(errors, words, i)
        assert estimate.value == pytest.approx((errors.sum() / words.sum()).item())
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= 0.3 <= estimate.high
    assert 0.88 <= held / 200 <= 0.99


def test_a_difference_is_paired() -> None:
    """Two systems that differ by 0.1 on every clip, whatever the clip: an interval of no width."""
    hard = 5 * normal(0)
    estimate = ratio_difference((hard + 0.1, ONES), (hard, ONES))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.1, 0.1, 0.1))
    plain = ratio(hard, ONES)
    assert plain.high - plain.low > 1  # type: ignore[operator]


def test_one_clip_has_no_interval() -> None:
    assert ratio(torch.tensor([2.0]), torch.tensor([4.0])) == bootstrap.Estimate(0.5, None, None)


def test_many_clips_are_drawn_in_blocks(monkeypatch) -> None:
    whole = ratio(normal(1), ONES, 3)
    monkeypatch.setattr(bootstrap, "BLOCK", 60 * 7)
    assert ratio(normal(1), ONES, 3) == whole
