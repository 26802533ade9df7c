"""More small networks: which blocks their forwards run, how often and in which order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .unusual import AddsInPlace, Another, Block, D, Feed, Net, case


@case()
class Looped(Net):
    def body(self, x, c):
        return super().body(super().body(x, c), c)


@case("block")
class OneSharedBlock(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def body(self, x, c):
        for i in range(3):
            x = self.block(x, c * i)
        return x


@case("first middle last")
class ThreeClassesWithoutAList(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Block(), AddsInPlace(), Another()

    def body(self, x, c):
        return self.last(self.middle(self.first(x)))


@case("blocks.2 blocks.1 blocks.0")
class RunsBackwards(Net):
    kind = Another

    def body(self, x, c):
        for block in reversed(self.blocks):
            x = block(x)
        return x


@case(engine="loop", says="'loop' runs instead")
class EarlyExit(Net):
    def body(self, x, c):
        for block in self.blocks:
            before, x = x, block(x)
            if torch.equal(before, x):
                return 2 * x
        return x


class Experts(nn.Module):
    """A mixture of experts, which runs each expert on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.experts = nn.Linear(D, 3), nn.ModuleList(Feed() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen, added = self.route(tokens).argmax(-1), torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            added[rows] += expert(tokens[rows])
        return x + added.view_as(x)


@case()
class MixtureOfExperts(Net):
    kind = Experts


@case()
class MixtureOfDepths(Net):
    """Each block runs on some of the tokens."""

    def body(self, x, c):
        for block in self.blocks:
            rows = x[..., :1].topk(4, 1).indices.expand(-1, -1, D)
            x = x.scatter(1, rows, block(x.gather(1, rows)))
        return x


@case()
class Checkpointed(Net):
    def body(self, x, c):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@case()
class LayerDrop(Net):
    def body(self, x, c):
        for block in self.blocks:
            draw = torch.rand([])
            x = x if self.training and draw < 0.5 else block(x)
        return x


@case("blocks.0.0-1 blocks.1.0-1")
class NestedLists(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

    def body(self, x, c):
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        return x


@case("stages.one stages.two")
class DictOfBlocks(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"one": Block(), "two": Block()})

    def body(self, x, c):
        return self.stages["two"](self.stages["one"](x))


@case()
class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.feed[1].weight = self.blocks[0].feed[1].weight


@case("", says="Name a list")
class FunctionsOverLists(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*s) for _ in range(2)) for s in ((D, 9), (9, D)))

    def body(self, x, c):
        for up, down in zip(self.ups, self.downs):
            x = x + down(F.gelu(up(x)))
        return x
