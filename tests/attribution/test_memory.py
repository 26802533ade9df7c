"""Peak memory of a probe: what its plan predicts, against every tensor that PyTorch really holds while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agrepa_fast import AblationPlan, DiT, DiTConfig, attribute_layers
from agrepa_fast.attribution.plan import Sizes, split


class Held(TorchDispatchMode):
    """Bytes of the storages made since it was entered, at their most; those of parameters and inputs do not count."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        held = sum(size for _, size in self.alive.values())
        self.peak = max(self.peak, held)
        return result


def build(depth, width, ff, frames, mels, dtype, samples, masked=False):
    torch.manual_seed(0)
    model = DiT(DiTConfig(depth, width, 4, mels, 0, ff, 0.0, frames))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = {"x_t": torch.randn(samples, frames, mels, dtype=dtype), "t": torch.rand(samples, dtype=dtype)}
    if masked:
        inputs["mask"] = torch.ones(samples, frames, dtype=torch.bool)
    return model.to(dtype), inputs


def peak_of(model, inputs, **options):
    with Held(*model.parameters(), *model.buffers(), *inputs.values()) as held:
        attribute_layers(model, inputs, **options)
    return held.peak


CASES = {  # depth, width, ff_ratio, frames, mels, samples
    "paper's proportions": (6, 64, 4, 64, 6, 1),
    "two samples": (4, 64, 4, 64, 6, 2),
    "narrow feed-forward": (6, 64, 1, 64, 6, 2),
    "middling feed-forward": (5, 32, 2, 64, 8, 3),
    "mels wider than the network": (4, 16, 4, 64, 96, 1),
    "the same, with a mask": (4, 16, 4, 64, 96, 2),
    "one block": (1, 64, 4, 64, 6, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layers, branches", [(None, None), (None, ("attn", "ff")), ([0, 1], None)])
def test_peak_is_within_a_tenth_of_the_plan(case, dtype, layers, branches):
    depth, width, ff, frames, mels, samples = CASES[case]
    layers = layers and [layer for layer in layers if layer < depth]
    model, inputs = build(depth, width, ff, frames, mels, dtype, samples, masked=samples == 2)
    plan = AblationPlan.build(depth, layers, branches)
    sizes = Sizes(frames, width, ff, mels, 4, inputs["x_t"].element_size(), samples == 2)
    measured = peak_of(model, inputs, blocks=layers, branches=branches)
    assert plan.peak_bytes(sizes, samples) == pytest.approx(measured, rel=0.1)


def test_a_budget_is_kept_and_changes_no_score():
    """Budgets from one that takes all to one that takes a single layer of a single sample."""
    model, inputs = build(4, 32, 4, 32, 6, torch.float64, 3)
    plan, sizes = AblationPlan.build(4), Sizes(32, 32, 4, 6, 4, 8)
    expected = attribute_layers(model, inputs)
    alone = [AblationPlan(4, (unit,), control=unit.layer == 0) for unit in plan.units]
    least = max(one.peak_bytes(sizes, 1) for one in alone)
    seen = set()
    for budget in range(least, plan.peak_bytes(sizes, 3) + 1, 40_000):
        plans, at_once = split(plan, sizes, 3, budget)
        seen.add((len(plans), at_once))
        scores = attribute_layers(model, inputs, memory_budget=budget)
        assert torch.allclose(scores.by_sample, expected.by_sample, rtol=1e-10)
        assert scores.block_evaluations == sum(part.block_evaluations for part in plans)
        assert scores.layers == (0, 1, 2, 3)
        assert peak_of(model, inputs, memory_budget=budget) <= 1.1 * budget
        # The least recomputation: no fewer plans and no more samples would fit.
        assert at_once == 3 or plan.peak_bytes(sizes, at_once + 1) > budget
        assert len(plans) == 1 or plan.peak_bytes(sizes, 1) > budget
    assert {count for count, _ in seen} >= {1, 2, 3}
    assert {at_once for _, at_once in seen} >= {1, 2}
    with pytest.raises(ValueError, match=f"{least - 1} bytes are too few .* at least {least}"):
        attribute_layers(model, inputs, memory_budget=least - 1)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_splits_deal_every_unit_out_once_and_cost_one_baseline_each(depth):
    plan, sizes = AblationPlan.build(depth, branches=("attn", "ff")), Sizes(8, 8, 4, 4, 2, 4)
    least = max(AblationPlan(depth, (unit,)).peak_bytes(sizes, 1) for unit in plan.units)
    for budget in range(least, plan.peak_bytes(sizes, 1) + 1, 500):
        plans, at_once = split(plan, sizes, 1, budget)
        assert at_once == 1
        assert [unit for part in plans for unit in part.units] == list(plan.units)
        assert all(part.peak_bytes(sizes, 1) <= budget for part in plans)
        extra = sum(part.branch_evaluations for part in plans) - plan.branch_evaluations
        assert extra == (len(plans) - 1) * 2 * depth


def test_shares_of_free_memory_and_wrong_budgets():
    model, inputs = build(2, 32, 4, 16, 6, torch.float32, 2)
    expected = attribute_layers(model, inputs).by_sample
    assert attribute_layers(model, inputs, memory_budget=0.5).by_sample.equal(expected)
    for budget, message in ((1.5, r"share in \(0, 1\], got 1\.5"), (0, "at least 1"), (0.0, "share")):
        with pytest.raises(ValueError, match=message):
            attribute_layers(model, inputs, memory_budget=budget)
    with pytest.raises(ValueError, match="only for the staircase"):
        attribute_layers(model, inputs, memory_budget=10**9, engine="loop")
