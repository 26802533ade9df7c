"""Path, loss, sway, sampler and probe inputs against closed forms and loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from agrepa_fast.models.flow import SIGMA, flow_matching_loss, path, probe_inputs, sample, sway


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_path_runs_from_noise_to_data(dtype):
    x, noise = randn(3, 4, 2, dtype=dtype), randn(3, 4, 2, seed=1, dtype=dtype)
    assert torch.equal(path(x, noise, torch.zeros(3))[0], noise)
    assert torch.equal(path(x, noise, torch.ones(3))[0], x)
    t = torch.tensor([0.25, 0.5, 0.875])
    x_t, velocity = path(x, noise, t)
    for b, time in enumerate(t.tolist()):
        expected = (1 - time) * noise[b].double() + time * x[b].double()
        torch.testing.assert_close(x_t[b].double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-15)
    assert velocity.dtype == dtype
    later, _ = path(x.double(), noise.double(), t.double() + 1e-3)
    slope = (later - path(x.double(), noise.double(), t.double())[0]) / 1e-3
    torch.testing.assert_close(velocity.double(), slope, rtol=0, atol=1e-6)


MASK = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.float16, 1e-5)])
def test_loss_equals_a_loop(mask, dtype, rtol):
    velocity, target = randn(3, 4, 5, dtype=dtype), randn(3, 4, 5, seed=1, dtype=dtype)
    expected = np.zeros(3)
    for b in range(3):
        valid = [t for t in range(4) if mask is None or mask[b, t]]
        for t in valid:
            for m in range(5):
                expected[b] += (velocity[b, t, m].item() - target[b, t, m].item()) ** 2 / (5 * len(valid))
    got = flow_matching_loss(velocity, target, mask)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=0)
    if mask is not None:
        assert (flow_matching_loss(velocity, target) - got).abs().min() > 1e-2


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_masked_frames_give_no_loss_and_no_gradient(junk):
    outside = ~MASK.unsqueeze(-1)
    target = torch.where(outside, junk, randn(3, 4, 5, seed=1, dtype=torch.float32))
    velocity = torch.where(outside, junk, randn(3, 4, 5, dtype=torch.float32)).requires_grad_()
    loss = flow_matching_loss(velocity, target, MASK)
    assert loss[2].item() == 0
    loss.sum().backward()
    assert (velocity.grad[~MASK] == 0).all()
    lengths = MASK.sum(1).clamp_min(1)[:, None, None]
    expected = torch.where(outside, 0, 2 * (velocity - target).detach() / (5 * lengths))
    torch.testing.assert_close(velocity.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("coefficient", [-1.0, -0.5, 0.0, 0.4])
def test_sway(coefficient):
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    got = sway(t, coefficient)
    for before, after in zip(t.tolist(), got.tolist()):
        assert abs(after - (before + coefficient * (math.cos(math.pi * before / 2) - 1 + before))) < 1e-15
        if coefficient == -1.0:
            assert abs(after - (1 - math.cos(math.pi * before / 2))) < 1e-15
    assert got[0].item() == 0
    assert abs(got[-1].item() - 1) < 1e-15
    assert (got.diff() > 0).all()


class GaussianFlow:
    """The exact velocity from N(0, 0.5^2) to N(mean, spread^2), coordinate by coordinate.

    The path's marginal at t has mean t m and variance (1 - t)^2 0.25 + t^2 s^2; the flow maps quantiles to
    quantiles, so noise e ends at m + e s / 0.5.
    """

    def __init__(self, mean, spread):
        self.mean, self.spread = mean, spread
        self.times: list[float] = []

    def __call__(self, x, t, cond, mask):
        self.times.append(t[0].item())
        t = t.double()[:, None, None]
        variance = (1 - t) ** 2 * 0.25 + t**2 * self.spread**2
        slope = t * self.spread**2 - (1 - t) * 0.25
        return self.mean + (x - t * self.mean) * slope / variance


@pytest.mark.parametrize("method, tolerance", [("euler", 0.15), ("midpoint", 2e-4)])
@pytest.mark.parametrize("sway_coefficient", [None, -1.0])
def test_the_sampler_carries_noise_to_the_target_distribution(method, tolerance, sway_coefficient):
    noise = SIGMA * randn(2, 3, 4)
    model = GaussianFlow(randn(4, seed=1), 1.7)
    got = sample(model, noise, points=65, method=method, sway_coefficient=sway_coefficient)
    assert len(model.times) == 64 * (2 if method == "midpoint" else 1)
    torch.testing.assert_close(got, model.mean + noise * 1.7 / 0.5, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2)])
@pytest.mark.parametrize("sway_coefficient", [None, -1.0])
def test_order_of_convergence(method, order, sway_coefficient):
    """dx/dt = (1 + t) (x - m), so x(1) = m + (x(0) - m) exp(3/2): half the step, error over 2 or 4."""
    noise, m = randn(2, 3, 4), randn(4, seed=1)
    exact = m + (noise - m) * math.exp(1.5)

    def model(x, t, cond, mask):
        return (1 + t.double()[:, None, None]) * (x - m)

    errors = [
        (sample(model, noise, points=steps + 1, method=method, sway_coefficient=sway_coefficient) - exact).abs().max()
        for steps in (32, 64)
    ]
    assert 0.9 * 2**order < errors[0] / errors[1] < 1.1 * 2**order


def test_a_point_target_is_reached_exactly():
    """Straight lines: Euler has no error on any grid."""
    noise, goal = SIGMA * randn(2, 3, 4), randn(2, 3, 4, seed=1)
    for points in (2, 3, 32):
        got = sample(lambda x, t, cond, mask: (goal - x) / (1 - t.double()[:, None, None]), noise, points=points)
        torch.testing.assert_close(got, goal, rtol=0, atol=1e-5)


def test_the_grid_is_the_one_asked_for():
    def times(**options):
        model = GaussianFlow(torch.zeros(1, dtype=torch.float64), 1.0)
        sample(model, randn(1, 1, 1), points=5, **options)
        return model.times

    np.testing.assert_allclose(times(sway_coefficient=None), [0, 0.25, 0.5, 0.75], atol=1e-7)
    swayed = [1 - math.cos(math.pi * k / 8) for k in range(5)]
    np.testing.assert_allclose(times(), swayed[:4], atol=1e-6)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(swayed)]
    np.testing.assert_allclose(times(method="midpoint")[1::2], middles, atol=1e-6)


def conditioned(x, t, cond, mask):
    """A nonlinear velocity in which every input matters."""
    return torch.sin(x + t.double()[:, None, None]) * mask.unsqueeze(-1) + cond * x.cos()


@pytest.mark.parametrize("guidance", [0.0, 0.7, 3.0])
def test_guidance_equals_two_separate_calls(guidance):
    noise, cond, null = randn(2, 3, 4), randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    got = sample(conditioned, noise, cond, null, mask, points=6, guidance=guidance, sway_coefficient=None)
    x = noise
    for k in range(5):
        t = torch.full((2,), k / 5, dtype=torch.float64)
        with_cond, without = conditioned(x, t, cond, mask), conditioned(x, t, null, mask)
        x = x + (without + guidance * (with_cond - without)) / 5
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)


def test_no_second_half_without_guidance():
    sizes = []

    def model(x, t, cond, mask):
        sizes.append((x.shape[0], t.shape[0], cond.shape[0]))
        return conditioned(x, t, cond, torch.ones(x.shape[:2]))

    noise, cond, null = randn(2, 3, 4), randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    plain = sample(model, noise, cond, points=3)
    assert torch.equal(sample(model, noise, cond, null, points=3, guidance=1.0), plain)
    assert set(sizes) == {(2, 2, 2)}
    sample(model, noise, cond, null, points=3)
    assert set(sizes[4:]) == {(4, 4, 4)}


def test_bad_sampler_arguments_are_named():
    noise = randn(1, 2, 3)
    with pytest.raises(ValueError, match="points: expected at least 2, got 1"):
        sample(conditioned, noise, points=1)
    with pytest.raises(ValueError, match='method: expected "euler" or "midpoint", got \'rk4\''):
        sample(conditioned, noise, method="rk4")
    with pytest.raises(ValueError, match="null_cond: guidance needs cond as well"):
        sample(conditioned, noise, null_cond=noise)


def test_probe_inputs_fold_the_grid_with_one_noise_per_sample():
    """t-major; removing the data from x_t leaves the same noise at every t."""
    x, cond = randn(3, 40, 20), randn(3, 40, 2, seed=1)
    mask = torch.arange(40) < torch.tensor([[40], [30], [7]])
    grid = [0.1, 0.5, 0.9, 0.0]
    before = torch.random.get_rng_state()
    got = probe_inputs(x, cond, mask, grid, torch.Generator().manual_seed(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sorted(got) == ["cond", "mask", "t", "x_t"]
    first = got["x_t"][9:]  # at t = 0, the noise itself
    assert abs(first.std().item() - SIGMA) < 0.02
    assert (first[0] - first[1]).abs().max() > 0.1
    for g, t in enumerate(grid):
        rows = slice(3 * g, 3 * g + 3)
        np.testing.assert_allclose(got["t"][rows].numpy(), t, atol=1e-7)
        noise = (got["x_t"][rows] - t * x) / (1 - t)
        torch.testing.assert_close(noise, first, rtol=0, atol=1e-5)
        assert torch.equal(got["cond"][rows], cond)
        assert torch.equal(got["mask"][rows], mask)


def test_probe_inputs_repeat_with_the_generator():
    x = randn(2, 4, 3, dtype=torch.float32)
    first, second, other = (
        probe_inputs(x, None, None, [0.2, 0.8], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert sorted(first) == ["t", "x_t"]
    assert first["x_t"].dtype == torch.float32
    assert torch.equal(first["x_t"], second["x_t"])
    assert not torch.equal(first["x_t"], other["x_t"])
