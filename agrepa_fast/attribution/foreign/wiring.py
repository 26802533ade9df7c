"""Find out how the blocks of a model are called: which tensors are the residual state and which carry the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Wiring:
    """How one block is called: leaves of its (args, kwargs) and of its result, numbered as pytree does.

    batch: {argument leaf: (dimension, size of one sample)}. state: {result leaf: argument leaf it replaces}."""

    batch: dict[int, tuple[int, int]]
    state: dict[int, int]
    results: int
    result_spec: Any


@dataclass
class Call:
    block: int
    arguments: list[Any]
    results: list[Any]
    result_spec: Any


def check_shapes(name: str, call: Call) -> None:
    results = [leaf for leaf in call.results if isinstance(leaf, Tensor)]
    given = [leaf for leaf in call.arguments if isinstance(leaf, Tensor)]
    if not results or not any(leaf.shape == result.shape for leaf in given for result in results):
        raise ValueError(
            f"{name} (layer {call.block}) maps {_shapes(given)} to {_shapes(results)}: a block "
            "that changes the shape of its input cannot be switched off"
        )


def wire(names: Sequence[str], ones: list[Call], twos: list[Call]) -> tuple[list[Wiring], str]:
    """The wiring of every block, and why the blocks are no chain ("" where they are one)."""
    why = ""
    wirings: list[Wiring] = []
    for layer, (one, two) in enumerate(zip(ones, twos)):
        batch, odd = _batch_leaves(one.arguments, two.arguments)
        if odd:
            why = why or f"{names[layer]}: an argument grows from {odd[0]} to {odd[1]} with a second sample"
        state = {}
        if layer + 1 < len(names):
            following = ones[layer + 1].arguments
            for j, result in enumerate(one.results):
                places = [p for p, leaf in enumerate(following) if isinstance(leaf, Tensor) and leaf is result]
                if places and places[0] < len(one.arguments):
                    state[j] = places[0]
        elif wirings:
            state = {j: p for j, p in wirings[-1].state.items() if isinstance(one.results[j], Tensor)}
        state = {j: p for j, p in state.items() if _same_shape(one.arguments[p], one.results[j])}
        tensors = [j for j, leaf in enumerate(one.results) if isinstance(leaf, Tensor)]
        chained = set(state) == set(tensors)
        for j in set(tensors) - set(state):
            places = [
                p
                for p, leaf in enumerate(one.arguments)
                if _same_shape(leaf, one.results[j]) and p in batch and p not in state.values()
            ]
            if len(places) > 1 and len(tensors) > 1:
                raise ValueError(
                    f"{names[layer]} returns {len(tensors)} tensors and result {j} fits {len(places)} of its "
                    "arguments: wrap the block in a module with one state"
                )
            if places:
                state[j] = places[0]
        if any(p not in batch for p in state.values()):
            raise ValueError(f"{names[layer]}: its state does not carry the samples of the inputs' first axis")
        if not chained and len(names) > 1:
            why = why or f"something happens between {names[layer]} and what follows it"
        if wirings and any(wirings[-1].state.get(j, p) != p for j, p in state.items()):
            why = why or f"{names[layer]} is called in another way than the block before"
        wirings.append(Wiring(batch, state, len(one.results), one.result_spec))
    return wirings, why


def _batch_leaves(
    one: Sequence[Any], two: Sequence[Any]
) -> tuple[dict[int, tuple[int, int]], tuple[list[int], list[int]] | None]:
    """Which leaves carry the batch, by what grew with a second sample; and the shapes of one that grew oddly."""
    batch, odd = {}, None
    for p, (a, b) in enumerate(zip(one, two)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape == b.shape:
            continue
        grown = [dim for dim in range(a.dim()) if a.dim() == b.dim() and a.shape[dim] != b.shape[dim]]
        if len(grown) != 1 or b.shape[grown[0]] != 2 * a.shape[grown[0]]:
            odd = (list(a.shape), list(b.shape))
        else:
            batch[p] = (grown[0], a.shape[grown[0]])
    return batch, odd


def _same_shape(argument: Any, result: Any) -> bool:
    return isinstance(argument, Tensor) and isinstance(result, Tensor) and argument.shape == result.shape


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in tensors) or "nothing"
