"""What only a CUDA device can show: compiled == eager, graph capture, no host sync, the same bits, large tensors.

The values themselves are tested in tests/kernels/values, which runs on the device where there is one.
"""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import ops
from agrepa_fast.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "MODE", "triton")


def inputs(rows=4, frames=256, width=1152, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    x, branch = randn(rows, frames, width, dtype=dtype), randn(rows, frames, width, dtype=dtype)
    gate, shift, scale = randn(rows, 3 * width).chunk(3, dim=1)
    return x, branch, gate, shift, scale


def step(x, branch, gate, shift, scale):
    """Every op of the residual stream and both poolings, forward and backward."""
    leaves = [v.detach().requires_grad_() for v in (x, branch, gate, shift, scale)]
    x, branch, gate, shift, scale = leaves
    h = ops.layer_norm_modulate(x, shift, scale)
    x, h = ops.gated_residual_norm(x, branch + h, gate, shift, scale)
    x = ops.gated_residual(x, h, gate)
    change, energy = ops.velocity_delta(torch.stack([x, h]))
    loss = ops.masked_mean(x).float().square().sum() + change.sum() + energy.sum()
    return [loss, *torch.autograd.grad(loss, leaves)]


def test_compiled_equals_eager() -> None:
    arguments = inputs()
    torch._dynamo.reset()
    for one, other in zip(step(*arguments), torch.compile(step)(*arguments)):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_graph_replay_with_changed_inputs() -> None:
    static = inputs()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*static)
    for seed in (1, 2):
        fresh = inputs(seed=seed)
        for kept, value in zip(static, fresh):
            kept.copy_(value)
        graph.replay()
        for one, other in zip(outputs, step(*fresh)):
            assert torch.equal(one, other)


def test_no_host_sync() -> None:
    arguments = inputs()
    step(*arguments)  # compiles
    index = torch.arange(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
        ops.layer_norm_modulate(arguments[0], arguments[3], arguments[4], sample_index=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_in_ten_runs() -> None:
    arguments = inputs(rows=8, frames=938)
    first = step(*arguments)
    for _ in range(9):
        for one, other in zip(first, step(*arguments)):
            assert torch.equal(one, other)


def test_more_elements_than_int32_counts() -> None:
    """2^31 elements and some: the last rows must be right."""
    rows, frames, width = 3, 700_000, 1024
    if torch.cuda.mem_get_info()[0] < 5 * rows * frames * width * 2:
        pytest.skip("not enough device memory")
    x = torch.randn(rows, frames, width, device="cuda", dtype=torch.bfloat16)
    gate, shift, scale = torch.randn(rows, 3 * width, device="cuda").chunk(3, dim=1)
    x_new, h = ops.gated_residual_norm(x, x, gate, shift, scale)
    tail = slice(frames - 4, frames)
    expected = x[-1, tail].double() * (1 + gate[-1].double())
    torch.testing.assert_close(x_new[-1, tail].double(), expected, rtol=1e-2, atol=1e-2)
    normed = torch.nn.functional.layer_norm(expected, (width,), eps=1e-6)
    expected = normed * (1 + scale[-1].double()) + shift[-1].double()
    torch.testing.assert_close(h[-1, tail].double(), expected, rtol=2e-2, atol=2e-2)


def test_the_second_device_of_a_machine() -> None:
    """Kernels run where their tensors are, not on the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    arguments = inputs()
    elsewhere = [value.to("cuda:1") for value in arguments]
    for one, other in zip(step(*arguments), step(*elsewhere)):
        torch.testing.assert_close(one, other.to("cuda:0"), rtol=2e-2, atol=2e-2)
