"""What `attribute_layers` and the scores say about arguments of an unusual kind: exact, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import agrepa_fast as ag

X, T = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.2, 0.7, 0.9])


@pytest.fixture(scope="module")
def model() -> ag.DiT:
    torch.manual_seed(0)
    model = ag.DiT(ag.DiTConfig(depth=4, width=16, heads=2, mels=5, cond=0, dropout=0.0))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def score(model, **options):
    return ag.attribute_layers(model, {"x_t": X, "t": T}, **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks", [True, False], "blocks: expected an integer, got True"),
        ("blocks", [1.0], "blocks: expected an integer, got 1.0"),
        ("blocks", 2, "blocks: expected a list of layer numbers or names, got 2"),
        ("blocks", "01", "blocks: expected a list of layer numbers or names, got '01'"),
        ("blocks", ["0"], "blocks: expected layer numbers, got '0'"),
        ("domains", "aabb", "domains: expected one name for each sample, got 'aabb'"),
        ("domains", [1, 2, 3, 4], "domains: expected names, got 1"),
        ("domains", ["a"], "domains: expected 4 names, got 1"),
        ("clips", ["a", "a", "b", "b"], "clips: expected an integer, got 'a'"),
        ("clips", 3, "clips: expected one id for each sample, got 3"),
        ("branches", 7, "branches: expected 'auto' or names of modules inside the blocks, got 7"),
        ("sets", 7, "sets: expected sequences of layers, as [[0, 1], [4]], got 7"),
        ("sets", [[True, False]], "sets: expected an integer, got True"),
        ("spans", 2.0, "spans: expected an integer, got 2.0"),
        ("max_samples", True, "max_samples: expected an integer, got True"),
        ("memory_budget", True, "memory_budget: expected an integer, got True"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(model, name, value, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        score(model, **{name: value})
    assert str(caught.value) == message


def test_unusual_arguments_mean_what_they_say(model):
    plain = score(model, blocks=[0, 2], domains=["a", "a", "b", "b"], clips=[0, 0, 1, 1])
    for blocks in (np.array([0, 2]), torch.tensor([0, 2]), range(0, 4, 2)):
        assert torch.equal(score(model, blocks=blocks).by_sample, plain.by_sample)
    for clips in (torch.tensor([0, 0, 1, 1]), np.array([0, 0, 1, 1]), iter([0, 0, 1, 1])):
        other = score(model, blocks=[0, 2], domains=iter("aabb"), clips=clips)
        assert torch.equal(other.stderr, plain.stderr)
        assert (other.domains, other.clips) == (("a", "a", "b", "b"), (0, 0, 1, 1))
    assert score(model, blocks=(n for n in (0, 2))).layers == (0, 2)
    assert score(model, branches=False).names == ("0", "1", "2", "3")
    assert score(model, branches=iter(["attn", "ff"])).names == score(model, branches="auto").names
    assert score(model, branches="attn").names == ("0.attn", "1.attn", "2.attn", "3.attn")


def test_times_of_another_unit_are_refused(model):
    for t in (T * 1000, T - 1):
        with pytest.raises(
            ValueError, match=r"^t: expected times in \[0, 1\], 0 noise and 1 data, got (200|-0.9|100)$"
        ):
            ag.attribute_layers(model, (X, t))


def test_dissociation_and_choices_of_the_wrong_kind(model):
    scores = score(model)
    for stored in ([1, 2, 3, 4], np.ones((4, 2))):
        with pytest.raises(TypeError, match=r"^scores, stored: expected LayerScores and a tensor \[layers, clips\]"):
            ag.dissociation(scores, stored)
    with pytest.raises(ValueError, match=r"^resamples: expected at least 1, got 0"):
        ag.dissociation(scores, torch.rand(4, 2), resamples=0)
    for depth in (0, -1, 4.0, True):
        with pytest.raises(ValueError, match=f"^depth: expected a number of layers, .*, got {depth}$"):
            ag.choose_layers("even", depth)
    with pytest.raises(ValueError, match=r"^values: expected 4 numbers, one a layer, got Tensor \[4, 2\]$"):
        ag.choose_layers("stored", 4, values=torch.rand(4, 2))
    assert ag.choose_layers("stored", 4, 1, values=(v for v in (1.0, 3.0, 2.0, 0.0))).layers == (1,)


def test_facts_beside_a_selection_do_not_replace_it(tmp_path):
    path = tmp_path / "selection.json"
    with pytest.raises(ValueError, match=r"^layers: the file holds the selection's own"):
        ag.write_selection(ag.LayerSelection.uniform([1]), path, layers=[9])
    ag.write_selection(ag.LayerSelection.uniform([1]), path, step=3)
    assert ag.read_selection(path).layers == (1,)
