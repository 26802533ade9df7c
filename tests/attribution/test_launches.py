"""What a probe asks of a CUDA device, without one: its launches on fake CUDA tensors, which have shapes and no values.

Anything that reads a value (`.item()`, a boolean index) raises there, so a probe that gets through is static.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agrepa_fast import AblationPlan, DiT, DiTConfig, attribute_layers
from agrepa_fast.attribution import native
from agrepa_fast.ops import dispatch

DEPTH, SAMPLES, FRAMES = 4, 3, 24
COPIES = ("aten::cat", "aten::clone", "aten::copy_", "aten::_to_copy", "aten::index_select", "aten::repeat")


class Launches(TorchDispatchMode):
    """Every operator with the shapes of its tensors, in order; views and other work of the host left out."""

    def __init__(self):
        super().__init__()
        self.log, self.to_host, self.values = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.name()).partition(".")[0]
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        try:
            result = func(*args, **(kwargs or {}))
        except DynamicOutputShapeException:
            self.values.append((name, tensors[0].device.type))
            raise
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"):
            self.values.append((name, tensors[0].device.type))
        if tensors and tensors[0].device.type == "cuda":
            if isinstance(result, torch.Tensor) and result.device.type == "cpu":
                self.to_host.append(name)
            elif not func.is_view and name not in ("prim::device", "aten::detach", "aten::_unsafe_view"):
                self.log.append((name, tuple(tuple(t.shape) for t in tensors)))
        return result


@pytest.fixture
def on_a_device(monkeypatch):
    """A network and a batch on fake CUDA tensors, with the ops on the path that a device takes."""
    monkeypatch.setattr(dispatch, "MODE", "triton")
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())  # needs a real device
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = DiT(DiTConfig(DEPTH, 32, 2, 8, 5, dropout=0.1, max_frames=FRAMES)).eval()
        yield (
            model,
            {
                "x_t": torch.randn(SAMPLES, FRAMES, 8, device="cuda"),
                "t": torch.rand(SAMPLES, device="cuda"),
                "cond": torch.randn(SAMPLES, FRAMES, 5, device="cuda"),
                "mask": torch.ones(SAMPLES, FRAMES, dtype=torch.bool, device="cuda"),
            },
        )


CHOICES = [(None, None), (None, ("attn", "ff")), ((1, 3), None), ((0,), ("ff",))]


@pytest.mark.parametrize("blocks, branches", CHOICES)
def test_the_launches_are_those_of_the_plan(on_a_device, blocks, branches):
    model, inputs = on_a_device
    plan = AblationPlan.build(DEPTH, blocks, branches)
    with Launches() as launches:
        native.measure(model, plan, inputs)
    kinds = Counter(name for name, _ in launches.log)
    assert kinds["agrepa_fast::layer_norm_modulate"] == 1
    assert kinds["agrepa_fast::gated_residual_norm"] == 2 * DEPTH - 1
    assert kinds["agrepa_fast::gated_residual"] == 1
    assert kinds["agrepa_fast::velocity_delta"] == 2  # the streams, and the control
    # Of attention; on fake tensors PyTorch writes it out, on a device it is one kernel.
    assert kinds["aten::_safe_softmax"] == DEPTH
    # qkv, out, up, down of each block; input, two of the time embedding, modulation, output.
    assert kinds["aten::addmm"] == 4 * DEPTH + 5
    # x_t with cond, the control, sample of each sequence, time, results: none where a stream enters.
    assert kinds["aten::cat"] == 5
    # The stream stack is never copied. Of one stream, the baseline, its state is kept over a unit of several branches.
    residual = [(name, shapes) for name, shapes in launches.log if shapes[0][1:] == (FRAMES, 32)]
    copies = [(name, *shapes) for name, shapes in residual if name in COPIES]
    kept = sum(unit.stop - unit.start > 1 for unit in plan.units)
    state = (SAMPLES, FRAMES, 32)
    assert copies == [("aten::cat", (1, FRAMES, 32), state)] + kept * [("aten::clone", state)]
    assert launches.to_host == []
    assert launches.values == []
    # The rows of every branch and every op: the control, and the streams that have joined.
    rows = [1 + SAMPLES * plan.active(i) for i in range(2 * DEPTH)]
    down = [shapes[1] for name, shapes in launches.log if name == "aten::addmm" and (128, 32) in shapes]
    assert [shape[0] // FRAMES for shape in down[1:]] == rows[1::2]  # the first is the time embedding's
    closed = [shapes for name, shapes in launches.log if name.startswith("agrepa_fast::gated_residual")]
    assert [shapes[1][0] for shapes in closed] == rows
    # The op reads the streams as they are and the one that enters where it is, and writes them together.
    joins = [any(unit.stop == i + 1 for unit in plan.units) for i in range(2 * DEPTH)]
    assert [shapes[0][0] for shapes in closed] == rows
    assert [shapes[-1] == state for shapes in closed] == joins
    # Modulation is indexed by sample, never repeated for the streams.
    assert {shapes[2] for shapes in closed} == {(SAMPLES, 32)}


@pytest.mark.parametrize("engine", ["prefix", "stacked", "loop"])
@pytest.mark.parametrize("max_samples", [None, 2])
def test_one_copy_to_the_host_and_no_other_question(on_a_device, engine, max_samples):
    """The whole of attribute_layers; it ends where the host looks at the numbers, which fake tensors do not have."""
    model, inputs = on_a_device
    with Launches() as launches, pytest.raises(DynamicOutputShapeException):
        attribute_layers(model, inputs, domains=["a", "b", "a"], engine=engine, max_samples=max_samples)
    assert len(launches.to_host) == 1
    assert launches.values == [("aten::nonzero", "cpu")]  # the check for numbers that are not finite


def test_a_question_to_the_device_would_be_found(on_a_device):
    model, inputs = on_a_device
    model.branches[2].register_forward_hook(lambda *_: inputs["mask"].nonzero())
    with Launches() as launches, pytest.raises(DynamicOutputShapeException):
        attribute_layers(model, inputs, engine="prefix")
    assert launches.values == [("aten::nonzero", "cuda")]


def test_the_same_plan_and_shapes_make_the_same_launches(on_a_device):
    model, inputs = on_a_device
    plan, logs = AblationPlan.build(DEPTH), []
    for _ in range(2):
        with Launches() as launches:
            native.measure(model, plan, {name: value.clone() for name, value in inputs.items()})
        logs.append(launches.log)
    assert logs[0] == logs[1]
