"""More small networks: who adds a block's result to what, other states beside it, and other shapes of the batch."""

from __future__ import annotations

import torch
from torch import nn

from .unusual import AddsInPlace, Another, Block, Branch, D, Net, case, first, zeros

# Who adds.


@case(off=zeros)
class Scaled(Net):
    kind = Branch

    def body(self, x, c):
        for block in self.blocks:
            x = 0.7 * x + 0.5 * block(x)
        return x


@case()
class Interpolated(Net):
    """The forward mixes the state with what the block makes of it: a block that is off gives back the state."""

    def body(self, x, c):
        for block in self.blocks:
            x = 0.2 * x + 0.8 * block(x)
        return x


@case()
class MixedWithTheFirstState(Net):
    def body(self, x, c):
        start = x
        for block in self.blocks:
            x = 0.5 * block(x) + 0.5 * start
        return x


@case(off=zeros)
class NormedAfterTheSum(Net):
    kind = Branch

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in self.blocks)

    def body(self, x, c):
        for block, norm in zip(self.blocks, self.norms):
            x = norm(x + block(x))
        return x


@case("left.0 right.0 left.1 right.1", off=zeros)
class Parallel(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(Branch() for _ in range(2)) for _ in range(2))

    def body(self, x, c):
        for left, right in zip(self.left, self.right):
            x = x + left(x) + right(x)
        return x


@case("blocks.0-3", off=zeros)
class Reversible(Net):
    kind, depth = Branch, 4

    def body(self, x, c):
        other = x.flip(1)
        for one, two in zip(self.blocks[::2], self.blocks[1::2]):
            x = x + one(other)
            other = other + two(x)
        return x + other


@case()
class NoResidual(Net):
    kind = Branch

    def body(self, x, c):
        for block in self.blocks:
            x = block(x).tanh()
        return x


def by_class(module, x):
    return zeros(module, x) if isinstance(module, Branch) else x


@case("before.0-1 lone.0 blocks.0-2", off=by_class)
class OneThatIsAdded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.lone = nn.ModuleList(Another() for _ in range(2)), nn.ModuleList([Branch()])

    def body(self, x, c):
        for block in self.before:
            x = block(x)
        return super().body(x + self.lone[0](x), c)


@case("", says="cannot tell what forward does with the results of last.0")
class LastOneThatIsAdded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ModuleList([Branch()])

    def body(self, x, c):
        x = super().body(x, c)
        return x + self.last[0](x)


@case("blocks.0-3")
class TwoClassesInTurn(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Another(), Block(), Another()])


# What else there is beside the state.


@case()
class InjectedBetween(Net):
    def body(self, x, c):
        for block in self.blocks:
            x = block(x) + c
        return x


@case("control.0-2 blocks.0-2")
class ControlResiduals(Net):
    def __init__(self) -> None:
        super().__init__()
        self.control = nn.ModuleList(Block() for _ in self.blocks)

    def body(self, x, c):
        control, added = x + c, []
        for block in self.control:
            control = block(control)
            added.append(control.tanh())
        for block, more in zip(self.blocks, added):
            x = block(x) + more
        return x


@case("blocks.0-4")
class LongSkips(Net):
    depth = 5

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(2))

    def body(self, x, c):
        kept = []
        for block in self.blocks[:2]:
            x = block(x)
            kept.append(x)
        x = self.blocks[2](x)
        for block, join in zip(self.blocks[3:], self.join):
            x = block(join(torch.cat([x, kept.pop()], -1)))
        return x


@case("encoder.0-1 blocks.0-2")
class NoisyEncoder(Net):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(2))

    def body(self, x, c):
        for block in self.encoder:
            x = block(x)
        state = x.flip(1)
        for block in self.blocks:
            state = block(state, x)
        return state


@case(says="encoder.0, encoder.1 are not scored: they see the condition alone")
class TextEncoder(Net):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Another() for _ in range(2))

    def body(self, x, c):
        for block in self.encoder:
            c = block(c)
        for block in self.blocks:
            x = block(x, c)
        return x


class TakesTheFirst(Block):
    def forward(self, start, x):
        return super().forward(x, start)


@case(off=lambda module, start, x: x)
class FirstStateComesFirst(Net):
    kind = TakesTheFirst

    def body(self, x, c):
        start = x
        for block in self.blocks:
            x = block(start, x)
        return x


class Doubles(Block):
    """A block of a stage that another class makes narrower: it cannot be switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(D, 2 * D)

    def forward(self, x):
        return self.wide(super().forward(x))


class Pools(Block):
    def forward(self, x):
        return super().forward(x[..., :D] + x[..., D:])


@case("blocks.0-1 blocks.4", says=r"blocks.2, blocks.3 are not scored")
class TwoThatChangeTheShape(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Doubles(), Pools(), Block()])


@case("blocks.1-2", says=r"blocks.0 are not scored")
class FirstChangesTheShape(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Pools(), Block(), Block()])

    def body(self, x, c):
        return super().body(torch.cat([x, c], -1), c)


@case("groups.0.one groups.0.two", says="groups.0.wide are not scored")
class OneOfSeveralInABlock(Net):
    """A stage whose blocks are no list, with one of another class that changes the shape."""

    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([nn.Module()])
        group = self.groups[0]
        group.one, group.two, group.wide = Block(), Block(), Doubles()
        group.forward = lambda x: group.wide(group.two(group.one(x)))

    def body(self, x, c):
        return self.groups[0](x)[..., :D]


# How the batch is laid out.


@case("blocks.0-3")
class FoldedIntoWindows(Net):
    depth = 4

    def body(self, x, c):
        for i, block in enumerate(self.blocks):
            x = block(x.reshape(-1, 3, D)).view_as(x) if i % 2 else block(x)
        return x


@case("blocks.0-3", says="apart from each other; engine 'loop' runs", engine="loop")
class WindowsFirst(Net):
    depth = 4

    def body(self, x, c):
        for i, block in enumerate(self.blocks):
            if i % 2 == 0:
                x = block(x)
                continue
            windows = x.unflatten(1, (2, 3)).transpose(0, 1)
            x = block(windows.flatten(0, 1)).view_as(windows).transpose(0, 1).flatten(1, 2)
        return x


@case(says="apart from each other; engine 'loop' runs", engine="loop")
class DoubledForGuidance(Net):
    def body(self, x, c):
        with_text, without = super().body(torch.cat([x + c, x]), c).chunk(2)
        return without + 3 * (with_text - without)


class TimeFirst(Block):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@case()
class TimeBeforeSamples(Net):
    kind = TimeFirst

    def body(self, x, c):
        return super().body(x.transpose(0, 1), c).transpose(0, 1)


@case("narrow.0-1 wide.0-1")
class ReshapedBetweenStages(Net):
    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(Block() for _ in range(2))
        self.wide = nn.ModuleList(nn.TransformerEncoderLayer(2 * D, 2, 8, 0.0, batch_first=True) for _ in range(2))

    def body(self, x, c):
        for block in self.narrow:
            x = block(x)
        x = x.reshape(len(x), -1, 2 * D)
        for block in self.wide:
            x = block(x)
        return x.reshape(len(x), -1, D)


@case("", says="blocks.0 keeps the shape of its state, which does not grow with the number of samples")
class PackedTokens(Net):
    """Padding left out: the tokens of all samples stand in one row."""

    kind = AddsInPlace

    def forward(self, x, c, t):
        kept = torch.arange(x.shape[1]) < (4 + 2 * (t > 0.5).long())[:, None]
        state = (self.enter(x) + t[:, None, None])[kept][None]
        result = torch.zeros(*x.shape[:2], D, dtype=x.dtype)
        result[kept] = super().body(state, c)[0]
        return self.leave(result)


class OtherName(Block):
    def step(self, x):
        return Block.forward(self, x)


@case(off=first)
class BlocksCalledByAnotherName(Net):
    """The parts of a block are switched off, for its own forward is never called."""

    kind = OtherName

    def body(self, x, c):
        for block in self.blocks:
            x = block.step(x)
        return x


class AlongFrames(nn.Module):
    """As Vocos: channels before frames."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 1)

    def forward(self, x):
        return x + self.out(torch.tanh(self.mix(x)))


@case("pairs.0.0-1 pairs.1.0-1")
class PairsOfBlocks(Net):
    """A layer of two residual blocks of other layouts; zeros in place of both leave no state for the next layer."""

    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList([Block(), AlongFrames()]) for _ in range(2))

    def body(self, x, c):
        for block, along in self.pairs:
            x = along(block(x).mT).mT
        return x
