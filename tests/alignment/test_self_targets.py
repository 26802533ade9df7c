"""`LayerSync` in an `Aligner`: a plain loop against the loss written out, choice, resume, refusals."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import agrepa_fast as ag
from agrepa_fast.errors import UserError

spec = importlib.util.spec_from_file_location("foreign", Path(__file__).with_name("foreign.py"))
foreign = importlib.util.module_from_spec(spec)
sys.modules["foreign"] = foreign
spec.loader.exec_module(foreign)
from foreign import WIDTH, batch, network, optimizer_for  # noqa: E402

PLAN = ag.ProbePlan(start=2, every=2, samples=3, momentum=0.3, margin=0.0)


def steps(model, aligner, optimizer, start, stop):
    with aligner:
        for step in range(start + 1, stop + 1):
            b = batch(step, "mean")
            loss = (model(b["x"], time=b["time"]) - b["velocity"]).square().mean() + aligner.loss(mask=b["mask"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            aligner.step(step)


@pytest.mark.parametrize("pool", ["mean", None])
def test_the_loss_and_its_gradients_are_those_of_plain_pytorch(pool):
    model, b = network(), batch(1, pool)
    aligner = ag.Aligner(model, {"own": ag.LayerSync(2)}, selection=[0], pool=pool, weight=1.0)
    with aligner:
        model(b["x"], time=b["time"])
        loss = aligner.loss(mask=b["mask"])
    hidden = [model.head(b["x"])]
    for block in model.blocks:
        hidden.append(block(hidden[-1], b["time"]))
    x, target, mask = hidden[1], hidden[3].detach(), b["mask"]
    if pool:
        x, target = ((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for h in (x, target))
    head = aligner.loss_fn.heads["own"]["0"]
    cosine = F.cosine_similarity(head.output(F.gelu(head.hidden(F.layer_norm(x, (WIDTH,))))), target, dim=-1)
    expected = 1 - (cosine.mean() if pool else cosine[mask].mean())
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for mine, other in zip(
        *(torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected)), strict=True
    ):
        assert (mine is None) == (other is None)  # nothing after the aligned layer has a gradient
        if mine is not None:
            torch.testing.assert_close(mine, other)
    assert aligner.states.layers == (0, 2)


@pytest.mark.parametrize("policy", ["foga", "deepest"])
def test_layers_are_chosen_before_the_target(policy):
    model = network()
    probe = PLAN if policy == "foga" else None
    aligner = ag.Aligner(model, {"own": ag.LayerSync(2)}, k=1, policy=policy, probe=probe)
    assert aligner.loss_fn.layers == ((0, 1) if probe else (1,))
    steps(model, aligner, optimizer_for(model, aligner), 0, 6)
    assert max(aligner.selection.layers) < 2
    if policy == "deepest":
        assert aligner.selection.layers == (1,)


def test_a_resumed_loop_ends_with_the_same_bits():
    def setup():
        model = network()
        aligner = ag.Aligner(model, {"own": ag.LayerSync(3)}, k=2, probe=PLAN)
        return model, aligner, optimizer_for(model, aligner)

    whole = setup()
    steps(*whole, 0, 9)
    first, second = setup(), setup()
    steps(*first, 0, 5)
    for mine, other in zip(second, first):
        mine.load_state_dict(copy.deepcopy(other.state_dict()))
    steps(*second, 5, 9)
    for mine, other in zip(second[:2], whole[:2]):
        module, expected = (getattr(x, "loss_fn", x) for x in (mine, other))
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), expected.state_dict().values()))


def test_beside_a_teacher_of_audio():
    """Each has its own layers; features are given for the one that hears."""
    model, b = network(), batch(1, "mean")
    own = {"own": ag.LayerSelection.uniform([0]), "speech": ag.LayerSelection.uniform([3])}
    aligner = ag.Aligner(model, {"own": ag.LayerSync(1), "speech": 7}, selection=own)
    with aligner:
        model(b["x"], time=b["time"])
        aligner.loss({"speech": b["features"]["speech"]}, b["mask"])
    assert aligner.states.layers == (0, 1, 3)
    assert {"cosine/own/0", "cosine/speech/3"} <= set(aligner.metrics())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teachers": {"own": ag.LayerSync(4)}}, ValueError, "'own': expected a target_layer from 1 to 3, got 4"),
        ({"teachers": {"own": ag.LayerSync()}}, ValueError, "expected a target_layer from 1 to 3, got None"),
        ({"teachers": {"own": 7}, "average": network()}, ValueError, "average: none of the teachers is a SelfFlow"),
        (
            {"teachers": {"own": ag.LayerSync(2)}, "selection": [1, 2]},
            UserError,
            r"layer after the aligned ones \(1, 2\)",
        ),
        ({"teachers": {"own": ag.LayerSync(2)}, "policy": "even"}, UserError, "k: expected 1 to 2 layers, got 3"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        ag.Aligner(network(), **{"policy": "shallowest", **options})


@pytest.mark.parametrize("layer", [0, -1, True, 1.0, "3"])
def test_a_target_layer_is_a_number_from_1_on(layer):
    with pytest.raises(ValueError, match="target_layer: expected a layer from 1 on"):
        ag.LayerSync(layer)


def test_selections_keep_the_target_in_files(tmp_path):
    chosen = ag.LayerSelection((0, 1), (0.5, 0.5), target=3)
    ag.write_selection(chosen, tmp_path / "selection.json")
    assert ag.read_selection(tmp_path / "selection.json") == chosen
    with pytest.raises(ValueError, match=r"target: expected a layer after all of \[0, 1\], got 1"):
        ag.LayerSelection((0, 1), (0.5, 0.5), target=1)
