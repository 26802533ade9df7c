"""Successive elimination: the same K layers as scoring everything, for less, and never by luck alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agrepa_fast import DiT, DiTConfig, attribute_layers
from agrepa_fast.attribution import adaptive
from agrepa_fast.attribution.adaptive import adaptive_scores
from agrepa_fast.attribution.scores import LayerScores

DEPTH = 6


@pytest.fixture
def model():
    """Layers 1 and 4 drive the velocity, the others hardly."""
    torch.manual_seed(0)
    network = DiT(DiTConfig(DEPTH, 16, 2, 5, 0, 2, 0.0, 16)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
        for i, branch in enumerate(network.branches):
            last = branch.out if i % 2 == 0 else branch.down
            last.weight.mul_(4.0 if i // 2 in (1, 4) else 0.2)
            last.bias.mul_(4.0 if i // 2 in (1, 4) else 0.2)
    return network


def batches(count, clips=4, t_points=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(clips * t_points, 9, 5, generator=generator)
        yield {"x_t": x, "t": torch.linspace(0.1, 0.9, t_points).repeat_interleave(clips)}


def test_finds_the_top_k_for_less(model):
    given = list(batches(6))
    result = adaptive_scores(model, given, k=2)
    every = torch.cat([attribute_layers(model, inputs).by_sample for inputs in given], 1)
    assert sorted(every.mean(1).topk(2).indices.tolist()) == [1, 4]
    assert result.scores.layers == (1, 4)
    assert result.separated
    assert set(result.dropped) == {0, 2, 3, 5}
    seen = result.scores.by_sample.shape[1]
    assert seen >= 8
    torch.testing.assert_close(result.scores.by_sample, every[[1, 4], :seen], rtol=1e-5, atol=0)


def test_saving_is_what_the_batches_cost(model, monkeypatch):
    """With scores given by hand: layer l has score l, layers 4 and 5 alike, so all but these go at 8 clips."""
    calls = []

    def scripted(model, inputs, blocks, **options):
        layers = tuple(range(DEPTH)) if blocks is None else tuple(blocks)
        calls.append(layers)
        noise = np.random.default_rng(len(calls)).normal(0, 0.1, (DEPTH, 4))
        values = torch.tensor([[min(layer, 4)] for layer in layers]) + torch.tensor(noise)[list(layers)]
        return LayerScores(layers, values, floor_by_sample=torch.zeros(4))

    monkeypatch.setattr(adaptive, "attribute_layers", scripted)
    result = adaptive_scores(model, [None] * 5, k=1)
    everything = tuple(range(DEPTH))
    assert calls == [everything, everything, (4, 5), (4, 5), (4, 5)]
    assert result.dropped == dict.fromkeys((0, 1, 2, 3), 8)
    assert not result.separated
    whole, two = 21 * 4, (6 + 1) * 4  # the streams without layers 4 and 5: one more evaluation, of block 5
    assert result.block_evaluations == 2 * whole + 3 * two
    assert result.saved == pytest.approx(1 - (2 * whole + 3 * two) / (5 * whole))
    calls.clear()
    limited = adaptive_scores(model, [None] * 5, k=1, budget=2 * whole + two)
    assert calls == [everything, everything, (4, 5)]
    assert limited.block_evaluations == 2 * whole + two


def test_the_best_layer_is_rarely_dropped():
    """200 runs of five rounds in which all layers are alike: layer 0 counts as the best, and 5 % may lose it."""
    wrong = 0
    for seed in range(200):
        clips = torch.tensor(np.random.default_rng(seed).normal(1, 0.3, (4, 40)))
        errors = [0.05 * 6 / (np.pi * r) ** 2 / 3 for r in range(1, 6)]
        wrong += not all(adaptive._not_beaten(clips[:, : 8 * r], 1, error)[0] for r, error in enumerate(errors, 1))
    assert wrong <= 16


@pytest.mark.parametrize(
    "p, freedom, value",
    [(0.975, 7, 2.3646), (0.995, 7, 3.4995), (0.9975, 10, 3.5814), (0.999, 20, 3.5518), (0.975, 1000, 1.9623)],
)
def test_quantiles_of_student_as_in_the_tables(p, freedom, value):
    assert adaptive.student_quantile(p, freedom) == pytest.approx(value, rel=0.01)


def test_a_clear_difference_is_seen_in_pairs():
    """Both layers vary wildly from clip to clip, but always differ by about one."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 50, 10)
    clips = torch.tensor(np.stack([common + 1, common + rng.normal(0, 0.1, 10)]))
    assert adaptive._not_beaten(clips, 1, 0.001) == [True, False]
    assert adaptive._not_beaten(clips + torch.tensor([[0.0], [1.0]]), 1, 0.001) == [True, True]


def test_a_grid_of_t_is_averaged_by_clip(model):
    result = adaptive_scores(model, batches(2, clips=3, t_points=2), k=DEPTH, t_points=2)
    assert result.scores.clips == (
        0,
        1,
        2,
        0,
        1,
        2,
    )
    assert result.separated
    assert result.dropped == {}
    assert result.saved == 0


def test_bad_arguments_are_named(model):
    for options, message in (
        ({"k": 7}, "k: expected 1 to 6 layers, got 7"),
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"budget": float("nan")}, "budget: expected a number"),
        ({"confidence": 1}, "confidence"),
        ({"t_points": 3}, "4 samples are no whole number of grids of 3"),
        ({"t_points": 0}, "t_points: expected at least 1"),
        ({"minimum_clips": 1}, "minimum_clips: expected at least 2"),
        ({"blocks": [1]}, "blocks: not for the adaptive probe"),
    ):
        with pytest.raises(ValueError, match=message):
            adaptive_scores(model, batches(1), **{"k": 2, **options})
    with pytest.raises(ValueError, match="batches: expected at least one"):
        adaptive_scores(model, [])
