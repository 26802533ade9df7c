"""Buffers of public modules: the same values after `.half()`, `.to(dtype)` and a way over the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from agrepa_fast import AlignmentLoss, DiT, DiTConfig, LayerSelection, SimilarityStop
from agrepa_fast.models.conditioning import TokenConditioner

CHOSEN = LayerSelection((0, 2), (0.62287, 0.37713))  # bfloat16 would make 0.6211 of the first


def network():
    return DiT(DiTConfig(depth=1, width=8, heads=2, mels=3, cond=0, dropout=0.0, max_frames=600))


def loss(pool="mean"):
    loss_fn = AlignmentLoss(6, {"speech": 5}, LayerSelection.uniform(range(3)), pool)
    loss_fn.select(CHOSEN)
    return loss_fn


def frame_wise():
    return loss(None)


def by_time():
    return AlignmentLoss(6, {"speech": 5}, LayerSelection.by_time((0.1, 0.9), {0: (0.12345, 0.2), 2: (0.3, 0.1)}))


def stop():
    module = SimilarityStop(0.9, momentum=0.99)
    if not module.mean.is_meta:
        module(torch.tensor(0.123456))
    return module


def conditioner():
    return TokenConditioner({"s3": 7, "as": 5}, 4)


MODULES = [network, loss, frame_wise, by_time, stop, conditioner]


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def same(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = buffers(module)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("build", MODULES)
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.bfloat16().float(),
        lambda module: nn.Sequential(module).to(torch.bfloat16)[0],
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.to_empty(device="cpu"),
        lambda module: copy.deepcopy(module).half(),
        lambda module: module.share_memory(),
    ],
    ids=["bfloat16", "half", "double", "back", "inside", "both", "to_empty", "copy", "shared"],
)
def test_a_change_of_dtype_or_memory_leaves_the_buffers(build, change):
    module = build()
    expected = buffers(module)
    same(change(module), expected)


@pytest.mark.parametrize("build", MODULES)
def test_a_module_from_the_meta_device_has_its_buffers(build):
    with torch.device("meta"):
        module = build()
    assert all(value.is_meta for value in module.buffers())
    expected = buffers(stop_at_start() if build is stop else build())
    same(module.to_empty(device="cpu"), expected)


def stop_at_start():
    return SimilarityStop(0.9, momentum=0.99)


def test_parameters_are_converted_as_ever():
    for build in MODULES:
        module = build().to(torch.bfloat16)
        assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_heads_has_the_exact_weights(pool, dtype):
    loss_fn = loss(pool).to(dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = {layer: torch.randn(2, 4, 6, generator=generator, dtype=torch.float32).to(dtype) for layer in range(3)}
    targets = {"speech": torch.randn(*((2, 5) if pool else (2, 4, 5)), generator=generator).to(dtype)}
    total, metrics = loss_fn(hidden, targets)
    by_layer = {layer: 1 - metrics[f"cosine/speech/{layer}"].double() for layer in CHOSEN.layers}
    expected = sum(weight * by_layer[layer] for layer, weight in zip(CHOSEN.layers, CHOSEN.weights))
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_loaded_by_assignment_are_float32():
    state = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in loss().state_dict().items()
    }
    with torch.device("meta"):
        module = loss()
    module.load_state_dict(state, assign=True)
    assert module.weights.dtype == torch.float32
    assert state["layer_weights.speech.weights"].dtype == torch.bfloat16


def test_a_network_in_bfloat16_reads_its_time_in_float32():
    """Times of 0.5 and 0.501 are one number in bfloat16; their embeddings differ."""
    torch.manual_seed(0)
    model = network().to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 4, 3, dtype=torch.bfloat16).expand(2, -1, -1)
    velocity, _ = model(x, torch.tensor([0.5, 0.501]))
    assert velocity.dtype == torch.bfloat16
    assert not velocity[0].equal(velocity[1])
