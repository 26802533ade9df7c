"""More small networks: blocks that write elsewhere than into their result. A block that is off runs and keeps doing so,
except into tensors that it was given: it leaves its states and the sums that it would add to as they came in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .unusual import AddsInPlace, Block, Net, OnDict, case


def runs(module: nn.Module, x: Tensor, *others: object) -> Tensor:
    """Runs the block on a copy of its state, for what it puts elsewhere."""
    type(module).forward(module, x.clone(), *others)
    return x


class AddsToTheSum(Block):
    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        x = super().forward(x)
        total.add_(x.tanh())
        return x


@case()
class SumInPlace(Net):
    kind = AddsToTheSum

    def body(self, x, c):
        total = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x, total)
        return x + total


@case()
class LongSkipOfAStateChangedInPlace(Net):
    kind = AddsInPlace

    def body(self, x, c):
        start = x  # the blocks change it
        for block in self.blocks:
            x = block(x)
        return x + 0.3 * start.tanh()


class FillsACache(Block):
    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        if "values" not in cache:
            cache["values"] = self.mix(x)
        return super().forward(x, cache["values"])


@case(off=runs, says="'stacked' runs instead", engine="stacked")
class SharedCache(Net):
    """As where later layers attend to the keys and values of an earlier one."""

    kind = FillsACache

    def body(self, x, c):
        cache: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, cache)
        return x


class Keeps(Block):
    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        x = super().forward(x)
        kept.append(x)
        return x


class Takes(Block):
    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return super().forward(x, kept.pop())


@case("blocks.0-3", off=runs, says="'stacked' runs instead", engine="stacked")
class SkipsInAList(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Keeps(), Keeps(), Takes(), Takes()])

    def body(self, x, c):
        kept: list[Tensor] = []
        for block in self.blocks:
            x = block(x, kept)
        return x


class SharesValues(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.owner[0].values = self.mix(x)
        return super().forward(x, self.owner[0].values)


@case("blocks.0-3", off=runs, says="'stacked' runs instead", engine="stacked")
class ValuesOnTheModel(Net):
    kind, depth = SharesValues, 4

    def __init__(self) -> None:
        super().__init__()
        for i, block in enumerate(self.blocks):
            block.first, block.owner = i % 2 == 0, [self]


class ChangesTheDict(OnDict):
    def forward(self, state):
        state.update(super().forward(state))
        return state


@case(off=lambda module, state: state, says="puts its new state into an argument", engine="loop")
class ResultIgnored(Net):
    kind = ChangesTheDict

    def body(self, x, c):
        state = {"c": c, "x": x}
        for block in self.blocks:
            block(state)
        return state["x"]
