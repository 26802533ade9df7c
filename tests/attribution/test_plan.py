"""The staircase's bookkeeping against a simulation that runs every stream branch by branch and counts."""

from __future__ import annotations

import itertools

import pytest

from agrepa_fast.attribution.plan import AblationPlan, Unit

GRANULARITIES = [None, ("attn",), ("ff",), ("attn", "ff")]


def switched_off(layers, branches):
    """The set of chain positions that each unit skips, layer by layer."""
    sets = []
    for layer in sorted(layers):
        pair = {"attn": 2 * layer, "ff": 2 * layer + 1}
        if branches is None:
            sets.append(set(pair.values()))
        else:
            sets += [{pair[name]} for name in ("attn", "ff") if name in branches]
    return sets


def staircase_by_simulation(depth, skips):
    """Streams that evaluate each branch: the baseline, and every stream that has left the baseline's path by then.

    A stream has its own state only once the branches it skips lie behind it."""
    return [1 + sum(1 for skip in skips if max(skip) < branch) for branch in range(2 * depth)]


def loop_by_simulation(depth, skips):
    """Branches that full forwards run, one forward for each entry of `skips` and one for the baseline."""
    return sum(1 for skip in [set(), *skips] for branch in range(2 * depth) if branch not in skip)


def subsets(depth):
    layers = range(depth)
    return itertools.chain.from_iterable(itertools.combinations(layers, n) for n in range(1, depth + 1))


def check(depth, layers, branches):
    plan = AblationPlan.build(depth, layers, branches)
    skips = switched_off(range(depth) if layers is None else layers, branches)
    assert [set(range(unit.start, unit.stop)) for unit in plan.units] == skips
    counts = staircase_by_simulation(depth, skips)
    assert [plan.active(branch) for branch in range(2 * depth)] == counts
    assert plan.branch_evaluations == sum(counts)
    assert plan.block_evaluations == sum(counts) / 2
    assert plan.loop_block_evaluations == loop_by_simulation(depth, skips) / 2
    assert plan.streams == 1 + len(skips)


@pytest.mark.parametrize("branches", GRANULARITIES)
@pytest.mark.parametrize("depth", range(1, 9))
def test_costs_of_all_layers(depth, branches):
    check(depth, None, branches)


@pytest.mark.parametrize("branches", GRANULARITIES)
@pytest.mark.parametrize("depth", range(1, 5))
def test_costs_of_every_subset(depth, branches):
    for layers in subsets(depth):
        check(depth, layers, branches)
        check(depth, layers[::-1], branches)


@pytest.mark.parametrize("depth", range(1, 25))
def test_whole_blocks_cost_the_triangle_and_a_loop_the_square(depth):
    plan = AblationPlan.build(depth)
    assert plan.block_evaluations == depth * (depth + 1) / 2
    assert plan.loop_block_evaluations == depth**2


def test_units_are_named_and_ordered_by_layer():
    assert [unit.name for unit in AblationPlan.build(12, [10, 2]).units] == ["2", "10"]
    by_branch = AblationPlan.build(3, [2, 0], ("ff", "attn"))
    assert [unit.name for unit in by_branch.units] == ["0.attn", "0.ff", "2.attn", "2.ff"]
    assert by_branch.units[1] == Unit(layer=0, branch="ff", start=1, stop=2)


def test_prints_what_it_costs():
    assert str(AblationPlan.build(12)) == "12 ablations of 12 blocks: 78 block evaluations (a loop: 144), 13 streams"


@pytest.mark.parametrize(
    "layers, branches, message",
    [
        ([], None, "at least one layer"),
        ([0, 4], None, r"0-based layers below 4, got \[0, 4\]"),
        ([-1], None, r"got \[-1\]"),
        ([1, 1], None, r"distinct .* got \[1, 1\]"),
        (None, ("mlp",), r"branches: expected some of \('attn', 'ff'\), got \('mlp',\)"),
        (None, (), "branches"),
    ],
)
def test_bad_choices_are_named(layers, branches, message):
    with pytest.raises(ValueError, match=message):
        AblationPlan.build(4, layers, branches)


def test_a_fraction_is_no_layer():
    with pytest.raises(TypeError, match="integer"):
        AblationPlan.build(4, [1.5])
