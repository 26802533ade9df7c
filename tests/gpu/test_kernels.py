"""What only a CUDA device can show: compiled == eager, graph capture, no host sync, the same bits, large tensors.

The values themselves are tested in tests/kernels/values, which runs on the device where there is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from agrepa_fast import graphs, ops, reference
from agrepa_fast.ops import dispatch
from agrepa_fast.reference import cosine, pooling, residual  # noqa: F401 (attributes of `reference`)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "MODE", "triton")


def inputs(rows=4, frames=256, width=1152, dtype=torch.bfloat16, seed=0, device="cuda"):
    """x, branch, gate, shift, scale, projection and target; the modulation is float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    x, branch = randn(rows, frames, width, dtype=dtype), randn(rows, frames, width, dtype=dtype)
    gate, shift, scale = randn(rows, 3 * width).chunk(3, dim=1)
    projection = randn(2 * width, width, dtype=dtype) / width**0.5
    return x, branch, gate, shift, scale, projection, randn(rows, frames, 2 * width)


def step(x, branch, gate, shift, scale, projection, target):
    """Every op, forward and backward: the residual stream, both poolings and both cosine losses."""
    leaves = [v.detach().requires_grad_() for v in (x, branch, gate, shift, scale, projection)]
    x, branch, gate, shift, scale, projection = leaves
    rows, frames = x.shape[:2]
    index = torch.arange(rows, device=x.device)
    s = torch.linspace(0, 1, rows, device=x.device).requires_grad_()
    mask = torch.arange(frames, device=x.device) < frames - index[:, None]
    h = ops.layer_norm_modulate(x, shift, scale, norm="rms")
    x, h = ops.gated_residual_norm(x, branch + h, gate, shift, scale, stream_scale=s, sample_index=index.flip(0))
    x = ops.gated_residual(x, h, gate)
    change, energy = ops.velocity_delta(torch.stack([x, h]), mask)
    pooled = ops.masked_mean(x, mask)
    loss = pooled.float().square().sum() + change.sum() + energy.sum()
    loss = loss + ops.projection_cosine_loss(h, projection, None, target, mask=mask, reduction="sum")
    loss = loss + ops.cosine_loss(x, target[..., : x.shape[-1]], mask=mask)
    return [loss, *torch.autograd.grad(loss, [*leaves, s])]


def check_tails(rows, frames, width, dtype, device):
    """The last rows of every op on a tensor, against float64: forward of all, backward of the residual stream."""
    x = torch.randn(rows, frames, width, device=device, dtype=dtype)
    gate, shift, scale = torch.randn(rows, 3 * width, device=device).chunk(3, dim=1)
    tail = slice(frames - 4, frames)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    x_new, h = ops.gated_residual_norm(x, x, gate, shift, scale)
    wide = x[-1:, tail].double()
    modulation = (value[-1:].double() for value in (gate, shift, scale))
    expected = reference.residual.gated_residual_norm(wide, wide, *modulation)
    for found, wanted in zip((x_new, h), expected):
        torch.testing.assert_close(found[-1:, tail].double(), wanted, **close)
    del x_new, h
    if dtype == torch.bfloat16:  # a mean over many frames is small: its own size is the scale
        mean = ops.masked_mean(x[:, -1000:])
        wanted = reference.pooling.masked_mean(x[-1:, -1000:].double())[0]
        torch.testing.assert_close(mean[-1].double(), wanted, rtol=1e-2, atol=1e-3)
    target = x[-1, tail].clone()
    rows_lost = ops.cosine_loss(x, x.roll(1, -1), reduction="none")[-1, tail]
    wanted = reference.cosine.cosine_loss(target.double(), target.roll(1, -1).double(), reduction="none")
    torch.testing.assert_close(rows_lost.double(), wanted, **close)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.gated_residual(leaf, leaf.detach(), gate).sum(), leaf)
    assert torch.equal(grad[-1, tail], torch.ones_like(target))


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
def test_compiled_equals_eager(mode) -> None:
    """By inductor, forward and backward; float32, so that fusing around the ops does not round differently."""
    arguments = inputs(dtype=torch.float32)
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    for one, other in zip(step(*arguments), torch.compile(step, mode=mode)(*arguments)):
        scale = one.abs().max()
        torch.testing.assert_close(other / scale, one / scale, rtol=1e-3, atol=1e-4)


def test_graph_replay_with_changed_inputs() -> None:
    static = inputs()
    device = torch.device("cuda", torch.cuda.current_device())
    graphs.run_aside(lambda: step(*static), device)
    recording = graphs.Recording(lambda: step(*static), device)
    for seed in (1, 2):
        fresh = inputs(seed=seed)
        for kept, value in zip(static, fresh):
            kept.copy_(value)
        recording.replay()
        for one, other in zip(recording.output, step(*fresh)):
            assert torch.equal(one, other)


def test_no_host_sync() -> None:
    arguments = inputs()
    step(*arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
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
    assert rows * frames * width > 2**31
    if torch.cuda.mem_get_info()[0] < 8 * rows * frames * width * 2:
        pytest.skip("not enough device memory")
    check_tails(rows, frames, width, torch.bfloat16, "cuda")


def test_compute_sanitizer() -> None:
    """No access outside its tensor, at widths that leave lanes masked."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("device_tests", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.dispatch.MODE = "triton"
for width in (72, 760, 1500):
    module.step(*module.inputs(3, 7, width))
torch.cuda.synchronize()
"""
    command = [sanitizer, "--error-exitcode", "9", sys.executable, "-c", code]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or neighbours in a block look like one tensor
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_the_second_device_of_a_machine() -> None:
    """Kernels run where their tensors are, not on the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    arguments = inputs()
    elsewhere = [value.to("cuda:1") for value in arguments]
    for one, other in zip(step(*arguments), step(*elsewhere)):
        torch.testing.assert_close(one, other.to("cuda:0"), rtol=2e-2, atol=2e-2)
