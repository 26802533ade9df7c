"""The cosine losses against a loop in float64: masks, weights, reductions, zero vectors and half precision.

y, target [..., W]; hidden [..., D]; weight [W, D]; mask, sample_weight [...].
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from agrepa_fast import ops

EPS = 1e-8
MASK = torch.tensor([[True, True, False, True], [True, False, False, False]])
WEIGHT = torch.tensor([[0.5, 2.0, 7.0, 0.0], [1.5, 3.0, 1.0, 1.0]], dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loop(y, target, mask=None, sample_weight=None, reduction="mean", eps=EPS):
    """The definition, row by row."""
    losses, weights = np.zeros(y.shape[:-1]), np.zeros(y.shape[:-1])
    for row in np.ndindex(*y.shape[:-1]):
        weights[row] = 1.0 if sample_weight is None else float(sample_weight[row])
        if mask is not None and not mask[row]:
            weights[row] = 0.0
        if weights[row] == 0:
            continue
        a, b = y[row].double().numpy(), target[row].double().numpy()
        inner = sum(p * q for p, q in zip(a, b))
        length = np.sqrt((sum(p * p for p in a) + eps) * (sum(q * q for q in b) + eps))
        losses[row] = weights[row] * (1 - inner / length)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (weights.sum() or 1.0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("sample_weight", [None, WEIGHT])
def test_equals_the_loop(reduction, mask, sample_weight):
    y, target = randn(2, 4, 6), randn(2, 4, 6, seed=1) * 3
    arguments = {"mask": mask, "sample_weight": sample_weight, "reduction": reduction}
    expected = by_loop(y, target, **arguments)
    np.testing.assert_allclose(ops.cosine_loss(y, target, **arguments).numpy(), expected, rtol=0, atol=1e-13)
    got = ops.cosine_loss(y.float(), target.float(), **arguments)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_projection_equals_the_loop(bias, reduction):
    hidden, target, weight = randn(2, 4, 5), randn(2, 4, 6, seed=1), randn(6, 5, seed=2)
    b = randn(6, seed=3) if bias else None
    y = np.einsum("btd,wd->btw", hidden.numpy(), weight.numpy()) + (b.numpy() if bias else 0.0)
    expected = by_loop(torch.from_numpy(y), target, MASK, WEIGHT, reduction)
    got = ops.projection_cosine_loss(hidden, weight, b, target, mask=MASK, sample_weight=WEIGHT, reduction=reduction)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)
    if bias:
        without = ops.projection_cosine_loss(
            hidden, weight, None, target, mask=MASK, sample_weight=WEIGHT, reduction=reduction
        )
        assert np.abs(without.numpy() - expected).max() > 1e-2


def test_eps_is_added_to_the_squared_norms():
    y, target = randn(3, 4) * 0.1, randn(3, 4, seed=1)
    got = ops.cosine_loss(y, target, reduction="none", eps=0.5).numpy()
    np.testing.assert_allclose(got, by_loop(y, target, reduction="none", eps=0.5), rtol=0, atol=1e-13)
    assert np.abs(got - by_loop(y, target, reduction="none")).max() > 0.1


def test_token_mean_and_sample_mean_are_both_said_explicitly():
    """The mask alone weighs every frame alike; weights of one over the length weigh every sample alike."""
    y, target = randn(2, 4, 6), randn(2, 4, 6, seed=1)
    rows = by_loop(y, target, reduction="none")
    mask = MASK.numpy()
    token_mean = rows[mask].mean()
    sample_mean = np.mean([rows[b][mask[b]].mean() for b in range(2)])
    assert abs(token_mean - sample_mean) > 1e-2

    got = ops.cosine_loss(y, target, mask=MASK)
    np.testing.assert_allclose(got.numpy(), token_mean, rtol=1e-12)
    per_sample = (1.0 / MASK.sum(1, keepdim=True)).expand(2, 4)
    got = ops.cosine_loss(y, target, mask=MASK, sample_weight=per_sample)
    np.testing.assert_allclose(got.numpy(), sample_mean, rtol=1e-7)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradients(reduction):
    y, target, weight = randn(2, 4, 6), randn(2, 4, 6, seed=1), WEIGHT.clone()
    weight[weight == 0] = 0.7  # at 0 the row is dropped, which has no derivative in the weight
    assert torch.autograd.gradcheck(
        lambda y, z, w: ops.cosine_loss(y, z, mask=MASK, sample_weight=w, reduction=reduction),
        [value.requires_grad_() for value in (y, target, weight)],
    )
    leaves = [randn(2, 4, 5), randn(6, 5, seed=2), randn(6, seed=3), randn(2, 4, 6, seed=1)]
    assert torch.autograd.gradcheck(
        lambda h, w, b, z: ops.projection_cosine_loss(h, w, b, z, mask=MASK, reduction=reduction),
        [value.requires_grad_() for value in leaves],
    )


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("where", ["mask", "weight 0"])
def test_a_row_left_out_gives_exactly_nothing(junk, dtype, where):
    """Not to the loss, not to its own gradient, and not through the sum over rows to the Linear's."""
    outside = ~MASK.unsqueeze(-1)
    arguments = {"mask": MASK} if where == "mask" else {"sample_weight": MASK.double()}
    if where == "mask":  # not even the weight of a masked row is read
        arguments["sample_weight"] = torch.where(MASK, 1.0, junk)

    def run(filling):
        leaves = {
            "hidden": torch.where(outside, filling, randn(2, 4, 5)).to(dtype),
            "weight": randn(6, 5, seed=2).to(dtype),
            "bias": randn(6, seed=3).to(dtype),
            "target": torch.where(outside, filling, randn(2, 4, 6, seed=1)).to(dtype),
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        rows = ops.projection_cosine_loss(**leaves, **arguments, reduction="none")
        assert (rows[~MASK] == 0).all()
        rows.sum().backward()
        for name in ("hidden", "target"):
            assert (leaves[name].grad[~MASK] == 0).all()
            assert (leaves[name].grad[MASK] != 0).any(-1).all()
        return [rows, *(leaf.grad for leaf in leaves.values())]

    for got, expected in zip(run(junk), run(1.0)):
        assert torch.equal(got, expected)

    y = torch.where(outside, junk, randn(2, 4, 6)).to(dtype).requires_grad_()
    ops.cosine_loss(y, randn(2, 4, 6, seed=1).to(dtype), **arguments).backward()
    assert (y.grad[~MASK] == 0).all()
    assert (y.grad[MASK] != 0).any(-1).all()


def test_no_row_at_all_gives_zero():
    y = randn(2, 4, 6, dtype=torch.float32).requires_grad_()
    loss = ops.cosine_loss(y, y.detach(), mask=torch.zeros(2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (y.grad == 0).all()


def test_zero_vectors_in_float16():
    """Zero rows meet F.cosine_similarity's eps of 1e-8, which float16 rounds to 0: nan. Ours stays finite."""
    target = randn(1, 8, dtype=torch.float16)
    y = torch.zeros(1, 8, dtype=torch.float16, requires_grad=True)
    theirs = F.cosine_similarity(y, target)
    theirs.sum().backward()
    assert theirs.isnan().all()
    assert y.grad.isnan().all()

    y.grad = None
    loss = ops.cosine_loss(y, target)
    loss.backward()
    assert loss.item() == 1.0
    # d loss / d y = - z / (|z| sqrt(eps)): a unit vector times 1e4.
    expected = -target.double() / target.double().norm() / EPS**0.5
    torch.testing.assert_close(y.grad.double(), expected, rtol=1e-3, atol=0)

    both = torch.zeros(1, 8, dtype=torch.float16, requires_grad=True)
    loss = ops.cosine_loss(both, torch.zeros_like(both))
    loss.backward()
    assert loss.item() == 1.0
    assert (both.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_half_vectors_are_summed_in_float32(dtype, size):
    """At 1e-3 the squares underflow float16, at 300 their sum overflows it."""
    y, target = (randn(4, 1280) * size).to(dtype), (randn(4, 1280, seed=1) + 0.5).to(dtype)
    got = ops.cosine_loss(y, target, reduction="none")
    truth = by_loop(y, target, reduction="none")
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), truth, rtol=0, atol=1e-6)
    naive = 1 - (y * target).sum(-1) / (y.square().sum(-1).sqrt() * target.square().sum(-1).sqrt())
    assert not np.abs(naive.double().numpy() - truth).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_projection_is_no_worse_than_the_plain_expression(dtype):
    hidden, target = randn(16, 64).to(dtype), randn(16, 96, seed=1).to(dtype)
    weight, bias = (randn(96, 64, seed=2) / 8).to(dtype), randn(96, seed=3).to(dtype)
    truth = by_loop(F.linear(hidden.double(), weight.double(), bias.double()), target, reduction="none")
    got = ops.projection_cosine_loss(hidden, weight, bias, target, reduction="none").double().numpy()
    plain = (1 - F.cosine_similarity(F.linear(hidden, weight, bias), target)).double().numpy()
    assert np.abs(got - truth).max() <= 2 * np.abs(plain - truth).max()
    assert np.abs(got - truth).max() <= torch.finfo(dtype).eps


def test_bad_input_is_named():
    y = torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match=r"target: expected \[2, 4, 6\], got \[2, 4, 5\]"):
        ops.cosine_loss(y, torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"mask: expected bool \[2, 4\], got torch.float32 \[2, 4\]"):
        ops.cosine_loss(y, y, mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"mask: expected bool \[2, 4\], got torch.bool \[2\]"):
        ops.cosine_loss(y, y, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"sample_weight: expected real \[2, 4\], got torch.float32 \[2\]"):
        ops.cosine_loss(y, y, sample_weight=torch.ones(2))
    with pytest.raises(ValueError, match='reduction: expected "none", "sum" or "mean", got \'batchmean\''):
        ops.cosine_loss(y, y, reduction="batchmean")
    with pytest.raises(ValueError, match=r"weight: expected \[teacher width, 6\], got \[6, 5\]"):
        ops.projection_cosine_loss(y, torch.zeros(6, 5), None, y)
    with pytest.raises(ValueError, match=r"bias: expected \[3\], got \[6\]"):
        ops.projection_cosine_loss(y, torch.zeros(3, 6), torch.zeros(6), torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"target: expected \[2, 4, 3\], got \[2, 4, 6\]"):
        ops.projection_cosine_loss(y, torch.zeros(3, 6), None, y)
