"""Alignment heads: each kind against its formula in NumPy, batched heads against the same heads one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast import AlignmentLoss, LayerSelection
from agrepa_fast.alignment.heads import HEADS, grouped, one_by_one
from agrepa_fast.errors import UserError

WIDTH, FRAMES, BATCH = 6, 5, 3
TEACHERS = {"speech": 4, "audio": 3, "events": 4}
LAYERS = (0, 2, 5)
MASK = torch.arange(FRAMES) < torch.tensor([[5], [2], [4]])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def by_numpy(kind, p, x):
    """The head's output for rows x [B, T, D]; p its parameters by name."""
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)  # noqa: E731
    if kind == "repa":
        return linear(silu(linear(silu(linear(x, "first")), "second")), "output")
    if kind == "linear":
        return linear(x, "output")
    if kind == "low-rank":
        return linear(linear(x, "down"), "output")
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    return sum(padded[:, k : k + x.shape[1]] @ p["conv.weight"][:, :, k].T for k in range(3)) + p["conv.bias"]


@pytest.mark.parametrize("kind", ["repa", "linear", "low-rank", "conv"])
def test_each_kind_is_its_formula(kind):
    torch.manual_seed(0)
    loss_fn = AlignmentLoss(WIDTH, {"speech": 4}, LayerSelection((2,), (1.0,)), pool=None, head=kind).double()
    hidden, target = randn(BATCH, FRAMES, WIDTH), randn(BATCH, FRAMES, 4, seed=1)
    dirty = torch.where(MASK.unsqueeze(-1), hidden, torch.nan)
    loss, metrics = loss_fn({2: dirty.requires_grad_()}, {"speech": target}, MASK)
    parameters = {name: value.detach().numpy() for name, value in loss_fn.heads["speech"]["2"].named_parameters()}
    x = torch.where(MASK.unsqueeze(-1), F.layer_norm(hidden, (WIDTH,)), 0).numpy()
    y, z, kept = by_numpy(kind, parameters, x), target.numpy(), MASK.numpy()
    cosine = (y * z).sum(-1) / np.sqrt(((y**2).sum(-1) + 1e-8) * ((z**2).sum(-1) + 1e-8))
    assert loss.item() == pytest.approx(np.mean(1 - cosine[kept]), abs=1e-10)
    assert metrics["cosine/speech/2"].item() == pytest.approx(np.mean(cosine[kept]), abs=1e-10)
    loss.backward()
    assert dirty.grad[~MASK].count_nonzero() == 0
    assert all(value.grad.isfinite().all() and value.grad.any() for value in loss_fn.parameters())


@pytest.mark.parametrize("together", [grouped, one_by_one])
@pytest.mark.parametrize("kind", ["mlp", "repa", "linear", "low-rank"])
def test_heads_together_equal_the_same_heads_alone(kind, together):
    torch.manual_seed(0)
    heads = [HEADS[kind](WIDTH, size).double() for size in TEACHERS.values() for _ in LAYERS]
    x = randn(len(heads), BATCH, WIDTH)
    seen = []
    for members, y in together(heads, x):
        for index, rows in zip(members, y):
            target = randn(BATCH, rows.shape[1], seed=index)
            expected = heads[index].loss(x[index], target, None)
            norms = ((rows.square().sum(-1) + 1e-8) * (target.square().sum(-1) + 1e-8)).sqrt()
            assert (1 - (rows * target).sum(-1) / norms).mean().item() == pytest.approx(expected.item(), abs=1e-12)
            seen.append(index)
    assert sorted(seen) == list(range(len(heads)))


class Count(TorchDispatchMode):
    """How often each matrix product is dispatched."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def test_pooled_heads_are_a_fixed_number_of_products(monkeypatch):
    """Off the CPU: one for the first Linear and one for each teacher width, however many layers there are."""
    monkeypatch.setattr("agrepa_fast.alignment.loss.one_by_one", grouped)
    for layers in ((0,), LAYERS):
        loss_fn = AlignmentLoss(WIDTH, TEACHERS, LayerSelection.uniform(layers))
        hidden = {layer: randn(BATCH, FRAMES, WIDTH).float() for layer in layers}
        targets = {name: randn(BATCH, size).float() for name, size in TEACHERS.items()}
        with Count() as count, torch.no_grad():
            loss = loss_fn(hidden, targets, MASK, ["speech", "audio", "events"])[0]
        assert count.products == 1 + len(set(TEACHERS.values()))
        with monkeypatch.context() as patch:
            patch.setattr("agrepa_fast.alignment.loss.one_by_one", one_by_one)
            torch.testing.assert_close(loss_fn(hidden, targets, MASK, ["speech", "audio", "events"])[0], loss)


def test_wrong_heads_are_named():
    with pytest.raises(UserError, match="head: expected one of mlp, repa, linear, low-rank, conv, got 'mpl'"):
        AlignmentLoss(WIDTH, TEACHERS, LayerSelection.uniform(LAYERS), head="mpl")
    with pytest.raises(UserError, match='head: "conv" runs over time'):
        AlignmentLoss(WIDTH, TEACHERS, LayerSelection.uniform(LAYERS), head="conv")
