"""First-order scores against finite differences of a network whose branches are scaled in their weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers
from agrepa_fast.attribution.gradients import first_order_scores, gradient_norm_scores

DEPTH, BATCH = 3, 3
WHOLE = [(0, 1), (2, 3), (4, 5)]
APART = [(i,) for i in range(6)]


@torch.no_grad()
def scaled(model, chain, factor):
    """The network with the branches of `chain` times `factor`."""
    other = copy.deepcopy(model)
    for i in chain:
        last = other.branches[i].out if i % 2 == 0 else other.branches[i].down
        last.weight.mul_(factor), last.bias.mul_(factor)
    return other


@torch.no_grad()
def derivative(model, inputs, chain, step=1e-5):
    """dv/dm of the branches together, by central differences [N, T, M]."""
    up, down = (scaled(model, chain, 1 + sign * step)(**inputs) for sign in (1, -1))
    return (up - down) / (2 * step)


def valid(inputs):
    return inputs["mask"] if "mask" in inputs else torch.ones(inputs["x_t"].shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("branches, chains", [(None, WHOLE), (("attn", "ff"), APART)])
@pytest.mark.parametrize("metric", ["rms", "squared"])
def test_every_draw_is_the_projection_of_the_derivative(build, draw, masked, branches, chains, metric):
    """With the same u, number for number."""
    model, inputs = build(torch.float64), draw(torch.float64, masked=masked)
    result = first_order_scores(model, inputs, metric=metric, draws=3, branches=branches)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(inputs["x_t"].shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    frames = valid(inputs)
    velocity = model(**inputs).detach()
    expected, spread = np.zeros((len(chains), BATCH)), []
    for row, chain in enumerate(chains):
        jacobian = derivative(model, inputs, chain)
        squares = np.zeros((3, BATCH))
        for n in range(BATCH):
            count = frames[n].sum() * 5
            for d, u in enumerate(cotangents):
                squares[d, n] = (u[n, frames[n]] * jacobian[n, frames[n]]).sum() ** 2 / count
            energy = velocity[n, frames[n]].square().mean()
            change = squares[:, n].mean()
            root = np.sqrt(change + 1e-8) / (np.sqrt(energy + 1e-8) + 1e-8)
            expected[row, n] = root if metric == "rms" else change / (energy + 1e-8)
        means = squares.mean(1)
        spread.append(means.std(ddof=1) / np.sqrt(3) / means.mean())
    np.testing.assert_allclose(result.scores.by_sample, expected, rtol=1e-6)
    np.testing.assert_allclose(result.draw_stderr, spread, rtol=1e-6)


def test_many_draws_reach_the_norm_of_the_derivative(build, draw):
    model, inputs = build(torch.float64), draw(torch.float64)
    result = first_order_scores(model, inputs, metric="squared", draws=400)
    energy = model(**inputs).detach().square()
    frames = valid(inputs)
    for k, chain in enumerate(WHOLE):
        jacobian = derivative(model, inputs, chain).square()
        norm = [float(jacobian[n, frames[n]].mean() / energy[n, frames[n]].mean()) for n in range(BATCH)]
        got = result.scores.by_sample[k].mean().item()
        assert abs(got / np.mean(norm) - 1) < 4 * result.draw_stderr[k].item() + 0.02
        assert result.draw_stderr[k] < 0.1


def test_the_loss_gradient_by_finite_differences(build, draw):
    model, inputs = build(torch.float64), draw(torch.float64)
    target = torch.randn(inputs["x_t"].shape, generator=torch.Generator().manual_seed(4)).double()
    scores = gradient_norm_scores(model, inputs, target)
    frames, velocity = valid(inputs), model(**inputs).detach()
    for k, chain in enumerate(WHOLE):
        jacobian = derivative(model, inputs, chain)
        for n in range(BATCH):
            slope = (2 * (velocity - target) * jacobian)[n, frames[n]].mean()
            assert scores.by_sample[k, n].item() == pytest.approx(abs(slope.item()), rel=1e-5)
    assert scores.metric == "gradient"


def test_weak_branches_are_ranked_as_by_ablation(build, draw):
    """Where the branches are small, the first order is all there is."""
    model, inputs = build(torch.float64, depth=6), draw(torch.float64)
    for layer, factor in enumerate((0.05, 0.3, 0.02, 0.1, 0.01, 0.2)):
        model = scaled(model, (2 * layer, 2 * layer + 1), factor)
    exact = attribute_layers(model, inputs)
    estimate = first_order_scores(model, inputs, draws=200)
    assert estimate.rank_correlation(exact) > 0.9
    assert torch.allclose(estimate.scores.mean, exact.mean, rtol=0.35)
    with pytest.raises(ValueError, match="expected exact scores of"):
        estimate.rank_correlation(attribute_layers(model, inputs, [0, 1]))


def test_leaves_the_model_as_it_was(build, draw):
    model, inputs = build(dropout=0.5).train(), draw()
    state = torch.get_rng_state()
    first_order_scores(model, inputs, draws=2)
    gradient_norm_scores(model, inputs, torch.zeros_like(inputs["x_t"]))
    assert model.training
    assert torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_arguments_are_named(build, draw):
    with pytest.raises(ValueError, match="draws: expected at least 2"):
        first_order_scores(build(), draw(), draws=1)
    with pytest.raises(TypeError, match=r"expected an agrepa_fast\.DiT, got Linear"):
        first_order_scores(nn.Linear(2, 2), draw())
    with pytest.raises(ValueError, match=r"target: expected \[3, 9, 5\] as x_t, got \[3, 9, 4\]"):
        gradient_norm_scores(build(), draw(), torch.zeros(3, 9, 4))
