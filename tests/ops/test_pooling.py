"""masked_mean and velocity_delta against loops in float64, and what padding must not change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from agrepa_fast import ops

MASK = torch.tensor([[True, True, False, True, False], [False] * 5, [True] * 5])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mean_by_loop(x, mask=None, mutant=None):
    """[B, T, D] -> [B, D]: sum of the valid frames over their number."""
    x = x.double().numpy()
    out = np.zeros((x.shape[0], x.shape[2]))
    for b in range(x.shape[0]):
        frames = [t for t in range(x.shape[1]) if mask is None or mutant == "mask ignored" or mask[b, t]]
        for t in frames:
            out[b] += x[b, t] / (x.shape[1] if mutant == "over all frames" else len(frames))
    return out


def delta_by_loop(velocity, mask=None, mutant=None):
    """[S, B, T, M] -> [S - 1, B], [B]: mean squared change against stream 0, and stream 0's mean square."""
    v = velocity.double().numpy()
    streams, batch, frames, bins = v.shape
    change, energy = np.zeros((streams - 1, batch)), np.zeros(batch)
    for b in range(batch):
        valid = [t for t in range(frames) if mask is None or mutant == "mask ignored" or mask[b, t]]
        count = len(valid) if mutant == "over frames" else len(valid) * bins
        for t, m in itertools.product(valid, range(bins)):
            energy[b] += v[0, b, t, m] ** 2 / count
            for s in range(1, streams):
                base = v[s - 1 if mutant == "previous stream" else 0, b, t, m]
                change[s - 1, b] += (v[s, b, t, m] - base) ** 2 / count
    return change, energy


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_masked_mean_equals_the_loop(mask, dtype, atol):
    x = randn(3, 5, 7, dtype=dtype) + 2
    got = ops.masked_mean(x, mask)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), mean_by_loop(x, mask), rtol=0, atol=atol)


@pytest.mark.parametrize("mutant", ["mask ignored", "over all frames"])
def test_wrong_masked_means_are_told_apart(mutant):
    x = randn(3, 5, 7) + 2
    assert np.abs(ops.masked_mean(x, MASK).numpy() - mean_by_loop(x, MASK, mutant)).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_masked_mean_accumulates_wide(dtype, masked):
    """2048 frames of 100: the sum overflows float16 and stalls in bfloat16; the mean is rounded once."""
    x = (randn(2, 2048, 4) + 100).to(dtype)
    mask = torch.arange(2048).expand(2, -1) < 2000 if masked else None
    truth = torch.from_numpy(mean_by_loop(x, mask))
    got = ops.masked_mean(x, mask)
    assert got.dtype == dtype
    assert ((got.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * 1.001 * truth).all()


@pytest.mark.parametrize("mask", [None, MASK[[0, 2]]])
def test_gradients(mask):
    assert torch.autograd.gradcheck(lambda x: ops.masked_mean(x, mask), [randn(2, 5, 3).requires_grad_()])
    assert torch.autograd.gradcheck(lambda v: ops.velocity_delta(v, mask), [randn(3, 2, 5, 3).requires_grad_()])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_changes_nothing(junk):
    x = torch.where(MASK.unsqueeze(-1), randn(3, 5, 7, dtype=torch.float32), junk).requires_grad_()
    clean = torch.where(MASK.unsqueeze(-1), x.detach(), 0)
    pooled = ops.masked_mean(x, MASK)
    assert torch.equal(pooled, ops.masked_mean(clean, MASK))
    assert (pooled[1] == 0).all()  # no valid frame
    pooled.sum().backward()
    expected = MASK.float() / MASK.sum(1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(x.grad, expected.unsqueeze(-1).expand_as(x), rtol=0, atol=1e-7)

    velocity = randn(4, 3, 5, 2, dtype=torch.float32)
    dirty = torch.where(MASK.unsqueeze(-1), velocity, junk).requires_grad_()
    change, energy = ops.velocity_delta(dirty, MASK)
    for got, expected in zip((change, energy), ops.velocity_delta(velocity, MASK)):
        assert torch.equal(got, expected)
    (change.sum() + energy.sum()).backward()
    assert (dirty.grad[:, ~MASK] == 0).all()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_velocity_delta_equals_the_loop(mask, dtype, rtol):
    velocity = randn(4, 3, 5, 6, dtype=dtype)
    for got, expected in zip(ops.velocity_delta(velocity, mask), delta_by_loop(velocity, mask)):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("mutant", ["mask ignored", "previous stream", "over frames"])
def test_wrong_velocity_deltas_are_told_apart(mutant):
    velocity = randn(4, 3, 5, 6)
    change, _ = ops.velocity_delta(velocity, MASK)
    assert np.abs(change.numpy() - delta_by_loop(velocity, MASK, mutant)[0]).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_velocities_are_compared_in_float32(dtype):
    """The difference and its square never exist in half precision, where 1e-4 squared is 0 (float16)."""
    base = randn(2, 5, 6)
    velocity = torch.stack([base, base * 1.01, base]).to(dtype)
    velocity[2] += 1e-4 if dtype == torch.float16 else 0.0
    change, energy = ops.velocity_delta(velocity)
    assert change.dtype == energy.dtype == torch.float32
    expected_change, expected_energy = delta_by_loop(velocity)
    np.testing.assert_allclose(change.numpy(), expected_change, rtol=1e-6, atol=0)
    np.testing.assert_allclose(energy.numpy(), expected_energy, rtol=1e-6, atol=0)


def test_bad_input_is_named():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"x: expected a non-empty \[batch, time, width\], got \[2, 3\]"):
        ops.masked_mean(x[..., 0])
    with pytest.raises(ValueError, match=r"x: expected a non-empty .* got \[2, 0, 4\]"):
        ops.masked_mean(x[:, :0])
    with pytest.raises(TypeError, match=r"x: expected a floating dtype of 16 bits or more, got torch.int64"):
        ops.masked_mean(x.long())
    with pytest.raises(ValueError, match=r"mask: expected bool \[2, 3\], got torch.float32 \[2, 3\]"):
        ops.masked_mean(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask: expected bool \[2, 3\], got torch.bool \[2, 4\]"):
        ops.masked_mean(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"velocity: .*\[streams, batch, time, bins\], got \[2, 3, 4\]"):
        ops.velocity_delta(x)
    with pytest.raises(ValueError, match=r"mask: expected bool \[3, 4\], got torch.bool \[2, 4\]"):
        ops.velocity_delta(torch.zeros(2, 3, 4, 5), torch.ones(2, 4, dtype=torch.bool))
