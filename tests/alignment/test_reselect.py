"""Hysteresis and averaging of re-selection, against selections worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrepa_fast import LayerSelection
from agrepa_fast.alignment.reselect import average_scores, reselect

CURRENT = LayerSelection((0, 2), (0.5, 0.5), "foga")


def test_a_small_lead_changes_nothing_and_a_large_one_does():
    assert reselect(CURRENT, [1.0, 1.05, 1.2, 0.1], 0.1, weighted=True).layers == (0, 2)
    changed = reselect(CURRENT, [1.0, 1.2, 1.3, 0.1], 0.1, weighted=True)
    assert changed.layers == (1, 2)
    assert changed.weights == pytest.approx((1.2 / 2.5, 1.3 / 2.5))
    assert changed.method == "foga"
    assert reselect(CURRENT, [1.0, 1.05, 1.2, 0.1], 0.0, weighted=True).layers == (1, 2)


def test_several_layers_may_change_at_once():
    assert reselect(CURRENT, [1.0, 5.0, 2.0, 4.0], 0.1, weighted=False) == LayerSelection((1, 3), (0.5, 0.5), "foga")


def test_two_layers_within_the_margin_do_not_take_turns():
    selection = LayerSelection((0,), (1.0,), "foga")
    for step in range(20):
        selection = reselect(selection, [1.0, 1.08 if step % 2 else 0.93], 0.1, weighted=True)
        assert selection.layers == (0,)


@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=8), st.integers(1, 3), st.floats(0, 0.5))
def test_no_layer_outside_leads_by_more_than_the_margin(scores, k, margin):
    chosen = reselect(LayerSelection.uniform(range(k)), scores, margin, weighted=True)
    assert len(chosen.layers) == k
    outside = [score for layer, score in enumerate(scores) if layer not in chosen.layers]
    worst = min(scores[layer] for layer in chosen.layers)
    assert all(score <= (1 + margin) * worst for score in outside)
    total = sum(scores[layer] for layer in chosen.layers)
    assert chosen.weights == pytest.approx([scores[layer] / total for layer in chosen.layers])


def test_all_zero_scores_leave_equal_weights():
    assert reselect(CURRENT, [0.0] * 4, 0.1, weighted=True).weights == (0.5, 0.5)


def test_scores_for_too_few_layers():
    with pytest.raises(ValueError, match="scores: 2 for layers up to 2"):
        reselect(CURRENT, [1.0, 2.0], 0.1, weighted=True)


def test_averages():
    assert average_scores(None, [1.0, 3.0], 0.75) == [1.0, 3.0]
    assert average_scores([1.0, 3.0], [2.0, 1.0], 0.75) == [1.25, 2.5]
    with pytest.raises(ValueError, match="argument 2"):
        average_scores([1.0], [2.0, 1.0], 0.75)
