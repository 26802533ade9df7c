"""Watch a forward: which modules it calls, in which order, on what; and let modules behave otherwise for a while."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    TreeSpec,
    keystr,
    register_pytree_node,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)

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
    floating: frozenset[str] = frozenset()  # paths of results that are floating or complex tensors
    eps: float = 0.0  # of the coarsest dtype among them
    absent: frozenset[str] = frozenset()  # paths of arguments that are None
    opaque: bool = False  # whether a part of the result is neither a tensor nor a plain value
    plain: dict[str, Any] = field(default_factory=dict)  # parts of the result that are no tensors
    written: frozenset[str] = frozenset()  # paths of arguments that are tensors which the call changes in place
    replaced: frozenset[str] = frozenset()  # paths at which the call puts something else: entries of a list or dict

    @property
    def key(self) -> tuple[int, int]:
        return id(self.module), self.number


class _Fields:
    """Stands in for a dataclass while its fields are taken apart; unflattening gives a dataclass again."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.names = [f.name for f in fields(value) if hasattr(value, f.name)]
        self.parts = [_opened(getattr(value, name)) for name in self.names]


def _rebuilt(parts: Iterable[Any], taken: _Fields) -> Any:
    value = copy.copy(taken.value)
    for name, part in zip(taken.names, parts):
        object.__setattr__(value, name, part)  # also where the class is frozen
    return value


register_pytree_node(
    _Fields,
    lambda taken: (taken.parts, taken),
    _rebuilt,
    flatten_with_keys_fn=lambda taken: ([(GetAttrKey(n), p) for n, p in zip(taken.names, taken.parts)], taken),
)


def _is_fields(leaf: Any) -> bool:
    return is_dataclass(leaf) and not isinstance(leaf, type)


def _opened(value: Any) -> Any:
    return tree_map(lambda leaf: _Fields(leaf) if _is_fields(leaf) else leaf, value)


# Common leaves: asking pytree whether their class is a container takes most of the time.
LEAVES = {Tensor, nn.Parameter, type(None), bool, int, float, str}


def flat(value: Any) -> tuple[list[str], list[Any], TreeSpec]:
    """Leaves of nested tuples, lists, dicts and dataclasses with the path of each."""
    if type(value) is Tensor:
        paths, spec = _flat_form(None)
        return paths[:], [value], spec
    if type(value) is tuple:
        leaves, keys = list(value), None
        if len(value) == 2 and type(value[0]) is tuple and type(value[1]) is dict:  # the arguments of a call
            leaves, keys = [*value[0], *value[1].values()], tuple(value[1])
        if LEAVES.issuperset(map(type, leaves)) and {str}.issuperset(map(type, keys or ())):
            paths, spec = _flat_form(len(leaves) if keys is None else len(value[0]), keys)
            return paths[:], leaves, spec
    return _flat(value)


@functools.lru_cache(maxsize=1024)
def _flat_form(length: int | None, keys: tuple[str, ...] | None = None) -> tuple[list[str], TreeSpec]:
    """Paths and spec of a tensor (length None), of a tuple, or of positional and keyword arguments, of leaves alone.

    Taking these apart in general costs as much as a small block."""
    one: Any = 0 if length is None else (0,) * length
    paths, _, spec = _flat(one if keys is None else (one, dict.fromkeys(keys, 0)))
    return paths, spec


def _flat(value: Any) -> tuple[list[str], list[Any], TreeSpec]:
    if any(_is_fields(leaf) for leaf in tree_flatten(value)[0] if not isinstance(leaf, Tensor)):
        value = _opened(value)
    try:
        pairs, spec = tree_flatten_with_path(value)
    except ValueError:  # a class of results that is registered without names of its parts
        leaves, spec = tree_flatten(value)
        return [str(i) for i in range(len(leaves))], leaves, spec
    return [keystr(path) for path, _ in pairs], [leaf for _, leaf in pairs], spec


def shapes(paths: Iterable[str], leaves: Iterable[Any]) -> Shapes:
    return {path: leaf.shape for path, leaf in zip(paths, leaves) if isinstance(leaf, Tensor)}


def copies(leaves: Iterable[Any]) -> list[Any]:
    """The leaves of a call's arguments for another call, which may write into them: also caches and other objects."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        plain = leaf is None or isinstance(leaf, (*PLAIN, nn.Module)) or callable(leaf)
        return leaf if plain else copy.deepcopy(leaf)

    return [copied(leaf) for leaf in leaves]


def with_leaves(args: Any, kwargs: Any, leaves: list[Any], given: list[Any], spec: TreeSpec) -> tuple[Any, Any]:
    """The arguments with other leaves. One whose leaves are the same is the same object: a block may write into it."""
    changed = {id(leaf) for leaf, part in zip(leaves, given) if leaf is not part}
    new_args, new_kwargs = tree_unflatten(given, spec)

    def chosen(old: Any, new: Any) -> Any:
        return new if any(id(leaf) in changed for leaf in flat(old)[1]) else old

    return (
        tuple(chosen(old, new) for old, new in zip(args, new_args)),
        {name: chosen(old, new_kwargs[name]) for name, old in kwargs.items()},
    )


def has_values(leaf: Any) -> bool:
    """Whether this is a tensor of floating or complex numbers, as a state is."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def version_of(leaf: Any) -> int:
    """Counts the changes of a tensor in place; 0 for all else."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


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


Watch = Callable[[Call, dict[str, Any], Callable[..., Any]], Any]


def record(
    model: nn.Module,
    run: Callable[[], Any],
    watch: dict[nn.Module, Watch] | None = None,
    only: Container[nn.Module] | None = None,
) -> tuple[Any, list[Call]]:
    """Call `run`; return its result and the calls of modules in it, in their order.

    watch: {module: function(call, its argument leaves by path, what makes the call) -> the call's result}. What makes
    the call takes {path: another value} for some of the leaves.
    only: the modules to record; None: all."""
    calls: list[Call] = []
    stack: list[Call] = []
    counts: dict[nn.Module, int] = {}

    def note(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        paths, leaves, spec = flat((args, kwargs))
        number = counts.get(module, 0)
        counts[module] = number + 1
        absent = frozenset(path for path, leaf in zip(paths, leaves) if leaf is None)
        call = Call(module, number, stack[-1] if stack else None, len(calls), shapes(paths, leaves), absent=absent)
        calls.append(call)
        stack.append(call)

        def make(changed: Mapping[str, Any] | None = None) -> Any:
            given, passed = leaves, (args, kwargs)
            if changed:
                given = [changed.get(path, leaf) for path, leaf in zip(paths, leaves)]
                passed = with_leaves(args, kwargs, leaves, given, spec)
            versions = [version_of(leaf) for leaf in given]
            result = forward(*passed[0], **passed[1])
            after = dict(zip(*flat(passed)[:2]))
            kept = [(p, leaf, v) for p, leaf, v in zip(paths, given, versions) if after.get(p) is leaf]
            call.written = frozenset(path for path, leaf, version in kept if version_of(leaf) != version)
            call.replaced = frozenset({*paths, *after} - {path for path, *_ in kept})
            return result

        try:
            if watch and module in watch:
                result = watch[module](call, dict(zip(paths, leaves)), make)
            else:
                result = forward(*args, **kwargs)
        finally:
            stack.pop()
        result_paths, result_leaves, _ = flat(result)
        call.results = shapes(result_paths, result_leaves)
        floating = {path: leaf for path, leaf in zip(result_paths, result_leaves) if has_values(leaf)}
        call.floating = frozenset(floating)
        call.eps = max((torch.finfo(leaf.dtype).eps for leaf in floating.values()), default=0.0)
        call.plain = {p: leaf for p, leaf in zip(result_paths, result_leaves) if not isinstance(leaf, Tensor)}
        call.opaque = any(leaf is not None and not isinstance(leaf, PLAIN) for leaf in result_leaves)
        return result

    with overridden([m for m in watchable(model) if only is None or m in only], note):
        return run(), calls
