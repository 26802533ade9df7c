"""What an entry of the catalogue holds, and the loop that says what its scores must be.

Nothing here calls the code under test: the loop replaces one block at a time by hand, with the names and the states
that the entry states.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

N = 2  # samples of an entry


@dataclass(frozen=True)
class Entry:
    """One model class.

    Attributes:
        name: class, and what is special about this case.
        build: returns the model and its inputs (by name, or a tuple).
        blocks: the names of all units in the order of the forward; "blocks.0-2" stands for three of them.
        state: the arguments that a block gives back when it is switched off, in the order of its results; by the name
            of the block's list where lists differ. "" stands for the first argument.
        zeroed: for layers that are lists of modules: the modules of each layer that add to the residual sum.
        engine: "staircase" or "dense": what engine="auto" is expected to run.
        beside: module lists that a forward runs but that hold no residual block of the velocity's state (a text
            encoder's, say), each with the reason.
        output: the part of forward's result that is the velocity; None where it is a tensor or has `.sample`.
        single: run in float32, where a class computes in float32 inside whatever its weights are; else in float64.
        mask: the input [N, T] that says which frames of the velocity [N, T, ...] count.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any]]
    blocks: str
    state: str | dict[str, str] = ""
    zeroed: tuple[str, ...] = ()
    engine: str = "staircase"
    beside: dict[str, str] = field(default_factory=dict)
    output: Callable[[Any], Tensor] | None = None
    single: bool = False
    mask: str = ""

    def made(self) -> tuple[nn.Module, Any]:
        """The model with random weights, and its inputs."""
        model, inputs = self.build()
        randomise(model)
        if not self.single:
            return model, inputs
        return model.float(), tree_map(
            lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
        )

    @property
    def units(self) -> list[str]:
        """The names of all units, in the order in which they run."""
        names = []
        for part in self.blocks.split():
            found = re.fullmatch(r"(.*\D)?(\d+)-(\d+)", part)
            prefix, first, last = found.groups() if found else (part, None, None)
            names += [part] if found is None else [f"{prefix}{i}" for i in range(int(first), int(last) + 1)]
        return names


class Draw:
    """Random tensors in float64; the same for the same entry."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).double()


def randomise(model: nn.Module) -> nn.Module:
    """Random parameters in float64, so that no gate and no projection is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def velocity(entry: Entry, output: Any) -> Tensor:
    output = entry.output(output) if entry.output is not None else getattr(output, "sample", output)
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def switched_off(entry: Entry, model: nn.Module, name: str) -> Iterator[None]:
    """Block `name` gives back what it is given: its states, or zeros from the modules that add to the sum."""
    modules = [model.get_submodule(f"{name}.{part}") for part in entry.zeroed] or [model.get_submodule(name)]
    states = entry.state if isinstance(entry.state, str) else entry.state[name.rpartition(".")[0]]

    def hook(module: nn.Module, args: tuple, kwargs: dict, result: Any) -> Any:
        leaves, spec = tree_flatten(result)
        if entry.zeroed:
            return tree_unflatten([torch.zeros_like(leaves[0]), *leaves[1:]], spec)
        taken = [kwargs[state] if state in kwargs else _positional(module, args, state) for state in states.split()]
        for j, state in enumerate(taken or [args[0] if args else next(iter(kwargs.values()))]):
            if leaves[j] is not None:  # the last block of some joint models leaves a stream out
                assert leaves[j].shape == state.shape, (name, j, leaves[j].shape, state.shape)
                leaves[j] = state
        return tree_unflatten(leaves, spec)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _positional(module: nn.Module, args: tuple, name: str) -> Any:
    return args[list(inspect.signature(type(module).forward).parameters).index(name) - 1]


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """No gradient, and without the path of nn.TransformerEncoder that packs padded batches, where no hook is called."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@plain()
def scores_by_loop(entry: Entry, model: nn.Module, inputs: Any) -> np.ndarray:
    """[units, samples] FoG-A's score, by one forward for each unit."""
    base = velocity(entry, call(model, inputs)).double()
    mask = inputs[entry.mask] if entry.mask else None
    result = []
    for name in entry.units:
        with switched_off(entry, model, name):
            changed = velocity(entry, call(model, inputs)).double()
        row = []
        for n in range(len(base)):
            v, w = (x[n] if mask is None else x[n][mask[n]] for x in (base, changed))
            row.append(((w - v).square().mean() + 1e-8).sqrt() / ((v.square().mean() + 1e-8).sqrt() + 1e-8))
        result.append(row)
    return np.array(result)
