"""`masked_mean` and `velocity_delta` kernels against float64: outputs and gradients, through the public ops."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import ops
from agrepa_fast.kernels import launch
from agrepa_fast.kernels import pooling as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lengths_mask(device, frames, *lengths):
    return torch.arange(frames, device=device) < torch.tensor(lengths, device=device)[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_mean(bench, device, dtype, masked) -> None:
    x = torch.randn(3, 70, 100, device=device, dtype=dtype) + 0.5
    bench.check_pooling(ops.masked_mean, x, lengths_mask(device, 70, 70, 33, 0) if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_velocity_delta(bench, device, dtype, masked) -> None:
    v = torch.randn(4, 3, 20, 10, device=device, dtype=dtype) + 0.5
    bench.check_pooling(ops.velocity_delta, v, lengths_mask(device, 20, 20, 7, 0) if masked else None)


def test_velocity_delta_in_many_tiles(bench, device, monkeypatch) -> None:
    """Several programs of several tiles per sample, the last one ragged."""
    config = launch.LaunchConfig(block_t=2, num_warps=4, programs=4)
    monkeypatch.setattr(kernels, "configuration", lambda *_: config)
    v = torch.randn(3, 2, 11, 10, device=device) + 0.5
    bench.check_pooling(ops.velocity_delta, v, lengths_mask(device, 11, 11, 6))


def test_a_mask_with_holes_and_strides(bench, device) -> None:
    mask = torch.rand(70, 2, generator=torch.Generator().manual_seed(0)).to(device).t() < 0.5
    x = torch.randn(70, 2, 20, device=device).transpose(0, 1)
    bench.check_pooling(ops.masked_mean, x, mask)
    v = torch.randn(3, 2, 20, 70, device=device).transpose(-1, -2)
    bench.check_pooling(ops.velocity_delta, v, mask)


def test_only_a_baseline(bench, device) -> None:
    v = torch.randn(1, 2, 3, 5, device=device)
    change, energy = ops.velocity_delta(v)
    assert change.shape == (0, 2)
    torch.testing.assert_close(energy, v[0].square().mean(dim=(-2, -1)))


def test_the_two_gradients_apart(device) -> None:
    v = torch.randn(3, 2, 4, 5, device=device, dtype=torch.float64).requires_grad_()
    change, energy = ops.velocity_delta(v)
    (grad,) = torch.autograd.grad(energy.sum(), v, retain_graph=True)
    torch.testing.assert_close(grad[0], 2 * v[0].detach() / 20)
    assert not grad[1:].any()
    (grad,) = torch.autograd.grad(change.sum(), v)
    expected = 2 * (v[1:] - v[0]).detach() / 20
    torch.testing.assert_close(grad[1:], expected)
    torch.testing.assert_close(grad[0], -expected.sum(dim=0))


def test_gradcheck(device) -> None:
    mask = lengths_mask(device, 4, 4, 2)
    x = torch.randn(2, 4, 3, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.masked_mean, (x, mask), fast_mode=True)
    v = torch.randn(3, 2, 4, 3, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.velocity_delta, (v, mask), fast_mode=True)
