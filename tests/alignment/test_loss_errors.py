"""What AlignmentLoss and InterfaceLoss refuse, and that they name the layer, the teacher and the shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import agrepa_fast as ag
from agrepa_fast import (
    AlignmentLoss,
    InterfaceLoss,
    LayerSelection,
    SimilarityStop,
    align_time,
    choose_layers,
    layer_sensitivity,
    select_layers,
    timestep_weight,
)
from agrepa_fast.errors import UserError

SELECTION = LayerSelection((1, 4), (0.5, 0.5))
TEACHERS = {"speech": 5, "audio": 3}


def arguments(pool):
    shape = (2,) if pool else (2, 7)
    return {
        "hidden": {layer: torch.randn(2, 7, 6) for layer in SELECTION.layers},
        "targets": {name: torch.randn(*shape, size) for name, size in TEACHERS.items()},
        "mask": torch.ones(2, 7, dtype=torch.bool),
        "domains": {name: torch.ones(2) for name in TEACHERS},
    }


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize(
    "part, change, message",
    [
        ("hidden", {4: None}, r"no hidden state of layer 4, only \[1\]"),
        ("hidden", {4: torch.randn(2, 7, 8)}, r"hidden\[4\]: expected \[batch, frames, 6\].* got \[2, 7, 8\]"),
        ("hidden", {4: torch.randn(2, 6)}, r"hidden\[4\]: .* got \[2, 6\]"),
        ("hidden", {4: torch.randn(3, 7, 6)}, r"hidden\[4\]: .* got \[3, 7, 6\]"),
        ("targets", {"audio": None}, r"no features of teacher 'audio', only \['speech'\]"),
        ("targets", {"audio": torch.randn(2, 4)}, r"targets\['audio'\]: expected \[2, (7, )?3\], got \[2, 4\]"),
        ("targets", {"audio": torch.randn(3, 7, 3)}, r"targets\['audio'\]: .*got \[3, 7, 3\]"),
        ("targets", {"audio": torch.randn(2, 6, 3)}, r"targets\['audio'\]: .*got \[2, 6, 3\]"),
        ("domains", {"audio": None}, "no weights for teacher 'audio'"),
        ("domains", {"audio": torch.ones(3)}, r"domains\['audio'\]: expected \[2\], got \[3\]"),
        ("domains", ["speech"], r"or 2 names among the teachers \['speech', 'audio'\], got \['speech'\]"),
        ("domains", ["speech", "music"], "'music'"),
        ("sample_weight", torch.ones(3), r"sample_weight: expected \[2\], got \[3\]"),
        ("mask", torch.ones(2, 7), r"mask: expected bool \[2, 7\], got torch.float32"),
        ("mask", torch.ones(2, 6, dtype=torch.bool), r"mask: expected bool \[2, 7\], got torch.bool \[2, 6\]"),
    ],
)
def test_alignment_names_what_does_not_fit(pool, part, change, message):
    given = arguments(pool)
    if isinstance(change, dict):
        given[part] = {key: value for key, value in (given[part] | change).items() if value is not None}
    else:
        given[part] = change
    with pytest.raises(ValueError, match=message):
        AlignmentLoss(6, TEACHERS, SELECTION, pool)(**given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embedding": torch.randn(2, 7, 8)}, r"embedding: expected \[batch, frames, 6\], got \[2, 7, 8\]"),
        ({"targets": {"speech": torch.randn(2, 5)}}, "no features of teacher 'audio'"),
        ({"targets": {"speech": torch.randn(2, 5), "audio": torch.randn(2, 4)}}, r"targets\['audio'\]: expected"),
        ({"kept": torch.ones(2)}, r"kept: expected bool \[2\], got torch.float32"),
        ({"kept": torch.ones(3, dtype=torch.bool)}, r"kept: expected bool \[2\]"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "mask: expected bool"),
    ],
)
def test_interface_names_what_does_not_fit(change, message):
    given = {"embedding": torch.randn(2, 7, 6), "targets": arguments("mean")["targets"], **change}
    with pytest.raises(ValueError, match=message):
        InterfaceLoss(6, TEACHERS, {})(**given)


def test_constructors_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"pool: expected .* got 'max'"):
        AlignmentLoss(6, TEACHERS, SELECTION, "max")
    with pytest.raises(ValueError, match="at least one"):
        AlignmentLoss(6, {}, SELECTION)


@pytest.mark.parametrize("name", ["whisper.v3", "keys", "training", ""])
def test_a_name_that_no_module_can_have_is_the_user_s_mistake(name):
    with pytest.raises(UserError, match=f"'{name}' cannot name a module"):
        AlignmentLoss(6, {name: 5}, SELECTION)
    with pytest.raises(UserError, match=f"'{name}' cannot name a module"):
        InterfaceLoss(6, {name: 5}, {})


STATES = [torch.randn(2, 7, 6)] * 2
FORM = r"expected a mapping \{layer: \[batch, frames, 6\]\}, got "


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize(
    "part, value, message",
    [
        ("hidden", STATES, FORM + "list of 2$"),
        ("hidden", tuple(STATES), FORM + "tuple of 2$"),
        ("hidden", torch.stack(STATES), FORM + r"Tensor \[2, 2, 7, 6\]$"),
        ("hidden", iter(STATES), FORM + "list_iterator$"),
        ("hidden", None, FORM + "None$"),
        ("hidden", {"1": STATES[0], "4": STATES[1]}, r"no hidden state of layer 1, only \['1', '4'\]"),
        ("hidden", {1: STATES[0], 4: None}, r"hidden\[4\]: expected a tensor, got None"),
        ("hidden", {1: STATES[0], 4: np.ones((2, 7, 6))}, r"hidden\[4\]: expected a tensor, got ndarray \[2, 7, 6\]"),
        ("hidden", {1: STATES[0], 4: tuple(STATES)}, r"hidden\[4\]: expected a tensor, got tuple of 2"),
        ("hidden", {1: STATES[0].int(), 4: STATES[1].int()}, r"hidden\[1\]: expected floating point, got torch.int32"),
        ("targets", [torch.randn(2, 5)], r"targets: expected a mapping \{teacher: features\}, got list of 1"),
        ("targets", torch.randn(2, 5), r"targets: expected a mapping .*, got Tensor \[2, 5\]"),
        ("targets", {"speech": [1.0], "audio": None}, r"targets\['speech'\]: expected a tensor, got list of 1"),
        ("mask", [[True] * 7] * 2, r"mask: expected a tensor, bool \[2, 7\], got list of 2"),
        ("mask", np.ones((2, 7), dtype=bool), r"mask: expected a tensor, bool \[2, 7\], got ndarray \[2, 7\]"),
        ("domains", "speech", r"domains: expected \{teacher: \[2\]\}, or 2 names among .*, got 'speech'"),
        ("domains", torch.tensor([0, 1]), r"domains: expected .* names among .*, got Tensor \[2\]"),
        ("domains", [0, 1], r"domains: expected .* names among .*, got \[0, 1\]"),
        ("domains", [["speech"], ["audio"]], r"domains: expected .*, got \[\['speech'\], \['audio'\]\]"),
        ("domains", {"speech": [1, 0], "audio": [0, 1]}, r"domains\['speech'\]: expected a tensor, got list of 2"),
        ("sample_weight", [1.0, 1.0], r"sample_weight: expected a tensor, \[2\], got list of 2"),
        ("sample_weight", 0.5, r"sample_weight: expected a tensor, \[2\], got 0.5"),
    ],
)
def test_a_wrong_container_is_one_line_that_says_what_is_expected(pool, part, value, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        AlignmentLoss(6, TEACHERS, SELECTION, pool)(**{**arguments(pool), part: value})
    assert "\n" not in str(caught.value)


BATCH = {"embedding": torch.randn(2, 7, 6), "targets": arguments("mean")["targets"]}
METRICS = {f"cosine/{name}/{layer}": torch.tensor(0.5) for name in TEACHERS for layer in SELECTION.layers}


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: AlignmentLoss(6, ["speech"], SELECTION),
            r"teachers: expected a mapping .*, got list of 1",
        ),
        (lambda: AlignmentLoss(6, {"speech": "1280"}, SELECTION), r"teachers\['speech'\]: .* got '1280'"),
        (lambda: AlignmentLoss(6, {"speech": 0}, SELECTION), r"teachers\['speech'\]: .* at least 1, got 0"),
        (lambda: AlignmentLoss(6.0, TEACHERS, SELECTION), "width: expected a width, .* got 6.0"),
        (lambda: AlignmentLoss(6, TEACHERS, [1, 4]), "selection: expected a LayerSelection .*, got a list"),
        (lambda: AlignmentLoss(6, TEACHERS, {1: 0.5, 4: 0.5}), "selection: expected a LayerSelection .*, got a dict"),
        (lambda: AlignmentLoss(6, TEACHERS, SELECTION).select((1,)), "selection: expected a LayerSelection .* a tuple"),
        (lambda: AlignmentLoss(6, TEACHERS, SELECTION, head=["mlp"]), r"head: expected one of .*, got \['mlp'\]"),
        (lambda: AlignmentLoss(6, TEACHERS, SELECTION).similarity([]), "metrics: expected a mapping .*, got list of 0"),
        (lambda: AlignmentLoss(6, TEACHERS, SELECTION).similarity({}), "metrics: no metric 'cosine/speech/1', only"),
        (lambda: InterfaceLoss(6, ["speech"], {}), "teachers: expected a mapping"),
        (lambda: InterfaceLoss(6, TEACHERS, [0.5, 1.0]), r"weights: expected a mapping .*, got list of 2"),
        (
            lambda: InterfaceLoss(6, TEACHERS, {})(**BATCH | {"embedding": [1.0]}),
            "embedding: expected a tensor .* list",
        ),
        (lambda: InterfaceLoss(6, TEACHERS, {})(**BATCH | {"targets": STATES}), "targets: expected a mapping"),
        (
            lambda: InterfaceLoss(6, TEACHERS, {})(**BATCH, kept=[True]),
            r"kept: expected a tensor, bool \[2\], got list",
        ),
        (lambda: InterfaceLoss(6, TEACHERS, {})(**BATCH, mask=[True]), r"mask: expected a tensor, bool \[2, 7\], got"),
        (lambda: select_layers([0.5, 0.1], 1), "scores: expected LayerScores, .*, got a list"),
        (lambda: choose_layers("even", 4, "2"), "k: expected a number of layers, got '2'"),
        (lambda: choose_layers("foga", 4, 2, scores={0: 0.5}), "scores: expected LayerScores, .*, got a dict"),
        (lambda: LayerSelection(3, 1.0), "layers: expected a sequence of .*, got 3"),
        (lambda: LayerSelection((0, 1), ("a", "b")), r"weights: expected numbers, got \('a', 'b'\)"),
        (lambda: LayerSelection((0.0,), (1.0,)), r"layers: expected .* integers, got \(0.0,\)"),
        (lambda: LayerSelection.uniform(3), "layers: expected a sequence of .*, got 3"),
        (lambda: LayerSelection.uniform(["0", 2]), r"layers: expected .* integers, got \('0', 2\)"),
        (lambda: SimilarityStop(0.5)(0.25), r"cosine: expected a tensor, \[\], got 0.25"),
        (lambda: SimilarityStop(0.5)(torch.rand(2)), r"cosine: expected \[\], got \[2\]"),
        (lambda: timestep_weight([0.1, 0.2], "data"), "t: expected a floating point tensor .*, got list of 2"),
        (lambda: layer_sensitivity(torch.ones(()), {0: STATES[0]}, STATES[0]), "hidden: expected .* got a dict"),
        (
            lambda: align_time([1.0], teacher_rate=1, student_rate=1, frames=1),
            "teacher: expected a tensor, got list of 1",
        ),
        (
            lambda: align_time(STATES[0], teacher_rate=1, student_rate=1, frames=1, teacher_mask=[True]),
            "teacher_mask: expected a tensor, got list of 1",
        ),
    ],
)
def test_other_wrong_types_are_one_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    chosen = LayerSelection.uniform(np.argsort([3.0, 1.0, 2.0])[:2])
    assert chosen == LayerSelection((1, 2), (0.5, 0.5))
    assert [type(layer) for layer in chosen.layers] == [int, int]
    assert LayerSelection([1, 2], np.array([0.5, 0.5])) == chosen


def test_weights_of_the_interface_belong_to_teachers():
    """A misspelt teacher would have trained with the weight 1."""
    for weights, message in (
        ({"speach": 0.5}, r"^weights: expected some of the teachers \['speech', 'audio'\], got 'speach'"),
        ({"speech": -1.0}, r"^weights\['speech'\]: expected a finite number of at least 0, got -1.0"),
        ({"audio": float("nan")}, r"^weights\['audio'\]: expected a finite number of at least 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ag.InterfaceLoss(8, {"speech": 5, "audio": 3}, weights)


@pytest.mark.parametrize("pool", ["mean", None])
def test_an_empty_batch_is_named(pool):
    loss_fn = ag.AlignmentLoss(8, {"speech": 5}, ag.LayerSelection.uniform([1]), pool)
    for shape in ((0, 6, 8), (2, 0, 8)):
        with pytest.raises(ValueError, match=r"^hidden\[1\]: expected \[batch, frames, 8\], .* got empty"):
            loss_fn({1: torch.zeros(shape)}, {"speech": torch.zeros(shape[0], *([] if pool else [shape[1]]), 5)})


def test_widths_may_be_numpys_integers():
    loss_fn = ag.AlignmentLoss(np.int64(8), {"speech": np.int64(5)}, ag.LayerSelection.uniform([1]))
    assert loss_fn({1: torch.ones(2, 6, 8)}, {"speech": torch.ones(2, 5)})[0].isfinite()


def test_a_stop_takes_numbers():
    with pytest.raises(TypeError, match=r"^threshold: expected a cosine, got '0.5'"):
        ag.SimilarityStop("0.5")
    with pytest.raises(TypeError, match=r"^cosine: expected a tensor, \[\], got None"):
        ag.SimilarityStop(0.5)(None)
