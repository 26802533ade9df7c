"""What of AlignmentLoss lasts: the selection in its state dict, in a copy and in a pickle."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from agrepa_fast import AlignmentLoss, LayerSelection

EVERY = LayerSelection.uniform(range(4))
# Layer 0 is selected although its weight is 0: it runs, and its cosine is measured.
CHOSEN = LayerSelection((0, 1, 3), (0.0, 0.7, 0.3))


def build(pool=None, seed=0, selection=EVERY) -> AlignmentLoss:
    torch.manual_seed(seed)
    return AlignmentLoss(6, {"speech": 5, "audio": 3}, selection, pool)


def draw(pool, layers):
    generator = torch.Generator().manual_seed(1)
    hidden = {layer: torch.randn(2, 7, 6, generator=generator) for layer in range(4)}
    shape = (2,) if pool else (2, 7)
    targets = {name: torch.randn(*shape, size, generator=generator) for name, size in {"speech": 5, "audio": 3}.items()}
    return {layer: hidden[layer] for layer in layers}, targets


def saved(module: nn.Module) -> dict:
    """Its state dict through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(loss_fn, make):
    file = io.BytesIO()
    torch.save(loss_fn, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def into_another(loss_fn, make):
    other = make()
    other.load_state_dict(saved(loss_fn))
    return other


def into_one_with_another_selection(loss_fn, make):
    other = make()
    other.select(LayerSelection((2,), (1.0,)))
    other.load_state_dict(saved(loss_fn))
    return other


def inside_a_module(loss_fn, make):
    other = nn.Sequential(nn.Linear(2, 2), make())
    state = saved(nn.Sequential(nn.Linear(2, 2), loss_fn))
    other.load_state_dict(state)
    return other[1]


def by_assignment(loss_fn, make):
    with torch.device("meta"):
        other = make()
    other.load_state_dict(saved(loss_fn), assign=True)
    return other


# Each teacher's own layers, and weights by flow time; the others, whose weights are constant, are tested above.
OWN = {"speech": LayerSelection((0, 2), (0.25, 0.75)), "audio": LayerSelection((1,), (0.3,), weighting="score")}
BY_TIME = {
    "speech": LayerSelection.by_time((0.1, 0.4, 0.9), {0: (1, 2, 3), 3: (3, 1, 0)}, "foga"),
    "audio": LayerSelection.by_time((0.2, 0.3, 0.8), {1: (0, 2, 0), 2: (1, 0, 1)}, "foga"),
}
WAYS = [
    into_another,
    into_one_with_another_selection,
    inside_a_module,
    by_assignment,
    through_pickle,
    lambda loss_fn, make: copy.deepcopy(loss_fn),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pool", ["mean", None])
def test_a_selection_lasts(pool, way):
    loss_fn = build(pool)
    loss_fn.select(CHOSEN)
    other = way(loss_fn, lambda: build(pool, 1))
    assert other.active == loss_fn.active == (CHOSEN.layers if pool is None else EVERY.layers)
    assert other.weights.equal(loss_fn.weights)
    arguments = draw(pool, loss_fn.active)
    (loss, metrics), (again, repeated) = loss_fn(*arguments), other(*arguments)
    assert loss.item() == again.item()
    assert {name: value.item() for name, value in metrics.items()} == {k: v.item() for k, v in repeated.items()}
    other.select(LayerSelection((2,), (1.0,)))  # and can be changed, without a change of the first
    assert other.active == ((2,) if pool is None else EVERY.layers)
    assert other.weights.tolist() == [[0, 0, 1, 0]] * 2
    assert selected(loss_fn) == [[True, True, False, True]] * 2


def selected(loss_fn) -> list[list[bool]]:
    return [own.selected.tolist() for own in loss_fn.layer_weights.children()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize("selection", [OWN, BY_TIME], ids=["own", "by-time"])
def test_a_selection_for_each_teacher_lasts(pool, way, selection):
    by_time = selection is BY_TIME
    every = LayerSelection.uniform(range(4), t_grid=(0.0, 0.5, 1.0) if by_time else ())
    loss_fn = build(pool, selection=every)
    loss_fn.select(selection)
    other = way(loss_fn, lambda: build(pool, 1, every))
    assert other.active_heads == loss_fn.active_heads
    assert other.weights.equal(loss_fn.weights)
    t = torch.tensor([0.15, 0.7])
    arguments = draw(pool, loss_fn.active)
    assert loss_fn(*arguments, t=t)[0].item() == other(*arguments, t=t)[0].item()
    if by_time:
        assert loss_fn(*arguments, t=t.flip(0))[0].item() != other(*arguments, t=t)[0].item()
    other.select(selection)  # and again, in place, as the first was
    assert loss_fn(*arguments, t=t)[0].item() == other(*arguments, t=t)[0].item()


def test_a_teacher_s_weights_are_its_own_in_another_order():
    loss_fn = build()
    loss_fn.select(OWN)
    other = AlignmentLoss(6, {"audio": 3, "speech": 5}, EVERY, None)
    other.load_state_dict(saved(loss_fn))
    assert other.weights.tolist() == loss_fn.weights.flip(0).tolist()


@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("with_selected", [True, False])
@pytest.mark.parametrize("pool", ["mean", None])
def test_a_state_dict_of_one_selection_for_all_teachers_loads(pool, with_selected, prefix):
    """As earlier versions wrote it: "weights" and "selected" [layers]; the oldest ones selected the weights above 0."""
    loss_fn, other = build(pool), build(pool, seed=1)
    state = {prefix + name: value for name, value in saved(loss_fn).items() if name.startswith("heads.")}
    state[prefix + "weights"] = torch.tensor([0.0, 0.7, 0.0, 0.3])
    if with_selected:
        state[prefix + "selected"] = torch.tensor([True, True, False, True])
    names = set(state)
    (nn.Sequential(other) if prefix else other).load_state_dict(state)
    assert set(state) == names  # the caller's dictionary is left alone
    layers = (0, 1, 3) if with_selected else (1, 3)
    assert other.active == (layers if pool is None else EVERY.layers)
    assert selected(other) == [[layer in layers for layer in range(4)]] * 2
    assert other.weights.equal(torch.tensor([[0.0, 0.7, 0.0, 0.3]] * 2))
    loss_fn.select(LayerSelection((0, 1, 3), (0.0, 0.7, 0.3)))
    assert other(*draw(pool, range(4)))[0].item() == loss_fn(*draw(pool, range(4)))[0].item()


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_state_dict_that_selects_nothing_is_refused(pool):
    loss_fn = build(pool)
    state = saved(loss_fn)
    state["layer_weights.audio.selected"] = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(
        RuntimeError, match=r"audio.selected: no layer is selected, expected at least one of \[0, 1, 2, 3\]"
    ):
        loss_fn.load_state_dict(state)


def test_a_state_dict_of_other_layers_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for layer_weights\.speech\.selected"):
        build().load_state_dict(saved(build(selection=LayerSelection.uniform([0, 1]))))
