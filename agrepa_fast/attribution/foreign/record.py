"""Watch a forward: which modules it calls, in which order, on what; and let modules behave otherwise for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path

PLAIN = (Tensor, bool, int, float, str)

Shapes = dict[str, torch.Size]  # of the tensors of a call's arguments or results, by their path


@dataclass
class Call:
    """One call of a module: its number among the calls of that module, and the call inside which it was made."""

    module: nn.Module
    number: int
    parent: Call | None
    order: int
    arguments: Shapes
    results: Shapes = field(default_factory=dict)
    floating: frozenset[str] = frozenset()  # paths of results that are floating tensors
    opaque: bool = False  # whether a part of the result is neither a tensor nor a plain value
    plain: dict[str, Any] = field(default_factory=dict)  # parts of the result that are no tensors

    @property
    def key(self) -> tuple[int, int]:
        return id(self.module), self.number


def flat(value: Any) -> tuple[list[str], list[Any], TreeSpec]:
    """Leaves of nested tuples, lists and dicts with the path of each."""
    try:
        pairs, spec = tree_flatten_with_path(value)
    except ValueError:  # a class of results that is registered without names of its parts
        leaves, spec = tree_flatten(value)
        return [str(i) for i in range(len(leaves))], leaves, spec
    return [keystr(path) for path, _ in pairs], [leaf for _, leaf in pairs], spec


def shapes(paths: Iterable[str], leaves: Iterable[Any]) -> Shapes:
    return {path: leaf.shape for path, leaf in zip(paths, leaves) if isinstance(leaf, Tensor)}


@contextlib.contextmanager
def overridden(modules: Iterable[nn.Module], behaviour: Callable[..., Any]) -> Iterator[None]:
    """Each module's forward is `behaviour(module, its own forward, *args, **kwargs)`; undone on every exit."""
    own = [(module, vars(module).get("forward")) for module in dict.fromkeys(modules)]
    try:
        for module, _ in own:
            vars(module)["forward"] = partial(behaviour, module, module.forward)
        yield
    finally:
        for module, forward in own:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def watchable(model: nn.Module) -> list[nn.Module]:
    """The modules whose calls can be watched: all but scripted ones, which are compiled, and the model itself."""
    return [m for m in model.modules() if m is not model and not isinstance(m, torch.jit.ScriptModule)]


Watch = Callable[[Call, dict[str, Any], Callable[[], Any]], Any]


def record(
    model: nn.Module, run: Callable[[], Any], watch: dict[nn.Module, Watch] | None = None
) -> tuple[Any, list[Call]]:
    """What `run` returns, and all calls of modules that it makes, in their order.

    watch: {module: function(call, its argument leaves by path, what makes the call) -> the call's result}."""
    calls: list[Call] = []
    stack: list[Call] = []
    counts: dict[nn.Module, int] = {}

    def note(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        paths, leaves, _ = flat((args, kwargs))
        number = counts.get(module, 0)
        counts[module] = number + 1
        call = Call(module, number, stack[-1] if stack else None, len(calls), shapes(paths, leaves))
        calls.append(call)
        stack.append(call)
        try:
            if watch and module in watch:
                result = watch[module](call, dict(zip(paths, leaves)), lambda: forward(*args, **kwargs))
            else:
                result = forward(*args, **kwargs)
        finally:
            stack.pop()
        result_paths, result_leaves, _ = flat(result)
        call.results = shapes(result_paths, result_leaves)
        call.floating = frozenset(
            path
            for path, leaf in zip(result_paths, result_leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        )
        call.plain = {p: leaf for p, leaf in zip(result_paths, result_leaves) if not isinstance(leaf, Tensor)}
        call.opaque = any(leaf is not None and not isinstance(leaf, PLAIN) for leaf in result_leaves)
        return result

    with overridden(watchable(model), note):
        return run(), calls
