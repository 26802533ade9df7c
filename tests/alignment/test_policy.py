"""select_layers against choices worked out by hand, and selection files: what they keep and refuse."""

from __future__ import annotations

import json
import math

import pytest
import torch

from agrepa_fast import LayerSelection, choose_layers, read_selection, select_layers
from agrepa_fast.alignment.selection import write_selection
from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.errors import UserError


def scores(means, layers=None, branches=None, floor=0.0) -> LayerScores:
    """Two samples around each mean."""
    means = torch.tensor(means, dtype=torch.float64)
    by_sample = torch.stack([means * 0.5, means * 1.5], dim=1)
    floors = torch.full((2,), floor, dtype=torch.float64)
    return LayerScores(tuple(layers or range(len(means))), by_sample, "rms", branches, floors)


def test_the_highest_with_weights_in_proportion():
    selection = select_layers(scores([0.1, 0.6, 0.05, 0.3, 0.2]), k=3)
    assert selection.layers == (1, 3, 4)
    assert selection.weights == pytest.approx((0.6 / 1.1, 0.3 / 1.1, 0.2 / 1.1))
    assert sum(selection.weights) == pytest.approx(1, abs=1e-12)
    assert selection.method == "foga"


def test_one_layer_and_all_layers():
    assert select_layers(scores([0.1, 0.6, 0.3]), k=1) == LayerSelection((1,), (1.0,), "foga")
    every = select_layers(scores([0.1, 0.6, 0.3]), k=3)
    assert every.layers == (0, 1, 2)
    assert every.weights == pytest.approx((0.1, 0.6, 0.3))


def test_layers_are_the_model_s_not_positions():
    selection = select_layers(scores([0.2, 0.6, 0.3], layers=[11, 4, 7]), k=2)
    assert selection.layers == (4, 7)
    assert selection.weights == pytest.approx((2 / 3, 1 / 3))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_of_equal_scores_the_lower_layers_win(order):
    assert select_layers(scores([0.25] * 4, layers=order), k=2).layers == (0, 1)


def test_branches_are_added_up_by_layer():
    units = scores([0.3, 0.3, 0.5, 0.0, 0.1, 0.2], [0, 0, 1, 1, 2, 2], ("attn", "ff") * 3)
    selection = select_layers(units, k=2)
    assert selection.layers == (0, 1)
    assert selection.weights == pytest.approx((0.6 / 1.1, 0.5 / 1.1))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_that_does_not_fit(k):
    with pytest.raises(ValueError, match=f"k: expected 1 to 3 layers, got {k}"):
        select_layers(scores([0.1, 0.6, 0.3]), k)
    with pytest.raises(ValueError, match="k: expected 1 to 2 layers"):
        select_layers(scores([0.1, 0.6, 0.3, 0.2], [0, 0, 1, 1], ("attn", "ff") * 2), 3)


@pytest.mark.parametrize("means, floor", [([0.0, 0.0, 0.0], 0.0), ([1e-4, 1e-4, 1e-4], 1e-4)])
def test_scores_at_the_floor_fall_back_to_all_layers_alike(means, floor):
    with pytest.warns(UserWarning, match="no layer's score is above the floor.*train before probing"):
        selection = select_layers(scores(means, layers=[2, 0, 5], floor=floor), k=1)
    assert selection.layers == (0, 2, 5)
    assert selection.weights == pytest.approx((1 / 3,) * 3)
    assert selection.method == "uniform"


def test_one_score_above_the_floor_is_enough(recwarn):
    assert select_layers(scores([1e-4, 2e-4, 1e-4], floor=1e-4), k=1).layers == (1,)
    assert not recwarn


def test_uniform_sorts():
    assert LayerSelection.uniform([9, 1, 4]) == LayerSelection((1, 4, 9), (1 / 3,) * 3, "fixed")


def test_json_round_trip(tmp_path):
    written = select_layers(scores([0.1, 0.6, 0.05, 0.3]), k=3)
    written.to_json(tmp_path / "selection.json")
    assert LayerSelection.from_json(tmp_path / "selection.json") == written  # weights to the last bit


def test_a_file_may_say_more_or_less(tmp_path):
    path = tmp_path / "selection.json"
    path.write_text(json.dumps({"layers": [0, 6], "weights": [0.5, 0.5], "step": 600}), encoding="utf-8")
    assert LayerSelection.from_json(path) == LayerSelection((0, 6), (0.5, 0.5), "fixed")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a layer selection"),
        ("{", "not a layer selection"),
        ("[]", "not a layer selection"),
        ("3", "not a layer selection"),
        ('{"layers": [0]}', "'weights'"),
        ('{"weights": [1]}', "'layers'"),
        ('{"layers": 0, "weights": [1]}', "not a layer selection"),
        ('{"layers": [], "weights": []}', "layers: expected at least one layer"),
        ('{"layers": [0, 1], "weights": [1]}', "as many of each"),
        ('{"layers": [0, 1], "weights": [0.5, 0.6]}', r"sum to 1, got \(0.5, 0.6\)"),
        ('{"layers": [0, 1], "weights": [1.5, -0.5]}', "numbers >= 0"),
        ('{"layers": [0, 1], "weights": [NaN, NaN]}', "sum to 1"),
        ('{"layers": [0, 1], "weights": ["a", "b"]}', "not a layer selection"),
        ('{"layers": [1, 0], "weights": [0.5, 0.5]}', "distinct ascending"),
        ('{"layers": [1, 1], "weights": [0.5, 0.5]}', "distinct ascending"),
        ('{"layers": [-1, 0], "weights": [0.5, 0.5]}', "0-based"),
        ('{"layers": [0.5], "weights": [1]}', "integers"),
        ('{"layers": ["0"], "weights": [1]}', "integers"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, text, message):
    (tmp_path / "selection.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"selection.json: .*{message}") as caught:
        LayerSelection.from_json(tmp_path / "selection.json")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: No such file"):
        LayerSelection.from_json(tmp_path / "absent.json")
    (tmp_path / "selection.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"selection\.json: not a layer selection"):
        LayerSelection.from_json(tmp_path / "selection.json")


GRID = (0.2, 0.8)
# Layers by [t 0.2, t 0.8], two samples at each t.
BY_T = torch.tensor([[4.0, 1.0], [3.0, 2.0], [1.0, 5.0], [0.5, 0.5]], dtype=torch.float64)
T_SCORES = LayerScores(
    tuple(range(4)),
    BY_T.repeat_interleave(2, 1) * torch.tensor([0.5, 1.5]).repeat(2),
    t=torch.tensor(GRID).repeat_interleave(2),
)


def test_raw_scores_as_weights():
    selection = select_layers(scores([0.118, 0.05, 0.334, 0.139]), 3, "score")
    assert selection == LayerSelection((0, 2, 3), (0.118, 0.334, 0.139), "foga", "score")


def test_by_time_the_highest_layers_of_each_time_share_it():
    selection = select_layers(T_SCORES, 2, "by-time")
    assert selection.layers == (0, 1, 2)  # 0 and 1 at t 0.2, 1 and 2 at t 0.8
    assert selection.t_grid == GRID
    assert selection.scores == ((4, 0), (3, 2), (0, 5))
    assert selection.weights == pytest.approx([4 / 7 / 2, (3 / 7 + 2 / 7) / 2, 5 / 7 / 2])
    soft = choose_layers("foga-soft", 4, scores=T_SCORES, weighting="by-time")
    assert soft.scores == tuple(map(tuple, BY_T.tolist()))
    assert (soft.method, soft.weighting) == ("foga-soft", "by-time")


def test_a_time_without_a_score_above_the_floor_takes_the_mean_over_all_times():
    quiet = LayerScores(
        (0, 1, 2),
        torch.tensor([[0.1, 0.2], [0.1, 0.9], [0.1, 0.4]], dtype=torch.float64),
        floor_by_sample=torch.tensor([0.1, 0.1], dtype=torch.float64),
        t=torch.tensor(GRID),
    )
    first, second = select_layers(quiet, 2, "by-time").scores
    assert first == pytest.approx((0.5, 0.9))
    assert second == pytest.approx((0.25, 0.4))
    silent = LayerScores((0, 1), torch.zeros(2, 2).double(), t=torch.tensor(GRID))
    with pytest.warns(UserWarning, match="no layer's score is above the floor"):
        selection = select_layers(silent, 1, "by-time")
    assert (selection.layers, selection.scores, selection.method) == ((0, 1), ((1, 1), (1, 1)), "uniform")


def test_weightings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="weighting: expected one of share, score, by-time, got 'raw'"):
        select_layers(scores([0.1, 0.2]), 1, "raw")
    with pytest.raises(ValueError, match='scores: have no t, which weighting "by-time" needs'):
        select_layers(scores([0.1, 0.2]), 1, "by-time")
    with pytest.raises(UserError, match="weighting 'score' needs policy foga or foga-soft: 'deepest'"):
        choose_layers("deepest", 4, 2, weighting="score")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LayerSelection((0,), (0.5,)), "sum to 1, got"),
        (lambda: LayerSelection((0,), (0.0,), weighting="score"), "finite numbers >= 0, at least one above 0"),
        (lambda: LayerSelection((0,), (math.inf,), weighting="score"), "finite numbers >= 0"),
        (lambda: LayerSelection((0,), (math.nan,), weighting="score"), "finite numbers >= 0"),
        (lambda: LayerSelection((0,), (1.0,), weighting="sum"), "weighting: expected one of share, score, by-time"),
        (lambda: LayerSelection((0,), (1.0,), t_grid=(0.5,)), 't_grid, scores: only with weighting="by-time"'),
        (lambda: LayerSelection((0,), (1.0,), weighting="by-time"), "t_grid: expected ascending times"),
        (lambda: LayerSelection.by_time((0.5, 0.2), {0: (1, 1)}), "t_grid: expected ascending times"),
        (lambda: LayerSelection.by_time((0.5, math.nan), {0: (1, 1)}), "t_grid: expected ascending times"),
        (lambda: LayerSelection.by_time((0.5, 2), {0: (1, 1)}), "t_grid: expected ascending times"),
        (lambda: LayerSelection.by_time((0.1, 0.2), {0: (1,)}), "scores: expected 1 layers of 2 times"),
        (lambda: LayerSelection.by_time((0.1, 0.2), {0: (1, 0), 1: (1, 0)}), r"sum to more than 0 at t 0\.2"),
        (lambda: LayerSelection.by_time((0.1, 0.2), {0: (1, -1), 1: (1, 3)}), r"numbers >= 0 .* at t 0\.2"),
        (lambda: LayerSelection.by_time((0.1,), {0: (math.nan,)}), "scores: expected numbers >= 0"),
        (lambda: LayerSelection.by_time((0.1,), {}), "layers: expected at least one layer"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


RELEASED = {
    "speech": LayerSelection((0, 4, 8), (0.334, 0.118, 0.139), "foga", "score"),
    "audio": LayerSelection.by_time((0.1, 0.9), {0: (0.3, 0.1), 8: (0.0, 0.2)}),
}


def test_a_file_keeps_a_selection_for_each_teacher(tmp_path):
    path = tmp_path / "selection.json"
    write_selection(RELEASED, path, metric="rms")
    assert read_selection(path) == RELEASED
    assert json.loads(path.read_text())["metric"] == "rms"
    with pytest.raises(UserError, match=r"a selection for each teacher \(speech, audio\): .* ag.read_selection"):
        LayerSelection.from_json(path)
    RELEASED["audio"].to_json(path)
    assert read_selection(path) == LayerSelection.from_json(path) == RELEASED["audio"]


@pytest.mark.parametrize(
    "text",
    [
        '{"teachers": {}}',
        '{"teachers": []}',
        '{"teachers": {"speech": {"layers": [0]}}}',
        '{"teachers": {"speech": 3}}',
        '{"layers": [0], "weights": [1], "weighting": 3}',
        '{"layers": [0], "weights": [1], "weighting": "by-time", "t_grid": 3}',
        '{"layers": [0], "weights": [1], "weighting": "by-time", "t_grid": [0.5], "scores": [3]}',
        "[" * 100_000,
    ],
)
def test_a_bad_file_of_the_new_kinds_is_named(tmp_path, text):
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(UserError, match=r"selection\.json: not a layer selection \(") as caught:
        read_selection(tmp_path / "selection.json")
    assert "\n" not in str(caught.value)
