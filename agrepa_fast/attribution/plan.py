"""The staircase of a batched layer ablation: when each stream joins the batch, and what that costs.

Switching off a unit (a block, or one of its branches) changes nothing before it. So stream k starts as a copy of the
baseline's state before unit k and joins the batch after the unit. Branch i of the chain then runs once, on the
baseline and the streams that have joined: L (L + 1) / 2 block evaluations for L blocks, against L^2 for a loop.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..models.cost import branch_flops
from .scores import integer

BRANCHES = ("attn", "ff")  # the branches of a block, in order


@dataclass(frozen=True)
class Unit:
    """The branches that one stream switches off: start <= i < stop of the chain, and those of `more`.

    layer: the first layer. more: further ranges (start, stop), if the layers are not contiguous.
    """

    layer: int
    branch: str | None  # "attn", "ff", or None for whole blocks
    start: int
    stop: int
    more: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_layers(cls, layers: Sequence[int]) -> Unit:
        """Whole blocks, given as ascending layers."""
        first, *more = _ranges(layers)
        return cls(layers[0], None, *first, tuple(more))

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers in which a branch is switched off."""
        return tuple(dict.fromkeys(i // 2 for start, stop in self.ranges for i in range(start, stop)))

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return ((self.start, self.stop), *self.more)

    @property
    def name(self) -> str:
        """ "3", "3.attn", or "0+1+5" for a set."""
        return "+".join(map(str, self.layers)) if self.branch is None else f"{self.layer}.{self.branch}"

    def skips(self, branch: int) -> bool:
        """Whether the unit switches this branch off."""
        return any(start <= branch < stop for start, stop in self.ranges)


def _ranges(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of branches of ascending layers; neighbouring layers share a range."""
    ranges: list[tuple[int, int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == 2 * layer:
            ranges[-1] = (ranges[-1][0], 2 * layer + 2)
        else:
            ranges.append((2 * layer, 2 * layer + 2))
    return ranges


@dataclass(frozen=True)
class Sizes:
    """Sizes on which the memory of a probe depends, beside its plan: frames of a sample, sizes of the `DiT`, bytes."""

    frames: int
    width: int
    ff_ratio: int
    mels: int
    heads: int
    element_bytes: int  # of x_t and the weights: 2 for bfloat16, 4 for float32, 8 for float64
    masked: bool = False  # whether a mask says which frames count


@dataclass(frozen=True)
class AblationPlan:
    """The streams of a probe of a chain of 2 `depth` branches; stream 0 is the baseline, stream k + 1 is units[k].

    The units are in the order in which their streams join, which is ascending in `stop`. A stream runs every branch
    after it has joined; the results of the branches in `Unit.more` are not added to it.

    Attributes:
        depth: number of blocks. units: what is switched off, one a stream.
        control: whether one more sequence runs, which measures the noise floor. One pass of a probe needs it.
    """

    depth: int
    units: tuple[Unit, ...]
    control: bool = True

    @classmethod
    def build(
        cls, depth: int, layers: Sequence[int] | None = None, branches: Sequence[str] | None = None
    ) -> AblationPlan:
        """Plan the ablation of `layers` (0-based; None = all) as whole blocks (branches=None) or branch by branch.

        Raises:
            ValueError: a layer is not in 0..depth - 1 or occurs twice, a branch is unknown, or there is no layer.
            TypeError: a layer is not an integer.
        """
        chosen = list(range(depth)) if layers is None else [operator.index(layer) for layer in layers]
        if not chosen:
            raise ValueError("blocks: expected at least one layer")
        if len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(depth)):
            raise ValueError(f"blocks: expected distinct 0-based layers below {depth}, got {chosen}")
        if branches is not None and (not branches or not set(branches) <= set(BRANCHES)):
            raise ValueError(f"branches: expected some of {BRANCHES}, got {tuple(branches)}")
        units = []
        for layer in sorted(chosen):
            if branches is None:
                units.append(Unit(layer, None, 2 * layer, 2 * layer + 2))
                continue
            for j, branch in enumerate(BRANCHES):
                if branch in branches:
                    units.append(Unit(layer, branch, 2 * layer + j, 2 * layer + j + 1))
        return cls(depth, tuple(units))

    @classmethod
    def of_sets(cls, depth: int, sets: Iterable[Sequence[int]], early: bool = False) -> AblationPlan:
        """Plan the ablation of whole sets of layers, each an ascending sequence without duplicates (`layer_sets`).

        early: order the units by their first layer, where the streams of other models join."""
        units = sorted(map(Unit.of_layers, sets), key=lambda unit: (unit.stop, unit.start, unit.more))
        return cls(depth, tuple(sorted(units, key=lambda unit: unit.start) if early else units))

    def active(self, branch: int) -> int:
        """Number of streams that run this branch: the baseline and each unit that has joined before it."""
        return 1 + sum(unit.stop <= branch for unit in self.units)

    @property
    def streams(self) -> int:
        return 1 + len(self.units)

    @property
    def branch_evaluations(self) -> int:
        """Evaluations of a branch on one batch of samples, over the whole staircase."""
        return sum(self.active(branch) for branch in range(2 * self.depth))

    @property
    def block_evaluations(self) -> float:
        """Cost in block evaluations: L (L + 1) / 2 when every whole block is ablated."""
        return self.branch_evaluations / len(BRANCHES)

    @property
    def loop_block_evaluations(self) -> float:
        """Cost of a loop of forwards that skip the switched-off branches: L^2 when every whole block is ablated."""
        skipped = sum(stop - start for unit in self.units for start, stop in unit.ranges)
        return (2 * self.depth * self.streams - skipped) / len(BRANCHES)

    def peak_bytes(self, sizes: Sizes, samples: int) -> int:
        """Peak memory of the staircase on `samples` samples in bytes, without weights and inputs.

        It is the largest of: the two inner activations of a feed-forward; qkv, mixture and output of an attention; the
        op between branches in plain PyTorch (fused kernels need less), with statistics in float32 or wider; and the
        comparison of the velocities. Each counts the streams that are present, the control and the modulation.
        """
        element, statistics = sizes.element_bytes, max(4, sizes.element_bytes)
        state = samples * sizes.frames * sizes.width  # elements of one stream's residual state
        wide = statistics // element  # bytes of a statistic over bytes of a state element
        peak = 0.0
        control = self.control / samples
        for i in range(2 * self.depth):
            r = self.active(i) + control
            # The states of the baseline that are kept for units of several branches, and the streams after the branch.
            kept = sum(unit.start <= i < unit.stop and unit.stop - unit.start > 1 for unit in self.units)
            joining = sum(unit.stop == i + 1 for unit in self.units)
            kept += joining if joining > 1 else 0  # several are concatenated first
            s = r + joining
            log_sums = samples * sizes.frames * sizes.heads * statistics * r / (state * element)
            branch = 2 * r + (2 * sizes.ff_ratio * r if i % 2 else 5 * r + log_sums) + kept
            # If a stream skips the branch, the sum of the others and their concatenation exist at the same time.
            added = 2 * r + (wide * (r + s) if s > r else wide * 2 * r if wide > 1 else r)
            opened = 2 * r + 3 * wide * s + (s if wide > 1 else 0)
            if i + 1 == 2 * self.depth:
                opened = 0
            peak = max(peak, branch, added + kept, opened + kept if opened else 0)
        modulation = samples * 6 * self.depth * sizes.width
        baseline = samples * sizes.frames * sizes.mels
        velocity = (self.streams + control) * baseline
        closing = 2 * (self.streams + control) * state + velocity
        compared = velocity * element + (3 if sizes.masked else 2) * (self.streams - 1) * baseline * statistics
        if statistics > element:
            compared += baseline * statistics  # the baseline's velocity, converted
        return int(
            max(peak * state * element + modulation * element, closing * element + modulation * element, compared)
        )

    def flops(self, sizes: Sizes, samples: int) -> int:
        """Floating-point operations of all branches on `samples` samples, and on the control if there is one."""
        branches = branch_flops(sizes.width, sizes.ff_ratio, sizes.frames)
        sequences = (self.active(i) * samples + self.control for i in range(2 * self.depth))
        return sum(count * branches[i % 2] for i, count in enumerate(sequences))

    def __str__(self) -> str:
        return (
            f"{len(self.units)} ablations of {self.depth} blocks: {self.block_evaluations:g} block evaluations "
            f"(a loop: {self.loop_block_evaluations:g}), {self.streams} streams"
        )


def layer_sets(
    depth: int, sets: Iterable[Iterable[int | str]] | None, spans: int | None, names: Mapping[str, int]
) -> list[tuple[int, ...]]:
    """The sets of layers to ablate, each ascending: `sets`, or all runs of `spans` neighbouring layers.

    Args:
        names: {name of a block: its layer}, for sets that hold names.

    Raises:
        ValueError: a layer is unknown, a set is empty or occurs twice, a length does not fit, or both sets and spans
            are given.
        TypeError: a layer is neither an integer nor a name.
    """
    if spans is not None:
        if sets is not None:
            raise ValueError("sets, spans: give one of them")
        length = integer("spans", spans)
        if not 1 <= length <= depth:
            raise ValueError(f"spans: expected 1 to {depth} blocks, got {spans}")
        return [tuple(range(first, first + length)) for first in range(depth - length + 1)]
    groups: list[tuple[int, ...]] = []
    for members in sets if isinstance(sets, Iterable) else [sets]:
        if isinstance(members, str | int) or not isinstance(members, Iterable):
            raise TypeError(f"sets: expected sequences of layers, as [[0, 1], [4]], got {members!r:.60}")
        layers = []
        for member in members:
            if isinstance(member, str) and member not in names:
                raise ValueError(f"sets: no block {member!r}; blocks are {', '.join(names) or f'0 to {depth - 1}'}")
            layers.append(names[member] if isinstance(member, str) else integer("sets", member))
        outside = [layer for layer in layers if not 0 <= layer < depth]
        if outside or not layers or len(set(layers)) < len(layers):
            raise ValueError(f"sets: expected distinct 0-based layers below {depth}, at least one, got {layers}")
        groups.append(tuple(sorted(layers)))
    if not groups or len(set(groups)) < len(groups):
        raise ValueError(f"sets: expected at least one set, and none twice, got {groups}")
    return groups


def split(plan: AblationPlan, sizes: Sizes, samples: int, budget: int) -> tuple[tuple[AblationPlan, ...], int]:
    """Split a probe so that it fits in `budget` bytes with the least recomputation: (plans, samples in one batch).

    Samples are independent, so smaller batches compute nothing twice. If one sample does not fit, the units are divided
    among as few plans as possible, and each plan runs the baseline again (2 `depth` branches).

    Raises:
        ValueError: not even one unit of one sample fits; says how many bytes it needs.
    """
    if plan.peak_bytes(sizes, 1) <= budget:
        fitting = 1
        while fitting < samples and plan.peak_bytes(sizes, fitting + 1) <= budget:
            fitting += 1
        return (plan,), fitting
    for count in range(2, len(plan.units) + 1):
        bounds = [len(plan.units) * k // count for k in range(count + 1)]
        parts = tuple(AblationPlan(plan.depth, plan.units[a:b], a == 0) for a, b in itertools.pairwise(bounds))
        if all(part.peak_bytes(sizes, 1) <= budget for part in parts):
            return parts, 1
    singles = (AblationPlan(plan.depth, (unit,), unit is plan.units[0]) for unit in plan.units)
    needed = max(single.peak_bytes(sizes, 1) for single in singles)
    raise ValueError(f"memory_budget: {budget} bytes are too few for one layer of one sample: give at least {needed}")
