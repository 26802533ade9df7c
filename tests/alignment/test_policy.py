"""select_layers against choices worked out by hand, and selection files: what they keep and refuse."""

from __future__ import annotations

import json

import pytest
import torch

from agrepa_fast import LayerSelection, select_layers
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
        ('{"layers": [], "weights": []}', "as many of each"),
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
