"""A probe as a CUDA graph on a device: capture and replay, no host sync but the one copy, memory as the plan says."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

from agrepa_fast import AblationPlan, DiT, DiTConfig, attribute_layers
from agrepa_fast.attribution import graph, native
from agrepa_fast.attribution.plan import Sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEPTH, WIDTH, HEADS, MELS, FRAMES, SAMPLES = 6, 256, 4, 40, 192, 3


def build(dtype=torch.float32, seed=0) -> DiT:
    torch.manual_seed(seed)
    model = DiT(DiTConfig(DEPTH, WIDTH, HEADS, MELS, 0, 4, 0.1, FRAMES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model.to("cuda", dtype)


def draw(dtype=torch.float32, seed=0, samples=SAMPLES, masked=True):
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x_t": torch.randn(samples, FRAMES, MELS, generator=generator).to(dtype),
        "t": torch.rand(samples, generator=generator).to(dtype),
    }
    if masked:
        inputs["mask"] = torch.arange(FRAMES) < torch.tensor([FRAMES, 150, 100])[:samples, None]
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [None, ("attn", "ff")])
def test_a_replay_equals_the_eager_engine(dtype, branches) -> None:
    """Also with new inputs, and with weights that changed in place since the capture."""
    model = build(dtype)
    for seed in range(3):
        inputs = draw(dtype, seed)
        replayed = attribute_layers(model, inputs, branches=branches, engine="graph")
        eager = attribute_layers(model, inputs, branches=branches, engine="prefix")
        assert torch.equal(replayed.by_sample, eager.by_sample)
        assert torch.equal(replayed.noise_by_sample, eager.noise_by_sample)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    assert len(graph._GRAPHS[model]) == 1


def test_under_autocast_a_replay_sees_changed_weights() -> None:
    """A cached bfloat16 copy of a weight would not."""
    model, inputs = build(), draw()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            replayed = attribute_layers(model, inputs, engine="graph")
            eager = attribute_layers(model, inputs, engine="prefix")
        assert torch.equal(replayed.by_sample, eager.by_sample)
        with torch.no_grad():
            model.branches[0].qkv.weight.mul_(1.5)


def test_auto_is_the_graph() -> None:
    model, inputs = build(), draw()
    attribute_layers(model, inputs)
    assert len(graph._GRAPHS[model]) == 1


def test_no_sync_in_a_replay() -> None:
    model, plan = build(), AblationPlan.build(DEPTH)
    inputs, other = draw(), draw(seed=1)

    def run(static):
        return native.measure(model.eval(), plan, static)

    with torch.no_grad():
        graph.replayed(model, plan, inputs, run)
        torch.cuda.set_sync_debug_mode("error")
        try:
            replayed = graph.replayed(model, plan, other, run)
            eager = run(other)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(replayed, eager)


@pytest.mark.parametrize("engine", ["graph", "prefix"])
def test_one_copy_to_the_host_in_a_probe(engine) -> None:
    model, inputs = build(), draw()
    attribute_layers(model, inputs, engine=engine)  # captures, compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attribute_layers(model, inputs, engine=engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


def test_graphs_are_bounded_and_die_with_their_model() -> None:
    model, inputs = build(), draw()
    for layer in range(DEPTH):
        attribute_layers(model, inputs, [layer], engine="graph")
    assert len(graph._GRAPHS[model]) == graph.CAPACITY < DEPTH
    before = len(graph._GRAPHS)
    del model
    gc.collect()
    assert len(graph._GRAPHS) == before - 1


def test_the_peak_stays_below_the_plan() -> None:
    """The plan reckons with plain PyTorch between the branches; the kernels need less."""
    model, inputs = build(torch.bfloat16), draw(torch.bfloat16)
    attribute_layers(model, inputs, engine="prefix")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attribute_layers(model, inputs, engine="prefix")
    sizes = Sizes(FRAMES, WIDTH, 4, MELS, HEADS, 2, masked=True)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.1 * AblationPlan.build(DEPTH).peak_bytes(sizes, SAMPLES)
