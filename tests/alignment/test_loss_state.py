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


def through_pickle(loss_fn, pool):
    file = io.BytesIO()
    torch.save(loss_fn, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def into_another(loss_fn, pool):
    other = build(pool, seed=1)
    other.load_state_dict(saved(loss_fn))
    return other


def into_one_with_another_selection(loss_fn, pool):
    other = build(pool, seed=1)
    other.select(LayerSelection((2,), (1.0,)))
    other.load_state_dict(saved(loss_fn))
    return other


def inside_a_module(loss_fn, pool):
    other = nn.Sequential(nn.Linear(2, 2), build(pool, seed=1))
    state = saved(nn.Sequential(nn.Linear(2, 2), loss_fn))
    other.load_state_dict(state)
    return other[1]


def by_assignment(loss_fn, pool):
    with torch.device("meta"):
        other = build(pool, seed=1)
    other.load_state_dict(saved(loss_fn), assign=True)
    return other


WAYS = [
    into_another,
    into_one_with_another_selection,
    inside_a_module,
    by_assignment,
    through_pickle,
    lambda loss_fn, pool: copy.deepcopy(loss_fn),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pool", ["mean", None])
def test_a_selection_lasts(pool, way):
    loss_fn = build(pool)
    loss_fn.select(CHOSEN)
    other = way(loss_fn, pool)
    assert other.active == loss_fn.active == (CHOSEN.layers if pool is None else EVERY.layers)
    assert other.weights.equal(loss_fn.weights)
    arguments = draw(pool, loss_fn.active)
    (loss, metrics), (again, repeated) = loss_fn(*arguments), other(*arguments)
    assert loss.item() == again.item()
    assert {name: value.item() for name, value in metrics.items()} == {k: v.item() for k, v in repeated.items()}
    other.select(LayerSelection((2,), (1.0,)))  # and can be changed, without a change of the first
    assert other.active == ((2,) if pool is None else EVERY.layers)
    assert other.weights.tolist() == [0, 0, 1, 0]
    assert loss_fn.selected.tolist() == [True, True, False, True]


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_state_dict_without_a_selection_selects_the_weights_above_zero(pool):
    loss_fn, other = build(pool), build(pool)
    loss_fn.select(CHOSEN)
    state = saved(loss_fn)
    del state["selected"]
    other.load_state_dict(state)
    assert "selected" not in state  # the caller's dictionary is left alone
    assert other.active == ((1, 3) if pool is None else EVERY.layers)
    assert other.selected.tolist() == [False, True, False, True]


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_state_dict_that_selects_nothing_is_refused(pool):
    loss_fn = build(pool)
    state = saved(loss_fn)
    state["selected"] = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"selected: no layer is selected, expected at least one of \[0, 1, 2, 3\]"):
        loss_fn.load_state_dict(state)


def test_a_state_dict_of_other_layers_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for selected"):
        build().load_state_dict(saved(build(selection=LayerSelection.uniform([0, 1]))))
