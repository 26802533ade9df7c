"""Sets and spans of blocks, and a metric of the user's own, on other people's models: against the catalogue's loop."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from agrepa_fast import attribute_layers

from .entry import Entry, call, plain, switched_off, velocity
from .page import ENTRIES

NAMES = [
    "FluxTransformer2DModel",  # two lists
    "SD3Transformer2DModel",  # two streams
    "HunyuanDiT2DModel",  # long skips
    "LatteTransformer3DModel",  # lists in turn, with a change of layout between them
    "f5_tts UNetT",  # layers that are lists
    "MMAudio-like network",
]
CASES = [pytest.param(entry, id=entry.name.replace(" ", "_")) for entry in ENTRIES if entry.name in NAMES]


def loop(entry: Entry, model: Any, inputs: Any, sets: list[list[str]], metric: Any) -> np.ndarray:
    """[sets, samples], one forward for each set."""
    mask = inputs[entry.mask] if entry.mask else None
    with plain():
        base = velocity(entry, call(model, inputs))
        rows = []
        for names in sets:
            with contextlib.ExitStack() as stack:
                for name in names:
                    stack.enter_context(switched_off(entry, model, name))
                changed = velocity(entry, call(model, inputs))
            valid = [slice(None) if mask is None else mask[n] for n in range(len(base))]
            rows.append([metric(base[n][valid[n]], changed[n][valid[n]]) for n in range(len(base))])
    return np.array(rows)


def ratio(base, changed):
    change, energy = (changed - base).square().mean(), base.square().mean()
    return ((change + 1e-8).sqrt() / ((energy + 1e-8).sqrt() + 1e-8)).item()


@pytest.mark.parametrize("entry", CASES)
@pytest.mark.parametrize("engine", ["auto", "stacked", "loop"])
def test_spans_and_sets_equal_the_loop(entry: Entry, engine: str) -> None:
    model, inputs = entry.made()
    units = entry.units
    pairs = [units[i : i + 2] for i in range(len(units) - 1)]
    scores = attribute_layers(model, inputs, spans=2, engine=engine)
    assert scores.names == tuple("+".join(names) for names in pairs)
    np.testing.assert_allclose(scores.by_sample.numpy(), loop(entry, model, inputs, pairs, ratio), rtol=1e-8)
    if engine == "auto":  # each pair's stream joins after the first of its blocks
        depth = len(units)
        assert scores.block_evaluations == sum(1 + min(layer, depth - 1) for layer in range(depth))
    sets = [[units[-1], units[0]], [units[1]], [units[0], units[1], units[-1]]]
    scores = attribute_layers(model, inputs, sets=[[units[-1], 0], sets[1], sets[2]], engine=engine)
    assert [set(name.split("+")) for name in scores.names] == [set(names) for names in sets]
    np.testing.assert_allclose(scores.by_sample.numpy(), loop(entry, model, inputs, sets, ratio), rtol=1e-8)


def largest(baseline, ablated, mask=None):
    change = (ablated - baseline).abs().flatten(1).amax(1)
    return change / baseline.abs().flatten(1).amax(1)


@pytest.mark.parametrize("entry", CASES)
def test_a_metric_of_the_users_own(entry: Entry) -> None:
    model, inputs = entry.made()
    scores = attribute_layers(model, inputs, metric=largest)

    def one(base, changed):
        return ((changed - base).abs().max() / base.abs().max()).item()

    expected = loop(entry, model, inputs, [[unit] for unit in entry.units], one)
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-8)
    assert scores.metric == "largest"
    assert scores.floor == 0
    assert torch.isfinite(scores.by_sample).all()


@pytest.mark.parametrize("entry", CASES)
def test_the_noise_floor_of_a_metric_of_the_users_own(entry: Entry) -> None:
    """It is the metric between two velocities whose states differ by rounding."""
    model, inputs = entry.made()
    wide = attribute_layers(model, inputs, metric=largest).noise_floor
    single = dataclasses.replace(entry, single=True)
    model, inputs = single.made()
    narrow = attribute_layers(model, inputs, metric=largest).noise_floor
    assert wide < 1e-12
    assert 1e-8 < narrow < 1e-4


def test_an_unknown_block_is_named() -> None:
    model, inputs = next(entry for entry in ENTRIES if entry.name == "WanTransformer3DModel").made()
    with pytest.raises(ValueError, match=r"sets: no block 'blocks\.7'; blocks are blocks\.0, blocks\.1, blocks\.2"):
        attribute_layers(model, inputs, sets=[["blocks.7"]])
