"""Rank correlations by their definitions and published values, the bootstrap against numpy, and the 16-bit warning."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from agrepa_fast import attribute_layers
from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.attribution.statistics import bootstrap_top_k, kendall, rank_stability, spearman, top_k_by_clips


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_rank_correlations_of_a_textbook_example():
    """IQ and hours of television of ten people (a worked example of Spearman's rho): rho = -29/165, tau = -1/9."""
    iq = tensor(86, 97, 99, 100, 101, 103, 106, 110, 112, 113)
    hours = tensor(2, 20, 28, 27, 50, 29, 7, 17, 6, 12)
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert kendall(iq, hours) == pytest.approx(-1 / 9)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_with_ties_by_definition(seed):
    a, b = np.random.default_rng(seed).integers(0, 4, (2, 8)).astype(float)
    ranks = [np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v]) for v in (a, b)]
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    concordant = tied_a = tied_b = 0
    pairs = list(itertools.combinations(range(8), 2))
    for i, j in pairs:
        concordant += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
        tied_a += a[i] == a[j]
        tied_b += b[i] == b[j]
    expected = concordant / np.sqrt((len(pairs) - tied_a) * (len(pairs) - tied_b))
    assert kendall(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_rank_correlations_at_their_ends():
    up = tensor(1, 5, 9)
    assert (spearman(up, up.exp()), kendall(up, up.exp())) == (pytest.approx(1), pytest.approx(1))
    assert (spearman(up, -up), kendall(up, -up)) == (pytest.approx(-1), pytest.approx(-1))
    assert np.isnan(spearman(up, tensor(2, 2, 2)))
    assert np.isnan(kendall(up, tensor(2, 2, 2)))
    with pytest.raises(ValueError, match=r"got \[3\] and \[2\]"):
        spearman(up, up[:2])
    assert np.isnan(spearman(up[:1], up[:1]))
    assert np.isnan(kendall(up[:1], up[:1]))
    with pytest.raises(ValueError, match="not empty"):
        kendall(up[:0], up[:0])


def test_bootstrap_of_the_top_k_against_numpy():
    """Four units, 12 clips; unit 3 is far ahead, 0 and 1 are close, 2 never counts."""
    rng = np.random.default_rng(1)
    values = np.array([[1.0], [1.05], [0.1], [3.0]]) + rng.normal(0, 0.3, (4, 12))
    result = bootstrap_top_k(LayerScores((0, 2, 5, 7), torch.tensor(values)), k=2, resamples=4000)
    draws = values[:, rng.integers(0, 12, (4000, 12))].mean(2).T
    second = np.argsort(-draws, 1)[:, :2]
    frequency = np.array([(second == u).any(1).mean() for u in range(4)])
    np.testing.assert_allclose(result.frequency, frequency, atol=0.03)
    own = np.argsort(-values.mean(1))[:2]
    assert result.names == tuple(("0", "2", "5", "7")[u] for u in own)
    assert result.agreement == pytest.approx((np.sort(second) == np.sort(own)).all(1).mean(), abs=0.03)
    assert 0.05 < result.agreement < 0.95
    np.testing.assert_allclose(result.low, np.quantile(draws, 0.025, axis=0), atol=0.03)
    np.testing.assert_allclose(result.high, np.quantile(draws, 0.975, axis=0), atol=0.03)


def test_bootstrap_draws_a_clip_with_all_its_samples():
    """The same clips at eight t must not look like eight times as many."""
    clips = torch.tensor(np.random.default_rng(2).normal(1, 0.5, (3, 6)))
    alone = bootstrap_top_k(LayerScores((0, 1, 2), clips), k=1)
    over_grid = bootstrap_top_k(LayerScores((0, 1, 2), clips.repeat(1, 8), clips=tuple(range(6)) * 8), k=1)
    independent = bootstrap_top_k(LayerScores((0, 1, 2), clips.repeat(1, 8)), k=1)
    assert torch.allclose(over_grid.low, alone.low)
    assert torch.allclose(over_grid.high, alone.high)
    assert ((independent.high - independent.low) < 0.6 * (alone.high - alone.low)).all()


def test_bootstrap_is_the_same_every_time_and_refuses_what_it_cannot_do():
    scores = LayerScores((0, 1), torch.rand(2, 5, dtype=torch.float64))
    assert bootstrap_top_k(scores, 1).frequency.equal(bootstrap_top_k(scores, 1).frequency)
    for options, message in (
        ({"k": 3}, "k: expected 1 to 2 units, got 3"),
        ({"k": 1, "confidence": 1.0}, "confidence"),
        ({"k": 1, "resamples": 0}, "resamples"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_top_k(scores, **options)
    with pytest.raises(ValueError, match="at least two clips"):
        bootstrap_top_k(LayerScores((0,), torch.ones(1, 3), clips=(4, 4, 4)), 1)


def test_stability_between_two_probes():
    before = LayerScores((0, 1, 2, 3), tensor(4, 3, 2, 1).unsqueeze(1))
    after = LayerScores((0, 1, 2, 3), tensor(4, 1, 3, 2).unsqueeze(1))
    stability = rank_stability(before, after, k=2)
    assert stability == {"spearman": pytest.approx(0.4), "kendall": pytest.approx(1 / 3), "overlap": 0.5}
    with pytest.raises(ValueError, match="the same units"):
        rank_stability(before, LayerScores((0, 1, 2, 4), after.by_sample))
    with pytest.raises(ValueError, match="k: expected 1 to 4"):
        rank_stability(before, after, k=5)


def test_how_many_clips_give_the_same_layers_by_counting():
    """Unit 0 leads on three of four clips, unit 1 on the other: one clip agrees with probability 3/4. Two clips agree
    if both are among the three, with probability (3/4)^2, since 5 is more than 3."""
    scores = LayerScores((0, 1), tensor((3, 3, 3, 0), (0, 0, 0, 5)), clips=(4, 7, 8, 9))
    result = top_k_by_clips(scores, k=1, resamples=20_000)
    assert result.clips == (1, 2, 4, 8)
    assert result.overlap == result.agreement
    exact = [0.75, 0.5625]
    # Of n draws m are of the last clip: unit 0 wins where 3 (n - m) >= 5 m.
    for n in (4, 8):
        exact.append(sum(math.comb(n, m) * 0.25**m * 0.75 ** (n - m) for m in range(n + 1) if 3 * (n - m) >= 5 * m))
    assert result.agreement == pytest.approx(exact, abs=0.015)


def test_more_clips_agree_more_and_samples_of_a_clip_stay_together():
    generator = torch.Generator().manual_seed(0)
    by_clip = tensor(5, 4, 3, 1, 0)[:, None] + 2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    scores = LayerScores(tuple(range(5)), by_clip.repeat(1, 3), clips=tuple(range(6)) * 3)
    result = top_k_by_clips(scores, k=3)
    assert result.clips == (1, 2, 4, 6, 8, 12)
    assert result == top_k_by_clips(LayerScores(tuple(range(5)), by_clip), k=3)
    assert result.agreement[0] < result.agreement[3] < result.agreement[5]
    assert all(a <= o <= 1 for a, o in zip(result.agreement, result.overlap))
    with pytest.raises(ValueError, match="at least two clips"):
        top_k_by_clips(LayerScores((0, 1), tensor((1, 2), (3, 4)), clips=(0, 0)), k=1)
    with pytest.raises(ValueError, match="k: expected 1 to 5"):
        top_k_by_clips(scores, k=6)


@pytest.mark.parametrize("metric", ["rms", "squared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_near_the_noise_of_16_bit_is_named(build, draw, dtype, metric):
    model, inputs = build(dtype), draw(dtype)
    with torch.no_grad():
        for i in (2, 3):  # layer 1 moves the velocity by about 1e-3
            last = model.branches[i].out if i == 2 else model.branches[i].down
            last.weight.mul_(1e-3), last.bias.mul_(1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = attribute_layers(model, inputs, metric=metric)
    relative = scores.mean if metric == "rms" else scores.mean.sqrt()
    assert (relative < 2e-3).tolist() == [False, True, False]
    messages = [str(warning.message) for warning in caught]
    if dtype == torch.bfloat16:
        assert len(messages) == 1
        assert messages[0].startswith("layers 1 change the velocity by less than")
        assert messages[0].endswith("bfloat16 decides their order: score them in float32")
    else:
        assert messages == []
