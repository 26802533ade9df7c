"""Which streams exist when: the staircase of a batched layer ablation, in pure Python.

Switching a unit (a block, or one of its branches) off changes nothing before it. So stream k is a copy of the
baseline's state from before unit k and joins the batch after it. Branch i of the chain then runs once, on the
baseline and the streams that have joined: L (L + 1) / 2 block evaluations for L blocks, against L^2 for a loop.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

BRANCHES = ("attn", "ff")  # the branches of a block, in order


@dataclass(frozen=True)
class Unit:
    """What one stream switches off: the branches start <= i < stop of the chain."""

    layer: int
    branch: str | None  # "attn", "ff", or None for the whole block
    start: int
    stop: int

    @property
    def name(self) -> str:
        return str(self.layer) if self.branch is None else f"{self.layer}.{self.branch}"


@dataclass(frozen=True)
class AblationPlan:
    """The streams of a probe of a chain of 2 `depth` branches; stream 0 is the baseline, stream k + 1 is units[k]."""

    depth: int
    units: tuple[Unit, ...]

    @classmethod
    def build(
        cls, depth: int, layers: Sequence[int] | None = None, branches: Sequence[str] | None = None
    ) -> AblationPlan:
        """Plan the ablation of `layers` (0-based; None = all), whole (branches=None) or branch by branch.

        Raises:
            ValueError: on a layer outside 0..depth - 1, a duplicate, an unknown branch or an empty choice.
            TypeError: on a layer that is not an integer.
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

    def active(self, branch: int) -> int:
        """Streams that run the given branch: the baseline and every unit that has joined by then."""
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
        """The same, in blocks: L (L + 1) / 2 when every whole block is ablated."""
        return self.branch_evaluations / len(BRANCHES)

    @property
    def loop_block_evaluations(self) -> float:
        """What a loop of full forwards costs that skips the switched-off branches: L^2 for all whole blocks."""
        skipped = sum(unit.stop - unit.start for unit in self.units)
        return (2 * self.depth * self.streams - skipped) / len(BRANCHES)

    def __str__(self) -> str:
        return (
            f"{len(self.units)} ablations of {self.depth} blocks: {self.block_evaluations:g} block evaluations "
            f"(a loop: {self.loop_block_evaluations:g}), {self.streams} streams"
        )
