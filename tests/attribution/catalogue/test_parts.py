"""Streams of joint blocks, and modules of layers that are lists, switched off apart: against hooks written here."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from agrepa_fast import attribute_layers

from .entry import Entry, call, plain, velocity
from .page import ENTRIES, branches

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


BRANCHES = {
    "PixArtTransformer2DModel": ["attn1", "attn2", "ff"],
    "WanTransformer3DModel": ["attn1", "attn2", "ffn"],
    "SD3Transformer2DModel": ["attn", "ff", "ff_context"],
    "AceStepTransformer1DModel": ["self_attn", "cross_attn", "mlp"],
    "f5_tts DiT": ["attn", "ff"],
    "timm VisionTransformer": ["attn", "mlp"],
}


def zeros(module: Any, args: Any, kwargs: Any, result: Any) -> Any:
    return tree_map(lambda leaf: torch.zeros_like(leaf) if torch.is_tensor(leaf) else leaf, result)


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_branches_of_blocks(name: str, engine: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.made()
    modules = dict(model.named_modules())
    expected = [
        (n, part) for n, unit in enumerate(entry.units) for part in BRANCHES[name] if f"{unit}.{part}" in modules
    ]
    scores = attribute_layers(model, inputs, branches=BRANCHES[name], engine=engine)
    assert sorted(zip(scores.layers, scores.branches)) == sorted(expected)
    for unit, layer, part, row in zip(scores.names, scores.layers, scores.branches, scores.by_sample.tolist()):
        assert unit == f"{entry.units[layer]}.{part}"
        off = scored(entry, model, inputs, modules[unit], zeros)
        np.testing.assert_allclose(row, off, rtol=1e-6, err_msg=unit)
    if engine == "auto" and name == "WanTransformer3DModel":
        assert scores.block_evaluations == 9 * 10 / 2 / 3
        one = attribute_layers(model, inputs, branches=BRANCHES[name], blocks=[1])
        assert one.names == ("blocks.1.attn1", "blocks.1.attn2", "blocks.1.ffn")
        np.testing.assert_allclose(one.by_sample, scores.by_sample[3:6], rtol=1e-9)


FOUND = {
    "FluxTransformer2DModel": {
        "FluxTransformerBlock": "attn ff ff_context",
        "FluxSingleTransformerBlock": "proj_mlp attn",
    },
    "WanTransformer3DModel": {"WanTransformerBlock": "attn1 attn2 ffn"},
    "StableAudioDiTModel": {"StableAudioDiTBlock": "attn1 attn2 ff"},
    "Lumina2Transformer2DModel": {"Lumina2TransformerBlock": "attn feed_forward"},  # norms behind the branches
    "MochiTransformer3DModel": {"MochiTransformerBlock": "attn1 ff ff_context"},
    "HiDreamImageTransformer2DModel": {"HiDreamBlock": "block.attn1 block.ff_i block.ff_t"},
    "timm VisionTransformer": {"Block": "attn mlp"},
    "WhisperEncoder": {"WhisperEncoderLayer": "self_attn fc2"},
    "f5_tts UNetT": {"ModuleList": "2 4"},
}


@pytest.mark.parametrize("name", FOUND)
def test_branches_that_are_found(name: str) -> None:
    scores, entry = branches(name, "auto"), BY_NAME[name]
    assert scores is not None
    model, _ = entry.made()
    found: dict[str, dict[str, None]] = {}
    for layer, branch in zip(scores.layers, scores.branches):
        found.setdefault(type(model.get_submodule(entry.units[layer])).__name__, {})[branch] = None
    assert {kind: " ".join(names) for kind, names in found.items()} == FOUND[name]


def test_a_part_of_the_branches() -> None:
    model, inputs = BY_NAME["WanTransformer3DModel"].made()
    scores, every = attribute_layers(model, inputs, branches=["attn1"]), branches("WanTransformer3DModel", "auto")
    assert scores.names == ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
    np.testing.assert_allclose(scores.by_sample, every.by_sample[::3], rtol=1e-9)


def test_branches_of_an_iterator_are_those_of_a_list() -> None:
    model, inputs = BY_NAME["WanTransformer3DModel"].made()
    scores = attribute_layers(model, inputs, branches=iter(BRANCHES["WanTransformer3DModel"]))
    assert scores.names[:3] == ("blocks.0.attn1", "blocks.0.attn2", "blocks.0.ffn")
    with pytest.raises(TypeError, match=r"^batched: expected names of inputs that carry the samples, got 7$"):
        attribute_layers(model, inputs, batched=7)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (["attention"], ValueError, "no block has a module 'attention'; the modules of blocks.0 are: norm1, attn1"),
        (["norm1", "attn1", "attn2", "ffn"], ValueError, "norm1 changes nothing in what blocks.0 returns"),
        (["attn1.to_q", "attn2", "ffn"], ValueError, "blocks.0 does not add the result of blocks.0.attn1.to_q"),
        ([], TypeError, "names of modules inside the blocks"),
        (7, TypeError, "'auto' or names of modules inside the blocks"),
    ],
)
def test_what_is_no_branch_is_refused(given: Any, error: type[Exception], message: str) -> None:
    model, inputs = BY_NAME["WanTransformer3DModel"].made()
    with pytest.raises(error, match=message):
        attribute_layers(model, inputs, branches=given)
