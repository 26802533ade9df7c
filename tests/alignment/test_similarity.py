"""Relation, CKA and z-scored targets against NumPy, clip by clip; in AlignmentLoss, where a step needs them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast import AlignmentLoss, LayerSelection, SimilarityStop
from agrepa_fast.alignment.similarity import cka_distance, relation_distance, standardise
from agrepa_fast.attribution.stored import linear_cka
from agrepa_fast.errors import UserError

BATCH, FRAMES, WIDTH, TEACHER = 4, 9, 6, 5
MASK = torch.arange(FRAMES) < torch.tensor([[9], [4], [1], [6]])
DISTANCES = {"relation": relation_distance, "cka": cka_distance}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relation_by_loop(y, z):
    total = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            student = y[i] @ y[j] / np.sqrt((y[i] @ y[i] + 1e-8) * (y[j] @ y[j] + 1e-8))
            teacher = z[i] @ z[j] / np.sqrt((z[i] @ z[i] + 1e-8) * (z[j] @ z[j] + 1e-8))
            total += (student - teacher) ** 2
    return total / len(y) ** 2


def cka_by_covariances(y, z):
    """From the covariances of the channels; the code takes the kernels of the rows."""
    y, z = y - y.mean(0), z - z.mean(0)
    return 1 - np.linalg.norm(y.T @ z) ** 2 / (np.linalg.norm(y.T @ y) * np.linalg.norm(z.T @ z))


BY_HAND = {"relation": relation_by_loop, "cka": cka_by_covariances}


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_by_hand(kind, mask):
    y, z = randn(BATCH, FRAMES, WIDTH) + 0.5, 100 * randn(BATCH, FRAMES, TEACHER, seed=1)
    dirty, dirty_z = y.clone(), z.clone()
    if mask is not None:
        dirty[~mask], dirty_z[~mask] = torch.nan, torch.inf
    distances = DISTANCES[kind](dirty, dirty_z, mask)
    for n in range(BATCH):
        rows = slice(None) if mask is None else mask[n].numpy()
        if len(y[n][rows]) < 2:
            continue  # nothing to compare; AlignmentLoss leaves it out
        expected = BY_HAND[kind](y[n].numpy()[rows], z[n].numpy()[rows])
        assert 0.05 < expected < 0.95
        assert distances[n].item() == pytest.approx(expected, rel=1e-6)
    assert distances.isfinite().all()


def test_cka_is_the_probe_s():
    y, z = randn(3, 30, WIDTH), randn(30, TEACHER, seed=1) @ randn(TEACHER, TEACHER, seed=2)
    torch.testing.assert_close(1 - cka_distance(y, z.expand(3, -1, -1)), linear_cka(y, z), rtol=1e-6, atol=0)
    turned = 3 * y @ torch.linalg.qr(randn(WIDTH, WIDTH, seed=3))[0] + 7
    torch.testing.assert_close(cka_distance(y, turned), y.new_zeros(3), rtol=0, atol=1e-6)
    large = cka_distance((1e10 * y).float(), z.float())  # whose kernel's squares float32 cannot hold
    torch.testing.assert_close(large.double(), 1 - linear_cka(y, z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DISTANCES)
def test_distance_gradients(kind):
    y, z = randn(2, 5, 3).requires_grad_(), randn(2, 5, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()
    assert torch.autograd.gradcheck(lambda y: DISTANCES[kind](y, z, mask), y)
    DISTANCES[kind](y, z, mask).sum().backward()
    assert y.grad[~mask].count_nonzero() == 0
    assert y.grad[mask].count_nonzero() == y.grad[mask].numel()


@pytest.mark.parametrize("mask", [None, MASK])
def test_standardised_targets_by_hand(mask):
    z = randn(BATCH, FRAMES, TEACHER) * torch.tensor([1e-2, 1, 100, 5, 0]).double() + torch.tensor(3.0)
    dirty = z.clone()
    if mask is not None:
        dirty[~mask] = torch.nan
    result = standardise(dirty, mask)
    for n in range(BATCH):
        rows = z[n] if mask is None else z[n][mask[n]]
        expected = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-6).sqrt()
        got = result[n] if mask is None else result[n][mask[n]]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if mask is not None:
        assert result[~mask].count_nonzero() == 0
    assert standardise(z.half()).dtype == torch.float32


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_half_precision_stays_finite(kind, scale):
    """Zero rows, equal rows, tiny and huge ones: finite loss and gradients in float16, close to float64."""
    y = (scale * randn(BATCH, FRAMES, WIDTH, dtype=torch.float32)).half()
    y[0, :3], y[1] = 0, y[1, :1]
    z = randn(BATCH, FRAMES, TEACHER, seed=1).half()
    z[3] = 0
    y.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distances = DISTANCES[kind](y, z)
    assert distances.dtype == torch.float32
    distances.mean().backward()
    assert y.grad.isfinite().all()
    expected = DISTANCES[kind](y.detach().double(), z.double())
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-4)


def build(objective, pool=None, standardised=False, dtype=torch.float64):
    torch.manual_seed(0)
    selection = LayerSelection((1, 4), (0.75, 0.25))
    teachers = {"speech": TEACHER, "audio": 3}
    loss_fn = AlignmentLoss(WIDTH, teachers, selection, pool, "linear", objective, standardised)
    return loss_fn.to(dtype)


def draw(pool=None, dtype=torch.float64):
    hidden = {layer: randn(BATCH, FRAMES, WIDTH, seed=layer, dtype=dtype).requires_grad_() for layer in (1, 4)}
    shape = (BATCH,) if pool else (BATCH, FRAMES)
    sizes = {"speech": TEACHER, "audio": 3}
    return hidden, {name: randn(*shape, size, seed=size, dtype=dtype) + 2 for name, size in sizes.items()}


NAMES = ["speech", "speech", "audio", "speech"]


@pytest.mark.parametrize(
    "standardised, weights, pool",
    [(s, w, None) for s in (False, True) for w in (None, [0.5, 2.0, 1.0, 0.25])] + [(False, None, "mean")],
)
@pytest.mark.parametrize("objective", ["cosine", "relation", "cka"])
def test_the_loss_by_hand(objective, standardised, weights, pool):
    loss_fn = build(objective, pool, standardised)
    hidden, targets = draw(pool)
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    loss, metrics = loss_fn(hidden, targets, MASK, NAMES, given)
    expected = 0.0
    for layer, share in ((1, 0.75), (4, 0.25)):
        for teacher in ("speech", "audio"):
            linear = loss_fn.heads[teacher][str(layer)].output
            values, factors = [], []
            clips = [n for n in range(BATCH) if NAMES[n] == teacher]
            pooled_y, pooled_z = [], []
            for n in clips:
                h, z = hidden[layer][n].detach()[MASK[n]], targets[teacher][n]
                h = h.mean(0, keepdim=True) if pool else h
                y = F.linear(F.layer_norm(h, (WIDTH,)), linear.weight, linear.bias).detach().numpy()
                z = z[None].numpy() if pool else z[MASK[n]].numpy()
                if standardised:
                    z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-6)
                pooled_y.append(y)
                pooled_z.append(z)
            if pool and objective != "cosine":
                pooled_y, pooled_z = [np.concatenate(pooled_y)], [np.concatenate(pooled_z)]
                clips = [0]
            for n, y, z in zip(clips, pooled_y, pooled_z):
                factor = 1.0 if weights is None else weights[n]
                if objective == "cosine":
                    norms = np.sqrt(((y**2).sum(1) + 1e-8) * ((z**2).sum(1) + 1e-8))
                    values += list(1 - (y * z).sum(1) / norms)
                    factors += [factor] * len(y)
                elif len(y) >= 2:
                    values.append(BY_HAND[objective](y, z))
                    factors.append(factor)
            expected += share * np.mean(np.multiply(values, factors)) if values else 0.0
            similarity = metrics[f"{objective}/{teacher}/{layer}"].item()
            assert similarity == pytest.approx(1 - np.mean(values) if values else math.nan, rel=1e-6, nan_ok=True)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01
    loss.backward()
    for h in hidden.values():
        assert h.grad[~MASK].count_nonzero() == 0
        assert h.grad[0][MASK[0]].all()
    if objective != "cosine":  # the only clip of "audio" has one frame: nothing to compare
        assert not any(parameter.grad.any() for parameter in loss_fn.heads["audio"].parameters())


class NoSync(TorchDispatchMode):
    """Fails where a number would be read from the device, or a shape would depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective, pool", [("cosine", None), ("cosine", "mean"), ("relation", None), ("cka", "mean")])
def test_one_graph_and_no_host_sync(objective, pool):
    loss_fn = build(objective, pool, standardised=pool is None, dtype=torch.float32)
    stop = SimilarityStop(0.5)
    hidden, targets = draw(pool, torch.float32)
    speech = torch.tensor([name == "speech" for name in NAMES])
    arguments = (hidden, targets, MASK, {"speech": speech, "audio": ~speech})
    inputs = [*hidden.values(), *loss_fn.parameters()]
    with NoSync():
        expected, eager_metrics = loss_fn(*arguments)
        eager = torch.autograd.grad(expected, inputs)
        stop(loss_fn.similarity(eager_metrics))
    loss, metrics = torch.compile(loss_fn, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, eager_metrics, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), eager)


def test_what_is_refused():
    with pytest.raises(UserError, match="objective: expected one of cosine, relation, cka, got 'cosin'"):
        build("cosin")
    with pytest.raises(UserError, match="standardise_targets: works over time"):
        build("cosine", "mean", standardised=True)
    hidden, targets = draw("mean")
    with pytest.raises(ValueError, match="sample_weight: pooled 'cka' compares samples with each other"):
        build("cka", "mean")(hidden, targets, sample_weight=torch.ones(BATCH))


def test_selecting_again_changes_no_graph():
    """Pooled heads: other layers and other weights are other numbers in the same graph."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    loss_fn = build("cosine", "mean", dtype=torch.float32)
    hidden, targets = draw("mean", torch.float32)
    compiled = torch.compile(loss_fn, fullgraph=True, backend=counting)
    for selection in (LayerSelection((1, 4), (0.75, 0.25)), LayerSelection((4,), (1.0,)), LayerSelection((1,), (1.0,))):
        loss_fn.select(selection)
        loss, metrics = compiled(hidden, targets, MASK)
        weights = dict(zip(selection.layers, selection.weights))
        distances = {layer: sum(1 - metrics[f"cosine/{name}/{layer}"].item() for name in targets) for layer in (1, 4)}
        expected = sum(weight * distances[layer] for layer, weight in weights.items())
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert len(graphs) == 1
