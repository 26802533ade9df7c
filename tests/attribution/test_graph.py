"""The cache of captured probes, with a stand-in for CUDA's capture: what makes a new graph, what is kept, what dies."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers
from agrepa_fast.attribution import graph
from agrepa_fast.ops import dispatch


@pytest.fixture
def captures(cuda, monkeypatch):
    """engine="graph" on the stand-in for CUDA; lists the number of samples of every capture."""
    made = []
    original = graph.Captured.__init__

    def listed(self, run, inputs):
        made.append(len(inputs["t"]))
        original(self, run, inputs)

    monkeypatch.setattr(graph.Captured, "__init__", listed)
    monkeypatch.setattr(graph, "why_not", lambda model, inputs: None)
    monkeypatch.setattr(graph, "_GRAPHS", weakref.WeakKeyDictionary())
    return made


def changed(inputs, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {**inputs, "x_t": torch.randn(inputs["x_t"].shape, generator=generator).to(inputs["x_t"].dtype)}


def test_a_replay_sees_new_inputs_and_weights_changed_in_place(build, draw, captures):
    model, inputs = build(), draw()
    first = attribute_layers(model, inputs)  # "auto" takes the graph where one fits
    assert first.by_sample.equal(attribute_layers(model, inputs, engine="prefix").by_sample)
    assert first.block_evaluations == 6
    other = changed(inputs)
    assert attribute_layers(model, other).by_sample.equal(attribute_layers(model, other, engine="prefix").by_sample)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    moved = attribute_layers(model, other, engine="graph")
    assert moved.by_sample.equal(attribute_layers(model, other, engine="prefix").by_sample)
    assert not moved.by_sample.allclose(first.by_sample, rtol=1e-3)
    assert captures == [3]


def test_scores_keep_their_values_after_the_next_replay(build, draw, captures):
    """Two passes of one shape share a graph, whose memory the second overwrites."""
    model, inputs = build(), draw()
    scores = attribute_layers(model, inputs, max_samples=1)
    assert scores.by_sample.equal(attribute_layers(model, inputs, engine="prefix", max_samples=1).by_sample)
    assert captures == [1]


def test_what_changes_the_launches_makes_another_graph(build, draw, captures, monkeypatch):
    model, inputs = build(), draw()
    attribute_layers(model, inputs)
    attribute_layers(model, inputs, blocks=[0, 1])
    attribute_layers(model, inputs, branches=("ff",))
    assert captures == [3, 3, 3]
    attribute_layers(model, {name: value[:2] for name, value in inputs.items()})
    assert captures == [3, 3, 3, 2]
    monkeypatch.setattr(dispatch, "MODE", "reference")
    attribute_layers(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        attribute_layers(model, inputs)
    assert captures == [3, 3, 3, 2, 3, 3]
    model.input.weight = nn.Parameter(model.input.weight.detach().clone())
    attribute_layers(model, inputs)
    model.double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    scores = attribute_layers(model, wide)
    assert captures == [3, 3, 3, 2, 3, 3, 3, 3]
    assert scores.by_sample.equal(attribute_layers(model, wide, engine="prefix").by_sample)


def test_the_least_recently_used_graph_makes_room(build, draw, captures):
    model, inputs = build(depth=6), draw()
    for layer in range(graph.CAPACITY):
        attribute_layers(model, inputs, [layer])
    attribute_layers(model, inputs, [0])  # used again: now layer 1's is the oldest
    assert len(captures) == graph.CAPACITY
    attribute_layers(model, inputs, [5])
    assert len(graph._GRAPHS[model]) == graph.CAPACITY
    attribute_layers(model, inputs, [0])
    assert len(captures) == graph.CAPACITY + 1
    attribute_layers(model, inputs, [1])
    assert len(captures) == graph.CAPACITY + 2


def test_graphs_die_with_their_model(build, draw, captures, cuda):
    cuda.replays_compute = False
    model, other, inputs = build(), build(seed=1), draw()
    attribute_layers(model, inputs)
    attribute_layers(other, inputs)
    captured = weakref.ref(next(iter(graph._GRAPHS[model].values())))
    graph.release_graphs(other)
    assert list(graph._GRAPHS) == [model]
    del model
    gc.collect()
    assert captured() is None
    assert len(graph._GRAPHS) == 0


def test_where_no_graph_fits(build, draw, monkeypatch):
    model, inputs = build(), draw()
    with pytest.raises(ValueError, match=r"'graph' cannot .* one CUDA device, got cpu; engine='prefix' runs it"):
        attribute_layers(model, inputs, engine="graph")
    with pytest.raises(ValueError, match="'graph' is only for a DiT"):
        attribute_layers(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),), engine="graph")
    on_a_device = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(type(model), "parameters", lambda self: iter([on_a_device]))
    inputs = {"x_t": on_a_device}
    assert graph.why_not(model, inputs) is None
    handle = model.branches[1].register_forward_hook(lambda *_: None)
    assert "branches.1 has forward hooks" in graph.why_not(model, inputs)
    handle.remove()
    model.branches[2].compile(backend="eager")
    assert "branches.2 is compiled" in graph.why_not(model, inputs)
