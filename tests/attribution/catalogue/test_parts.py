"""Streams of joint blocks, and modules of layers that are lists, switched off apart: against hooks written here."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from agrepa_fast import attribute_layers

from .entry import Entry, call, plain, velocity
from .page import ENTRIES

BY_NAME = {entry.name: entry for entry in ENTRIES}
# For each class the parts of a block in the order of its results; the place among them that a part is.
JOINT = {
    "SD3Transformer2DModel": ["encoder_hidden_states", "hidden_states"],
    "FluxTransformer2DModel": ["encoder_hidden_states", "hidden_states"],
    "CogVideoXTransformer3DModel": ["hidden_states", "encoder_hidden_states"],
    "f5_tts MMDiT": ["c", "x"],
    "MMAudio-like network": ["latent", "clip", "text"],
}
LISTS = {"f5_tts UNetT": ["2", "4"], "voicebox_pytorch VoiceBox": ["3", "5"]}


def scored(entry: Entry, model: Any, inputs: Any, module: Any, hook: Any) -> list[float]:
    mask = inputs[entry.mask] if entry.mask else None
    with plain():
        base = velocity(entry, call(model, inputs))
        handle = module.register_forward_hook(hook, with_kwargs=True)
        changed = velocity(entry, call(model, inputs))
        handle.remove()
    row = []
    for n in range(len(base)):
        v, w = (x[n] if mask is None else x[n][mask[n]] for x in (base, changed))
        change, energy = (w - v).square().mean(), v.square().mean()
        row.append(((change + 1e-8).sqrt() / ((energy + 1e-8).sqrt() + 1e-8)).item())
    return row


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("engine", ["auto", "stacked", "loop"])
def test_streams_of_a_joint_block(name: str, engine: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.made()
    scores = attribute_layers(model, inputs, branches=["parts"], engine=engine)
    for unit, layer, part, row in zip(scores.names, scores.layers, scores.branches, scores.by_sample.tolist()):
        assert unit == f"{entry.units[layer]}.{part}"
        module = model.get_submodule(entry.units[layer])

        def keep(module, args, kwargs, result, part=part):
            leaves, spec = tree_flatten(result)
            order = JOINT[name]
            taken = dict(zip(inspected(module), args)) | kwargs
            place = (
                order.index(part)
                if len([leaf for leaf in leaves if leaf is not None]) > 1
                else leaves.index(next(leaf for leaf in leaves if leaf is not None))
            )
            leaves[place] = taken[part]
            return tree_unflatten(leaves, spec)

        np.testing.assert_allclose(row, scored(entry, model, inputs, module, keep), rtol=1e-8, err_msg=unit)
    first = [part for layer, part in zip(scores.layers, scores.branches) if layer == 0]
    assert sorted(first) == sorted(JOINT[name])


def inspected(module: Any) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


@pytest.mark.parametrize("name", LISTS)
def test_modules_of_a_layer_that_is_a_list(name: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.made()
    scores = attribute_layers(model, inputs, branches=["parts"])
    assert list(scores.names) == [f"{unit}.{part}" for unit in entry.units for part in LISTS[name]]
    for unit, row in zip(scores.names, scores.by_sample.tolist()):
        off = scored(
            entry, model, inputs, model.get_submodule(unit), lambda module, args, kwargs, out: torch.zeros_like(out)
        )
        np.testing.assert_allclose(row, off, rtol=1e-8, err_msg=unit)


def test_other_branches_are_refused() -> None:
    model, inputs = BY_NAME["SD3Transformer2DModel"].made()
    with pytest.raises(ValueError, match=r"branches: expected \('parts',\) or None for other models, got \['attn'\]"):
        attribute_layers(model, inputs, branches=["attn"])
