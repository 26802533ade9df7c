"""Exports against the objects that take them: diffusers' layer skip, peft's LoRA; files, and mistakes in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import peft
import pytest
import torch
from diffusers.hooks import apply_layer_skip

from agrepa_fast import LayerScores, LayerSelection, attribute_layers, export, select_layers

from .catalogue.entry import call, plain, switched_off, velocity
from .catalogue.page import ENTRIES

BY_NAME = {entry.name: entry for entry in ENTRIES}
FLUX = [f"transformer_blocks.{i}" for i in (4, 0)] + ["single_transformer_blocks.7"]


def scores(mean, t=None, layers=None):
    """Scores of blocks whose means are `mean` [U], or [U, N] with t [N]."""
    by_sample = torch.tensor(mean, dtype=torch.float64)
    by_sample = by_sample if by_sample.dim() == 2 else by_sample[:, None]
    times = None if t is None else torch.tensor(t)
    return LayerScores(tuple(layers or range(len(mean))), by_sample, t=times)


@pytest.mark.parametrize(
    "name, off",
    [
        ("WanTransformer3DModel", ["blocks.0", "blocks.2"]),
        ("DiTTransformer2DModel", ["transformer_blocks.1", "transformer_blocks.0"]),
        ("CogVideoXTransformer3DModel", ["transformer_blocks.1", "transformer_blocks.2"]),
        ("HunyuanVideoTransformer3DModel", ["transformer_blocks.1", "single_transformer_blocks.0"]),
        ("LatteTransformer3DModel", ["temporal_transformer_blocks.0", "transformer_blocks.1"]),
    ],
)
def test_layer_skip_is_the_ablation_of_these_blocks(name, off):
    entry = BY_NAME[name]
    model, inputs = entry.made()
    with plain(), contextlib.ExitStack() as stack:
        for block in off:
            stack.enter_context(switched_off(entry, model, block))
        expected = velocity(entry, call(model, inputs))
    for config in export.layer_skip(off, model):
        apply_layer_skip(model, config)
    with plain():
        assert torch.equal(velocity(entry, call(model, inputs)), expected)


def test_layer_skip_changes_the_velocity_by_the_score():
    entry = BY_NAME["WanTransformer3DModel"]
    model, inputs = entry.made()
    measured = attribute_layers(model, inputs)
    with plain():
        base = velocity(entry, call(model, inputs)).flatten(1)
        (config,) = export.layer_skip(["blocks.1"], model)
        apply_layer_skip(model, config)
        changed = velocity(entry, call(model, inputs)).flatten(1)
    ratio = (changed - base).square().mean(1).add(1e-8).sqrt() / (base.square().mean(1) + 1e-8).sqrt()
    torch.testing.assert_close(measured.by_sample[1], ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name, block, reason",
    [
        (
            "SD3Transformer2DModel",
            "transformer_blocks.1",
            r"exchange the two streams.*give SD3Transformer2DModel skip_layers=\[1\] instead",
        ),
        ("FluxTransformer2DModel", "transformer_blocks.1", "exchange the two streams"),
        ("SanaTransformer2DModel", "transformer_blocks.1", "has no rule for SanaTransformerBlock"),
        ("ZImageTransformer2DModel", "layers.1", "argument hidden_states"),
        ("WanTransformer3DModel", "blocks.3", "has 3 blocks there"),
        ("WanTransformer3DModel", "layers.0", "no module list 'layers'"),
    ],
)
def test_what_diffusers_would_skip_wrongly_is_refused(name, block, reason):
    model, _ = BY_NAME[name].made()
    with pytest.raises(ValueError, match=reason):
        export.layer_skip([block], model)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_the_refused_classes_are_indeed_skipped_wrongly(name):
    """A newer diffusers that skips them right makes this fail: then lift the refusal."""
    from diffusers.hooks import LayerSkipConfig

    entry = BY_NAME[name]
    model, inputs = entry.made()
    with plain(), switched_off(entry, model, "transformer_blocks.1"):
        expected = velocity(entry, call(model, inputs))
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
    with plain():
        try:
            wrong = velocity(entry, call(model, inputs))
        except RuntimeError:
            return
    assert wrong.shape != expected.shape or not torch.allclose(wrong, expected)


LORA = [
    ("FluxTransformer2DModel", ["transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.2"]),
    ("WanTransformer3DModel", ["blocks.0", "blocks.2"]),
]


@pytest.mark.parametrize("name, blocks", LORA)
def test_lora_is_put_on_exactly_these_blocks(name, blocks):
    model, _ = BY_NAME[name].made()
    config = peft.LoraConfig(r=2, **export.lora_layers(blocks, ["to_q", "to_k"], model))
    assert adapted(peft.get_peft_model(model, config)) == set(blocks)


def test_lora_by_index():
    model, _ = BY_NAME["WanTransformer3DModel"].made()
    options = export.lora_layers(["blocks.2", "blocks.0"], ["to_q"], model, by_index=True)
    assert options == {"target_modules": ["to_q"], "layers_to_transform": [0, 2], "layers_pattern": ["blocks"]}
    assert adapted(peft.get_peft_model(model, peft.LoraConfig(r=2, **options))) == {"blocks.0", "blocks.2"}
    with pytest.raises(ValueError, match="by_index: one list of ids"):
        export.lora_layers(FLUX, ["to_q"], by_index=True)


def adapted(model):
    """Blocks of the model inside that hold an adapter."""
    names = (name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_A" in name)
    return {".".join(name.split(".")[:2]) for name in names}


def test_lora_on_what_the_model_lacks():
    model, _ = BY_NAME["WanTransformer3DModel"].made()
    with pytest.raises(ValueError, match=r"modules: blocks\.1 has none of qkv"):
        export.lora_layers(["blocks.1"], ["qkv"], model)
    with pytest.raises(ValueError, match="has 3 blocks there"):
        export.lora_layers(["blocks.5"], ["to_q"], model)


def test_block_ids():
    assert export.block_ids(FLUX) == {"transformer_blocks": [0, 4], "single_transformer_blocks": [7]}
    assert export.block_ids(["down_blocks.0.1.0"]) == {"down_blocks.0.1": [0]}


@pytest.mark.parametrize(
    "blocks, error, message",
    [
        ("blocks.1", TypeError, "sequence of names"),
        ([], ValueError, "at least one"),
        ([3], ValueError, "all of them text"),
        (["blocks"], ValueError, "'blocks' is no block"),
        (["3"], ValueError, "'3' is no block"),
        (["a.1", "a.1"], ValueError, "'a.1' occurs twice"),
    ],
)
def test_mistakes_with_names(blocks, error, message):
    with pytest.raises(error, match=message):
        export.block_ids(blocks)


def test_lowest_in_the_order_of_the_forward():
    measured = scores([0.5, 0.1, 0.3, 0.1], layers=(0, 1, 2, 3))
    assert export.lowest(measured, 1) == ("branches.6", "branches.7")  # of equal ones the deeper
    assert export.lowest(measured, 3) == tuple(f"branches.{i}" for i in range(2, 8))
    with pytest.raises(ValueError, match="k: expected 1 to 4 blocks, got 5"):
        export.lowest(measured, 5)


def test_skip_lists_by_time():
    measured = scores([[0.9, 0.1, 0.5], [0.1, 0.9, 0.2]], t=[0.0, 0.5, 1.0])
    first, second = ("branches.0", "branches.1"), ("branches.2", "branches.3")
    assert export.skip_lists(measured, 1) == {0.0: second, 0.5: first, 1.0: second}
    assert export.skip_lists(measured, 1, [0.1, 0.4, 0.8]) == {0.1: second, 0.4: first, 0.8: second}
    with pytest.raises(ValueError, match="have no t"):
        export.skip_lists(scores([0.1, 0.2]), 1)


def named(mean, names):
    by_sample = torch.tensor(mean, dtype=torch.float64)[:, None]
    return LayerScores(tuple(range(len(mean))), by_sample, names=tuple(names))


@pytest.mark.parametrize(
    "measured, selection, blocks",
    [
        (scores([0.5, 0.1, 0.3]), LayerSelection.uniform([0, 2]), {"branches": [0, 1, 4, 5]}),
        (
            named([0.5, 0.1, 0.3], ["a.0", "a.1", "b.0"]),
            LayerSelection.uniform([0, 2]).named({0: "a.0", 2: "b.0"}),
            {"a": [0], "b": [0]},
        ),
    ],
    ids=["DiT", "another model"],
)
def test_json_is_read_back_as_a_selection(tmp_path, measured, selection, blocks):
    assert export.block_ids(selection) == blocks
    assert export.positions(selection, measured) == [0, 2]
    export.to_json(tmp_path / "blocks.json", selection, measured)
    assert dataclasses.replace(LayerSelection.from_json(tmp_path / "blocks.json"), method="fixed") == selection
    assert json.loads((tmp_path / "blocks.json").read_text())["blocks"] == blocks
    assert export.block_ids(select_layers(measured, 2)) == blocks
    with pytest.raises(ValueError, match=r"'c\.9' has no score"):
        export.positions(["c.9"], measured)


@pytest.mark.parametrize(
    "name, branches",
    [("WanTransformer3DModel", "auto"), ("SD3Transformer2DModel", ["parts"]), ("f5_tts UNetT", ["parts"])],
)
def test_scores_of_branches_and_streams_are_exported_as_their_blocks(name, branches, tmp_path):
    entry = BY_NAME[name]
    model, inputs = entry.made()
    measured = attribute_layers(model, inputs, branches=branches)
    sums = [0.0] * len(entry.units)
    for layer, mean in zip(measured.layers, measured.mean.tolist()):
        sums[layer] += mean
    expected = [entry.units[layer] for layer in sorted(sorted(range(len(sums)), key=lambda layer: sums[layer])[:2])]
    chosen = export.lowest(measured, k=2)
    assert list(chosen) == expected
    list_name = entry.units[0].rpartition(".")[0]
    assert export.block_ids(chosen) == {list_name: [int(block.rpartition(".")[2]) for block in expected]}
    assert all(set(blocks) <= set(entry.units) for blocks in export.skip_lists(measured, k=1).values())
    export.to_json(tmp_path / "blocks.json", chosen, measured)
    read = LayerSelection.from_json(tmp_path / "blocks.json")
    assert list(read.modules(model)) == expected
