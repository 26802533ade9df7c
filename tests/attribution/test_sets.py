"""Sets and spans of layers, and metrics of the user's own: against loops written here."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import LayerScores, attribute_layers, export, read_scores, select_layers
from agrepa_fast.attribution.plan import AblationPlan, Unit, layer_sets

SETS = [[3, 0], [1, 2], [0], [2], [0, 1, 3], [3]]


def loop(model, inputs, sets):
    """One forward for each set, with branches whose last projection is zero."""

    def velocity(without=()):
        cut = copy.deepcopy(model)
        for layer in without:
            for last in (cut.branches[2 * layer].out, cut.branches[2 * layer + 1].down):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        return cut(**inputs)

    with torch.no_grad():
        base, mask = velocity(), inputs["mask"]
        rows = []
        for members in sets:
            changed = velocity(members)
            rows.append([ratio(base[n][mask[n]], changed[n][mask[n]]) for n in range(len(base))])
    return np.array(rows)


def ratio(base, changed):
    change, energy = (changed - base).square().mean(), base.square().mean()
    return ((change + 1e-8).sqrt() / ((energy + 1e-8).sqrt() + 1e-8)).item()


@pytest.mark.parametrize("engine", ["auto", "prefix", "stacked", "loop"])
@pytest.mark.parametrize("max_samples", [None, 2])
def test_sets_equal_a_loop(build, draw, engine, max_samples):
    model, inputs = build(torch.float64, depth=4), draw(torch.float64)
    scores = attribute_layers(model, inputs, sets=SETS, engine=engine, max_samples=max_samples)
    np.testing.assert_allclose(scores.by_sample.numpy(), loop(model, inputs, SETS), rtol=1e-9)
    assert scores.sets == ((0, 3), (1, 2), (0,), (2,), (0, 1, 3), (3,))
    assert scores.names == ("0+3", "1+2", "0", "2", "0+1+3", "3")


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_spans_equal_a_loop_and_cost_what_the_plan_says(build, draw, length):
    model, inputs = build(torch.float64, depth=4), draw(torch.float64)
    spans = [list(range(first, first + length)) for first in range(5 - length)]
    calls = [0]
    for branch in model.branches:
        branch.register_forward_hook(lambda _, args, out: calls.__setitem__(0, calls[0] + args[0].shape[0]))
    scores = attribute_layers(model, inputs, spans=length, engine="prefix")
    evaluations = sum(4 - stop for stop in range(length, 5)) + 4  # of the baseline, and of each span after its end
    assert scores.block_evaluations == evaluations == AblationPlan.of_sets(4, spans).block_evaluations
    assert calls[0] == 2 * evaluations * 3 + 8  # three samples; the control runs along all eight branches
    for branch in model.branches:
        branch._forward_hooks.clear()
    np.testing.assert_allclose(scores.by_sample.numpy(), loop(model, inputs, spans), rtol=1e-9)
    if length == 1:
        np.testing.assert_allclose(scores.by_sample, attribute_layers(model, inputs).by_sample, rtol=1e-12)


def test_a_memory_budget_splits_sets_too(build, draw):
    model, inputs = build(torch.float64, depth=4), draw(torch.float64)
    whole = attribute_layers(model, inputs, sets=SETS, engine="prefix")
    parts = attribute_layers(model, inputs, sets=SETS, engine="prefix", memory_budget=40_000)
    assert parts.block_evaluations > whole.block_evaluations
    np.testing.assert_allclose(parts.by_sample, whole.by_sample, rtol=1e-9)


def test_units_of_sets():
    plan = AblationPlan.of_sets(6, [(0, 3, 4), (1, 2), (0,)])
    assert [unit.layers for unit in plan.units] == [(0,), (0, 3, 4), (1, 2)]
    assert plan.units[1] == Unit(0, None, 0, 2, ((6, 10),))
    assert [plan.units[1].skips(i) for i in range(12)] == [True] * 2 + [False] * 4 + [True] * 4 + [False] * 2
    assert plan.loop_block_evaluations == 6 * 4 - 1 - 3 - 2


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sets": []}, ValueError, "at least one set"),
        ({"sets": [[]]}, ValueError, "at least one, got"),
        ({"sets": [[0, 0]]}, ValueError, "distinct"),
        ({"sets": [[0, 4]]}, ValueError, "below 4"),
        ({"sets": [[0, 1], [1, 0]]}, ValueError, "none twice"),
        ({"sets": [0, 1]}, TypeError, "sequences of layers"),
        ({"sets": [["blocks.0"]]}, ValueError, "no block 'blocks.0'"),
        ({"spans": 0}, ValueError, "spans: expected 1 to 4"),
        ({"spans": 5}, ValueError, "spans: expected 1 to 4"),
        ({"spans": 2, "sets": [[0]]}, ValueError, "one of them"),
    ],
)
def test_mistakes_with_sets(options, error, message):
    with pytest.raises(error, match=message):
        layer_sets(4, options.get("sets"), options.get("spans"), {})


@pytest.mark.parametrize("option", [{"blocks": [0]}, {"branches": ["attn"]}])
def test_sets_stand_alone(build, draw, option):
    with pytest.raises(ValueError, match="leave blocks= and branches= out"):
        attribute_layers(build(), draw(), spans=2, **option)


def test_scores_of_sets_are_kept_and_refused_where_single_blocks_are_meant(build, draw, tmp_path):
    scores = attribute_layers(build(), draw(), sets=[[2, 0], [1]])
    again = LayerScores.from_state(scores.state())
    scores.to_csv(tmp_path / "sets.csv")
    for copied in (again, read_scores(tmp_path / "sets.csv"), scores.at(0.5)):
        assert (copied.sets, copied.names, copied.layers) == (((0, 2), (1,)), ("0+2", "1"), (0, 1))
    assert "0+2" in scores.table()
    for refuse in (lambda: select_layers(scores, 1), lambda: export.lowest(scores, 1)):
        with pytest.raises(ValueError, match="scores: of sets of layers"):
            refuse()


def cosine_distance(baseline, ablated, mask=None):
    """The mean over the frames that count."""
    distance = 1 - torch.cosine_similarity(baseline, ablated, dim=-1)
    return distance.mean(1) if mask is None else (distance * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("engine", ["auto", "stacked", "loop"])
def test_a_metric_of_the_users_own(build, draw, masked, engine):
    model, inputs = build(torch.float64), draw(torch.float64, masked=masked)
    scores = attribute_layers(model, inputs, metric=cosine_distance, engine=engine, max_samples=2)
    mask = inputs.get("mask", torch.ones(3, 9, dtype=torch.bool))
    with torch.no_grad():
        base = model(**inputs)
        for layer in range(3):
            cut = copy.deepcopy(model)
            for last in (cut.branches[2 * layer].out, cut.branches[2 * layer + 1].down):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            changed = cut(**inputs)
            for n in range(3):
                expected = (1 - torch.cosine_similarity(base[n], changed[n], dim=-1))[mask[n]].mean().item()
                assert scores.by_sample[layer, n].item() == pytest.approx(expected, rel=1e-9)
    assert scores.metric == "cosine_distance"
    assert scores.floor == pytest.approx(0, abs=1e-12)
    assert abs(scores.noise_floor) < 1e-12
    assert scores.above_floor.all()


@pytest.mark.parametrize(
    "metric, error, message",
    [
        (lambda a, b: 0.5, TypeError, "expected a floating tensor"),
        (lambda a, b: (a - b).abs().mean(), ValueError, r"expected \[3\], one score a sample, got \[\]"),
        (lambda a, b: (a != b).flatten(1).any(1), TypeError, "got torch.bool"),
    ],
)
def test_metrics_that_do_not_fit(build, draw, metric, error, message):
    with pytest.raises(error, match=message):
        attribute_layers(build(), draw(masked=False), metric=metric)
