"""attribute_layers against a loop written here from the formulas of the network, and what a probe leaves behind.

The loop runs one sample and one ablation at a time, without padding, from the parameters alone.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from agrepa_fast import AblationPlan, DiT, attribute_layers
from agrepa_fast.attribution.plan import Sizes
from agrepa_fast.models.flow import probe_inputs

WIDTH, HEADS, COND, BATCH = 16, 2, 3, 3
ENGINES = ["auto", "prefix", "stacked", "loop"]


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attention(p, prefix, h):
    parts = []
    for q, k, v in zip(*(part.split(WIDTH // HEADS, -1) for part in linear(p, f"{prefix}.qkv", h).split(WIDTH, -1))):
        logits = torch.einsum("id,jd->ij", q, k) / math.sqrt(WIDTH // HEADS)
        weights = (logits - logits.amax(1, keepdim=True)).exp()
        weights = weights / weights.sum(1, keepdim=True)
        parts.append(torch.einsum("ij,jd->id", weights, v))
    return linear(p, f"{prefix}.out", torch.cat(parts, -1))


def feed_forward(p, prefix, h):
    inner = linear(p, f"{prefix}.up", h)
    return linear(p, f"{prefix}.down", 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))))


def linear(p, name, x):
    return torch.einsum("oi,...i->...o", p[f"{name}.weight"], x) + p[f"{name}.bias"]


def velocity_of_one(model: DiT, x_t, t, cond, positions, skip: frozenset[int]) -> torch.Tensor:
    """Velocity of one sample's valid frames [F, M]; the chain's branches in `skip` do not run."""
    p = dict(model.named_parameters())
    x = linear(p, "input", x_t if cond is None else torch.cat([x_t, cond], -1)) + positions
    rate = 10000.0 ** (-torch.arange(WIDTH // 2, dtype=x.dtype) / (WIDTH // 2))
    embedded = linear(p, "time.0", torch.cat([(t * rate).cos(), (t * rate).sin()]))
    embedded = linear(p, "time.2", embedded * torch.sigmoid(embedded))
    m = linear(p, "modulation", embedded * torch.sigmoid(embedded)).reshape(-1, 6, WIDTH)
    for branch in range(2 * m.shape[0]):
        if branch in skip:
            continue
        scale, shift, gate = (m[branch // 2, row] for row in ((0, 1, 4), (2, 3, 5))[branch % 2])
        run = (attention, feed_forward)[branch % 2]
        x = x + gate * run(p, f"branches.{branch}", norm(x) * (1 + scale) + shift)
    return linear(p, "output", norm(x) * p["output_norm.weight"] + p["output_norm.bias"])


@torch.no_grad()
def scores_by_loop(model: DiT, inputs, skips, metric="rms") -> np.ndarray:
    """[U, N] from the definition of FoG-A; a padded sample is cut to its valid frames, so no mask is needed."""
    result = np.zeros((len(skips), len(inputs["x_t"])))
    for n in range(len(inputs["x_t"])):
        valid = inputs["mask"][n] if "mask" in inputs else torch.ones(inputs["x_t"].shape[1], dtype=torch.bool)
        cond = inputs["cond"][n, valid] if "cond" in inputs else None
        positions = model.positions[: len(valid)][valid]
        run = functools.partial(velocity_of_one, model, inputs["x_t"][n, valid], inputs["t"][n], cond, positions)
        base = run(frozenset()).double().numpy()
        for u, skip in enumerate(skips):
            change = np.mean((run(frozenset(skip)).double().numpy() - base) ** 2)
            if metric == "rms":
                result[u, n] = np.sqrt(change + 1e-8) / (np.sqrt(np.mean(base**2) + 1e-8) + 1e-8)
            else:
                result[u, n] = change / (np.mean(base**2) + 1e-8)
    return result


def assert_equal(scores, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=tolerance, atol=0)
    assert (expected > 1e-3).all()  # differences that mean something, not the floor


WHOLE = [{0, 1}, {2, 3}, {4, 5}]
APART = [{0}, {1}, {2}, {3}, {4}, {5}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("branches, skips", [(None, WHOLE), (("attn", "ff"), APART)])
@pytest.mark.parametrize("cond, masked", [(COND, True), (0, False)])
def test_equals_the_loop(build, draw, dtype, engine, branches, skips, cond, masked):
    scores = attribute_layers(build(dtype, cond), draw(dtype, cond, masked), branches=branches, engine=engine)
    wide = torch.float64  # the loop's own rounding would blur the comparison
    assert_equal(scores, scores_by_loop(build(wide, cond), draw(wide, cond, masked), skips), dtype)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "blocks, branches, skips, names",
    [
        ([2, 0], None, [{0, 1}, {4, 5}], ("0", "2")),
        ([1], None, [{2, 3}], ("1",)),
        (None, ("ff",), [{1}, {3}, {5}], ("0.ff", "1.ff", "2.ff")),
        ([2, 1], ("attn",), [{2}, {4}], ("1.attn", "2.attn")),
    ],
)
def test_subsets_of_layers_and_branches(build, draw, engine, blocks, branches, skips, names):
    model, inputs = build(torch.float64), draw(torch.float64)
    scores = attribute_layers(model, inputs, blocks, branches=branches, engine=engine)
    assert scores.names == names
    assert_equal(scores, scores_by_loop(model, inputs, skips), torch.float64)


@pytest.mark.parametrize("metric", ["rms", "squared"])
def test_metrics_over_a_grid_of_t(build, draw, metric):
    model, clean = build(torch.float64), draw(torch.float64)
    grid = [0.05, 0.4, 0.95]
    generator = torch.Generator().manual_seed(2)
    inputs = probe_inputs(clean["x_t"], clean["cond"], clean["mask"], grid, generator)
    scores = attribute_layers(model, inputs, metric=metric, domains=["a", "b", "a"] * 3)
    assert_equal(scores, scores_by_loop(model, inputs, WHOLE, metric), torch.float64)
    assert scores.t.tolist() == pytest.approx(np.repeat(grid, BATCH).tolist())
    assert scores.at(0.4).by_sample.equal(scores.by_sample[:, 3:6])
    assert scores.domains == ("a", "b", "a") * 3


@pytest.mark.parametrize("max_samples", [1, 2, 3, 100])
@pytest.mark.parametrize("engine", ["prefix", "stacked"])
def test_splits_of_the_batch_change_nothing(build, draw, max_samples, engine):
    model, inputs = build(torch.float64), draw(torch.float64)
    scores = attribute_layers(model, inputs, engine=engine, max_samples=max_samples)
    assert_equal(scores, scores_by_loop(model, inputs, WHOLE), torch.float64)


@functools.cache
def exact_loop(build, draw, branches):
    """Of the float32 numbers, in float64."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in draw(torch.float32).items()}
    return scores_by_loop(build(torch.float32).double(), inputs, WHOLE if branches is None else APART)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ["prefix", "stacked", "loop"])
@pytest.mark.parametrize("branches", [None, ("attn", "ff")])
@pytest.mark.parametrize("split", [{"max_samples": 1}, {"max_samples": 2}, {"memory_budget": "one layer"}])
def test_every_engine_granularity_and_split(build, draw, dtype, engine, branches, split):
    model, inputs = build(torch.float32).to(dtype), draw(torch.float32)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if "memory_budget" in split:
        if engine != "prefix":  # which refuses a budget elsewhere: see test_memory
            return
        sizes = Sizes(9, WIDTH, 2, 5, HEADS, dtype.itemsize, True)
        units = AblationPlan.build(3, branches=branches).units
        split = {"memory_budget": max(AblationPlan(3, (unit,)).peak_bytes(sizes, 1) for unit in units)}
    scores = attribute_layers(model, inputs, branches=branches, engine=engine, **split)
    if "memory_budget" in split:
        assert scores.block_evaluations > AblationPlan.build(3, branches=branches).block_evaluations
    assert_equal(scores, exact_loop(build, draw, branches), dtype)


def test_inputs_in_order_are_the_inputs_by_name(build, draw):
    model, inputs = build(), draw()
    in_order = attribute_layers(model, tuple(inputs[name] for name in ("x_t", "t", "cond", "mask")))
    assert in_order.by_sample.equal(attribute_layers(model, inputs).by_sample)


@pytest.mark.parametrize("branches", [None, ("attn", "ff")])
def test_evaluations_as_counted_by_hooks(build, draw, branches):
    """Sequences that pass each branch: the staircase costs L (L + 1) / 2 blocks of two branches, the control L on the
    first sample of the first pass."""
    depth = 5
    model, inputs = build(depth=depth), draw()
    counts = [0] * (2 * depth)
    for i, branch in enumerate(model.branches):
        branch.register_forward_hook(lambda _, args, __, i=i: counts.__setitem__(i, counts[i] + args[0].shape[0]))
    scores = attribute_layers(model, inputs, branches=branches, max_samples=2)
    if branches is None:
        assert counts == [1 + (1 + i // 2) * BATCH for i in range(2 * depth)]
        assert sum(counts) == depth * (depth + 1) // 2 * 2 * BATCH + 2 * depth
    else:
        assert counts == [1 + (1 + i) * BATCH for i in range(2 * depth)]
    assert scores.block_evaluations * 2 * BATCH == sum(counts) - 2 * depth
    assert len(scores.layers) == depth * (1 if branches is None else 2)
    assert (scores.by_sample > 0.01).all()  # every layer has a score


def test_passes_on_the_cpu_fit_in_its_cache(build, draw, monkeypatch):
    """As many samples as keep the widest activation below the limit, evenly dealt; the scores stay."""
    model, inputs = build(), draw()
    whole = attribute_layers(model, inputs)
    inner = model.config.ff_ratio * model.config.width
    one_sample = (1 + model.depth) * inputs["x_t"].shape[1] * inner * 4  # streams, frames, inner width, float32
    for limit, expected in ((BATCH * one_sample, [BATCH]), (2 * one_sample, [2, 1]), (1, [1] * BATCH)):
        monkeypatch.setattr("agrepa_fast.attribution.networks.CPU_PASS_BYTES", limit)
        sizes = []
        handle = model.branches[0].register_forward_hook(lambda _, args, __, to=sizes: to.append(args[0].shape[0]))
        scores = attribute_layers(model, inputs)
        handle.remove()
        assert sizes == [expected[0] + 1, *expected[1:]]  # and the control, in the first pass
        torch.testing.assert_close(scores.by_sample, whole.by_sample, rtol=1e-5, atol=0)
