"""Arguments that do not fit an `Aligner` are refused, by name, before the first step of training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import agrepa_fast as ag

from .foreign import DEPTH, TEACHERS, batch, network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": float("nan")}, "weight: expected a finite number of at least 0, got nan"),
        ({"weight": -1}, "weight: expected a finite number of at least 0, got -1"),
        ({"weight": "1"}, "weight: expected a finite number of at least 0, got '1'"),
        ({"teachers": ["speech"]}, "teachers: expected {name: width}, got list of 1"),
        ({"teachers": None}, "teachers: expected {name: width}, got None"),
        ({"schedule": (0, 1)}, "schedule: expected an AlignmentSchedule, got tuple of 2"),
        ({"probe": 5000}, "probe: expected a ProbePlan, got 5000"),
        ({"domains": ["voice"]}, "domains: expected {teacher: its domains}, got list of 1"),
        ({"domains": {"vision": ["voice"]}}, r"domains: expected those of the teachers .*, got \['vision'\]"),
        ({"layers": 3}, "layers: expected a list of numbers or names, got 3"),
        ({"selection": 3}, "layers: expected a list of numbers or names, got 3"),
        ({"selection": "1,2"}, "layers: expected a list of numbers or names, got '1,2'"),
        ({"selection": ["blocks.9"]}, "layers: Network has no layer 'blocks.9'"),
    ],
)
def test_arguments(options, message):
    arguments = {"teachers": TEACHERS, "probe": ag.ProbePlan(1), "k": 2} | options
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ag.Aligner(network(), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"metrics": "rms"}}, "options: expected some of metric, .*, got 'metrics'"),
        ({"options": {"branches": "auto"}}, "options: expected some of metric, .*, got 'branches'"),
        ({"options": ["metric"]}, "options: expected {argument of attribute_layers: value}, got list of 1"),
        ({"t_grid": 0.5}, "t_grid: expected times, got 0.5"),
        ({"t_grid": "0.5"}, "t_grid: expected times, got '0.5'"),
        ({"momentum": "half"}, r"momentum: expected a number in \[0, 1\), got 'half'"),
        ({"margin": None}, "margin: expected a number of at least 0, got None"),
    ],
)
def test_a_plan_is_checked_before_the_run(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ag.ProbePlan(5000, **options)


def test_times_of_another_unit_are_refused():
    """Numbers of 1000 steps, say: weights would be negative."""
    for kind in ("data", "noise", "middle"):
        with pytest.raises(ValueError, match=r"^t: expected times in \[0, 1\], 0 noise and 1 data, got 999"):
            ag.timestep_weight(torch.tensor([500.0, 999.0]), kind)
    selection = ag.LayerSelection.by_time((0.1, 0.9), {0: (1.0, 2.0), 2: (2.0, 1.0)})
    loss_fn = ag.AlignmentLoss(8, {"speech": 5}, selection)
    hidden = {layer: torch.randn(2, 6, 8) for layer in (0, 2)}
    loss_fn(hidden, {"speech": torch.randn(2, 5)}, t=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"^t: expected times in \[0, 1\], 0 noise and 1 data, got -1"):
        loss_fn(hidden, {"speech": torch.randn(2, 5)}, t=torch.tensor([-1.0, 0.5]))


@pytest.mark.parametrize("value", ["0", None, (0, 1)])
def test_a_schedule_is_of_numbers(value):
    with pytest.raises(TypeError, match=r"^start: expected a number of steps, got"):
        ag.AlignmentSchedule(value, 1, 2, 3)


def test_selections_and_scores_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"^weights: expected numbers"):
        ag.LayerSelection.from_scores({0: 0.0, 1: 0.0}, "foga")
    with pytest.raises(ValueError, match=r"^layers: expected at least one layer"):
        ag.LayerSelection.uniform([])
    with pytest.raises(TypeError, match=r"^selection: expected a LayerSelection"):
        ag.write_selection([0, 1], tmp_path / "selection.json")
    scores = ag.attribute_layers(network(), {name: batch(0, "mean")[name] for name in ("x", "time")})
    with pytest.raises(ag.errors.UserError, match=r"^scores: of layers up to 3, but the depth is 3"):
        ag.choose_layers("foga", 3, 2, scores=scores)
    with pytest.raises(TypeError, match=r"^batches: expected an iterable of batches"):
        ag.adaptive_scores(network(), {"x": torch.ones(2, 6, 5)})


def test_a_selection_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "selection.json"
    path.write_text('{"layers": [1], "weights": [1]}', encoding="utf-8-sig")
    assert ag.read_selection(path).layers == (1,)


def test_steps_are_integers_and_targets_a_mapping():
    aligner = ag.Aligner(network(), TEACHERS, selection=[1])
    for step in ("3", 2.0, None, True, torch.tensor(3)):
        with pytest.raises(TypeError, match=r"^step: expected how many steps are done, an integer, got"):
            aligner.step(step)
    for targets in ([torch.ones(3, 5)], torch.ones(3, 5)):
        with pytest.raises(TypeError, match=r"^targets: expected {teacher: features}, got"):
            aligner.loss(targets, hidden={1: torch.ones(3, 6, 8)})
    with pytest.raises(ValueError, match=r"^state: expected what Aligner.state_dict returns"):
        aligner.load_state_dict({"format": 1})


def test_layers_to_weigh_alike_may_be_named():
    aligner = ag.Aligner(network(), TEACHERS, selection=["blocks.2", 0])
    assert (aligner.selection.layers, aligner.selection.weights) == ((0, 2), (0.5, 0.5))
    assert aligner.selection.names == ("blocks.0", "blocks.2")


def test_a_fixed_choice_may_be_of_fewer_layers_than_k():
    assert ag.choose_layers("fixed", 2, layers=[1]).layers == (1,)  # k is 3
    with pytest.raises(ValueError, match="layers: expected"):
        ag.choose_layers("fixed", 2, layers=["1"])
    model, b = network(), batch(0, "mean")
    with ag.Aligner(model, TEACHERS, selection=[1], probe=ag.ProbePlan(1)) as aligner:
        model(b["x"], b["time"])
        assert aligner.step(1).layers == (1,)
        assert aligner.selection.layers == (1,)


def test_later_selections_keep_the_names_of_their_layers():
    model, b = network(), batch(0, "mean")
    with ag.Aligner(model, TEACHERS, k=2, probe=ag.ProbePlan(1, every=1)) as aligner:
        for step in (1, 2):
            model(b["x"], b["time"])
            aligner.step(step)
            assert aligner.selection.names == tuple(f"blocks.{layer}" for layer in aligner.selection.layers)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_while_attached(copied):
    model = network()
    aligner = ag.Aligner(model, TEACHERS, selection=range(DEPTH)).attach()
    with pytest.raises(TypeError, match="cannot be copied or pickled while they are attached"):
        copied(aligner)
    copied(model)  # nothing of the aligner is in it
