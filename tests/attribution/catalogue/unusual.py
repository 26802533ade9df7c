"""Small networks whose forwards pass their state on in unusual ways, each with the loop's way to switch a block off.

All take x [N, 6, 4], a condition c [N, 6, 4] and t [N]; the state inside has 8 channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

D, T, N = 8, 6, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """units: as in `Entry.blocks`; "" where the network is refused. off: what a block returns instead, given the module
    and its arguments. says: what the warning or the error says; engine: what runs."""

    network: type[nn.Module]
    units: str
    off: Callable[..., Any]
    says: str = ""
    engine: str = "prefix"


CASES: list[Case] = []


def first(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def second(module: nn.Module, one: Any, two: Any) -> Any:
    return two


def zeros(module: nn.Module, x: Tensor, *args: Any) -> Tensor:
    return torch.zeros_like(x)


def both(module: nn.Module, one: Any, two: Any) -> Any:
    return one, two


def swapped(module: nn.Module, one: Any, two: Any) -> Any:
    return two, one


def case(units: str = "blocks.0-2", off: Callable[..., Any] = first, says: str = "", engine: str = "prefix") -> Any:
    def add(network: type[nn.Module]) -> type[nn.Module]:
        CASES.append(Case(network, units, off, says, engine))
        return network

    return add


class Feed(nn.Sequential):
    """A feed-forward without a residual connection."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class Branch(nn.Module):
    """A block that returns what its caller adds."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed()

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(x)


class Block(nn.Module):
    """A block with its residual connection inside."""

    def __init__(self) -> None:
        super().__init__()
        self.feed, self.mix = Feed(), nn.Linear(D, D)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        x = x + self.feed(x if c is None else x + c)
        return x + 0.3 * self.mix(x.mean(1, keepdim=True))


class Another(Block):
    pass


class Joint(nn.Module):
    """Two states, each a residual block that sees the other's mean: (text, image) -> (image, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(image, text.mean(1, keepdim=True)), self.two(text, image.mean(1, keepdim=True))


class Net(nn.Module):
    """Embeds x and c, passes the state through `body`, projects back."""

    kind: Callable[[], nn.Module] = Block
    depth = 3

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.text, self.leave = nn.Linear(4, D), nn.Linear(4, D), nn.Linear(D, 4)
        if self.depth:
            self.blocks = nn.ModuleList(type(self).kind() for _ in range(self.depth))

    def forward(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return self.leave(self.body(self.enter(x) + t[:, None, None], self.text(c)))

    def body(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# How the state is held.


class OnDict(Block):
    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**state, "x": super().forward(state["x"], state["c"])}


@case()
class DictState(Net):
    kind = OnDict

    def body(self, x, c):
        state = {"c": c, "x": x}
        for block in self.blocks:
            state = block(state)
        return state["x"]


@dataclasses.dataclass(frozen=True)
class Packed:
    x: Tensor
    c: Tensor
    step: int = 0


class OnDataclass(Block):
    def forward(self, state: Packed) -> Packed:
        return dataclasses.replace(state, x=super().forward(state.x, state.c), step=state.step + 1)


@case(off=lambda module, state: state)
class DataclassState(Net):
    kind = OnDataclass

    def body(self, x, c):
        state = Packed(x, c)
        for block in self.blocks:
            state = block(state)
        return state.x


class Pair(NamedTuple):
    x: Tensor
    c: Tensor


class OnPair(Block):
    def forward(self, state: Pair) -> Pair:
        return Pair(super().forward(state.x, state.c), state.c)


@case()
class NamedTupleState(Net):
    kind = OnPair

    def body(self, x, c):
        state = Pair(x, c)
        for block in self.blocks:
            state = block(state)
        return state.x


class OnKeywords(Block):
    def forward(self, *, condition: Tensor, state: Tensor) -> Tensor:
        return super().forward(state, condition)


@case(off=lambda module, *, condition, state: state)
class KeywordOnlyState(Net):
    kind = OnKeywords

    def body(self, x, c):
        for block in self.blocks:
            x = block(condition=c, state=x)
        return x


class WithList(Block):
    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(x.mean())
        return super().forward(x)


@case()
class SideChannel(Net):
    kind = WithList

    def body(self, x, c):
        kept: list[Tensor] = []
        for block in self.blocks:
            x = block(x, kept)
        return x


class OnDictInPlace(OnDict):
    def forward(self, state):
        state.update(super().forward(state))


@case("", says="blocks.0 returns no tensor, so it changes its arguments or attributes")
class DictChangedInPlace(Net):
    kind = OnDictInPlace

    def body(self, x, c):
        state = {"c": c, "x": x}
        for block in self.blocks:
            block(state)
        return state["x"]


class OnOwner(Block):
    def forward(self):
        self.owner[0].state = super().forward(self.owner[0].state)


@case("", says="blocks.0 returns no tensor, so it changes its arguments or attributes")
class StateOnSelf(Net):
    kind = OnOwner

    def body(self, x, c):
        self.state = x
        for block in self.blocks:
            block.owner = [self]
            block()
        return self.state


@case("", says="depends on earlier calls: forward changes last")
class RemembersTheLastCall(Net):
    last: Tensor | None = None

    def body(self, x, c):
        before, self.last = self.last, x
        return super().body(x if before is None or before.shape != x.shape else x + 0.1 * before, c)


class AddsInPlace(Branch):
    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x)
        return x


@case()
class InPlaceResidual(Net):
    kind = AddsInPlace


class HiddenAndResidual(Branch):
    """As in Mamba: returns a branch's result and the sum so far, which is None at first."""

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return super().forward(residual), residual


@case(off=both, says="'loop' runs instead", engine="loop")
class SumBesideTheBranch(Net):
    kind = HiddenAndResidual

    def body(self, x, c):
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual)
        return x + residual


class WithSkip(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.mix(x)


@case("", says=r"blocks.0 maps \[1, 6, 8\] to \[1, 6, 8\], \[1, 6, 8\] on one sample")
class SkipsThatAreSummed(Net):
    """As in WaveNet: nothing says what a block that is off should add to the sum of the skips."""

    kind = WithSkip

    def body(self, x, c):
        total = torch.zeros_like(x)
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return total


class OnSamples(Block):
    def forward(self, samples: list[Tensor]) -> list[Tensor]:
        return [super(OnSamples, self).forward(x) for x in samples]


@case("", says="blocks.0 keeps the shape of its state, which does not grow with the number of samples")
class ListOfSamples(Net):
    kind = OnSamples

    def body(self, x, c):
        samples = list(x.split(1))
        for block in self.blocks:
            samples = block(samples)
        return torch.cat(samples)


# Joint blocks.


@case(off=swapped)
class StreamsThatSwap(Net):
    kind = Joint

    def body(self, x, c):
        for block in self.blocks:
            x, c = block(c, x)
        return x


class Straight(Joint):
    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(text, image)


def by_class(module: nn.Module, one: Any, two: Any) -> Any:
    return (one, two) if isinstance(module, Straight) else (two, one)


@case("straight.0 swapping.0", off=by_class)
class OneJointBlockOfEachKind(Net):
    """The second one's states are both noisy and have as many tokens: only running it tells which is which."""

    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.straight, self.swapping = nn.ModuleList([Straight()]), nn.ModuleList([Joint()])

    def body(self, x, c):
        x, c = self.straight[0](x, c)
        x, c = self.swapping[0](c, x)
        return x + c
