"""Hysteresis and averaging of re-selection, against selections worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agrepa_fast import LayerSelection
from agrepa_fast.alignment.reselect import LayerChooser, average_scores, reselect, reselect_by_time
from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.errors import UserError

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


GRID = (0.2, 0.8)


def by_time(*columns: list[float]) -> LayerSelection:
    """Of four layers, the scores at each time of GRID; layers without any score are left out."""
    rows = {layer: row for layer, row in enumerate(zip(*columns)) if any(row)}
    return LayerSelection.by_time(GRID, rows, "foga")


def test_by_time_each_time_changes_by_itself():
    current = by_time([5, 4, 0, 0], [0, 0, 3, 2])
    scores = [[5, 4, 4.2, 1], [6, 1, 3, 2.0]]  # at 0.2 layer 2 leads layer 1 by 5 %; at 0.8 layer 0 leads by far
    changed = reselect_by_time(current, scores, 0.1)
    assert changed == by_time([5, 4, 0, 0], [6, 0, 3, 0])
    assert reselect_by_time(current, scores, 0.0) == by_time([5, 0, 4.2, 0], [6, 0, 3, 0])


def test_by_time_a_layer_that_scores_nothing_is_replaced_at_the_next_probe():
    current = by_time([5, 0, 0, 0], [0, 0, 3, 2])  # at 0.2 there is one layer left of two
    assert reselect_by_time(current, [[1, 2, 3, 0.5], [0, 0, 3, 2]], 0.1) == by_time([0, 2, 3, 0], [0, 0, 3, 2])
    silent = reselect_by_time(current, [[0, 0, 0, 0], [0, 0, 3, 2]], 0.1)
    assert silent == by_time([1, 1, 0, 0], [0, 0, 3, 2])  # nothing scores: equal weights


DOMAINS = ("speech", "audio", "speech", "audio")
TEACHERS = {"voice": ("speech",), "sounds": ("audio", "music"), "both": ()}


def probed(speech, audio) -> LayerScores:
    """A sample of each domain at each time of GRID: speech and audio hold [times][layers]."""
    samples = [speech[0], audio[0], speech[1], audio[1]]
    t = torch.tensor(GRID, dtype=torch.float64).repeat_interleave(2)
    by_sample = torch.tensor(samples, dtype=torch.float64).T
    return LayerScores(tuple(range(by_sample.shape[0])), by_sample, t=t, domains=DOMAINS)


FIRST = probed([[9, 1, 1, 1], [7, 3, 1, 1]], [[1, 1, 8, 2], [1, 1, 2, 4]])
# By speech layer 1 leads, not by enough on average; by audio layer 3 leads by far.
SECOND = probed([[4, 9.5, 1, 1], [4, 9.5, 1, 1]], [[1, 1, 1, 90], [1, 1, 1, 90]])


def test_each_teacher_chooses_by_the_scores_of_its_domains():
    chooser = LayerChooser("foga", 4, 1, domains=TEACHERS, momentum=0.5, margin=0.1)
    first = chooser.choose(None, FIRST)
    assert {name: own.layers for name, own in first.items()} == {"voice": (0,), "sounds": (2,), "both": (0,)}
    assert chooser.averages["sounds"] == [[1, 1, 5, 3]]
    second = chooser.choose(first, SECOND)
    # voice: (8 + 4) / 2 = 6 against (2 + 9.5) / 2 = 5.75; sounds: 46.5 against 3; both: (4.5 + 2.5) / 2 against 24.25
    assert {name: own.layers for name, own in second.items()} == {"voice": (0,), "sounds": (3,), "both": (3,)}
    assert chooser.shown(chooser.averages)["sounds"] == [1, 1, 3, 46.5]
    assert chooser.shown(chooser.latest)["sounds"] == [1, 1, 1, 90]
    one = LayerChooser("foga", 4, 1)
    assert one.choose(None, FIRST).layers == (0,)
    assert one.shown(one.averages) == FIRST.mean.tolist()
    with pytest.raises(UserError, match=r"scores: none is of a domain of teacher 'x' \(music\)"):
        LayerChooser("foga", 4, 1, domains={"x": ("music",)}).choose(None, FIRST)


@pytest.mark.parametrize("weighting", ["share", "score", "by-time"])
@pytest.mark.parametrize("domains", [None, TEACHERS])
def test_a_chooser_goes_on_where_it_was(domains, weighting):
    def build() -> LayerChooser:
        return LayerChooser("foga", 4, 2, weighting=weighting, domains=domains)

    chooser, other = build(), build()
    before = chooser.choose(None, FIRST)
    other.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    after = chooser.choose(before, SECOND)
    assert other.choose(before, SECOND) == after != before
    assert other.state_dict() == chooser.state_dict()
    own = after if domains is None else after["sounds"]
    assert own.weighting == weighting
    if weighting == "by-time":
        assert own.t_grid == GRID
        # Layer 3 at t 0.2: the mean over both domains, or audio alone; momentum 0.5.
        assert dict(zip(own.layers, own.scores))[3][0] == (((1 + 2) / 2 + (1 + 90) / 2) / 2 if domains is None else 46)
    elif weighting == "score":
        assert sum(own.weights) > 1


def test_after_a_probe_that_said_nothing_the_next_one_chooses_anew():
    chooser = LayerChooser("foga", 4, 2)
    with pytest.warns(UserWarning, match="no layer's score is above the floor"):
        silent = chooser.choose(None, LayerScores((0, 1, 2, 3), torch.zeros(4, 2, dtype=torch.float64)))
    assert silent.layers == (0, 1, 2, 3)
    assert chooser.choose(silent, FIRST).layers == (0, 2)


def test_controls_for_each_teacher():
    chooser = LayerChooser("stored", 4, 2, domains=TEACHERS)
    values = {"voice": [1, 2, 3, 4.0], "sounds": torch.tensor([4, 3, 2, 1.0]), "both": [1, 4, 1, 2.0]}
    first = chooser.choose(None, FIRST, values)
    assert {name: own.layers for name, own in first.items()} == {"voice": (2, 3), "sounds": (0, 1), "both": (1, 3)}
    assert {own.weights for own in first.values()} == {(0.5, 0.5)}
    again = chooser.choose(first, FIRST, values | {"voice": [90, 2, 3, 4.0]})
    assert again["voice"] == LayerSelection((0, 3), (0.5, 0.5), "stored")
    layers = {own.layers for own in LayerChooser("random", 24, 3, domains=TEACHERS).choose(None, FIRST).values()}
    assert len(layers) == 3  # another random set for each teacher


def test_what_a_chooser_refuses():
    chooser = LayerChooser("foga", 4, 1, domains=TEACHERS)
    with pytest.raises(ValueError, match=r"averages are of all teachers together, this run chooses for \['both', 's"):
        chooser.load_state_dict({"": [[1.0] * 4]})
    with pytest.raises(ValueError, match=r"averages are of \['a'\], this run chooses for all teachers together"):
        LayerChooser("foga", 4, 1).load_state_dict({"a": [[1.0] * 4]})
    with pytest.raises(ValueError, match="average has 3 scores, the model 4 layers"):
        LayerChooser("foga", 4, 1).load_state_dict({"": [[1.0] * 3]})
    with pytest.raises(ValueError, match="scores that are not finite"):
        LayerChooser("stored", 4, 1).choose(None, FIRST, {"": [1.0, math.nan, 0.0, 0.0]})
