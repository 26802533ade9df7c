"""Find out how blocks are wired: what is their state, along which dimension it grows with the batch, who adds it.

Four samples run together, in an order of their own: another one, the first, the first with other noise, and the first
again. Against a run of the first alone they show what grows with the batch; against each other, what depends on the
noisy state, by more than rounding. A
forward that zeroes what a block returns shows whether the model's forward adds it to the state (`adds`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_map, tree_unflatten

from .record import Call, Shapes, flat, record

OTHER, FIRST, DISTURBED, AGAIN = range(4)  # of the four samples


@dataclass(eq=False)
class Site:
    """A module that can be switched off, with paths into its (args, kwargs) and into its result.

    Attributes:
        state: {result path: path of the argument that it replaces}.
        dims: {result path: the dimension that grows with the batch}.
        carries: whether the noisy state passes through; None where it cannot be told.
        chained: whether a later module of its class takes its results as they are.
        aside: whether it reads the noisy state and returns another one, as a branch for control signals does.
        adds: whether the forward adds the results to the state: then zeros, not the arguments, switch it off.
        unclear: why its state is not known, where it is not.
        whole: template of the result (spec and leaves without tensors) where every tensor of it is state.
    """

    name: str
    module: nn.Module
    state: dict[str, str] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    carries: bool | None = None
    chained: bool = False
    adds: bool = False
    merges: bool = False
    aside: bool = False
    unclear: str = ""
    whole: tuple[TreeSpec, list[Any]] | None = None

    def off(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result with the block switched off; it runs only where a part of its result is no state."""
        paths, leaves, _ = flat((args, kwargs))
        by_path = dict(zip(paths, leaves))
        entering = {}
        for result, argument in self.state.items():
            value = by_path[argument]
            if self.adds:
                value = torch.zeros_like(value)
            elif self.whole is None:
                value = value.clone()  # the block may write into its input
            entering[result] = value
        if self.whole is not None:
            spec, template = self.whole
            return tree_unflatten([entering.get(path, leaf) for path, leaf in zip(_paths(spec), template)], spec)
        result_paths, results, spec = flat(forward(*args, **kwargs))
        return tree_unflatten([entering.get(path, leaf) for path, leaf in zip(result_paths, results)], spec)

    def by_state(self) -> dict[str, Site]:
        """The site with each of its states alone, by the name of the argument that the state comes in."""
        parameters = list(inspect.signature(type(self.module).forward).parameters)[1:]

        def name(path: str) -> str:
            positional, *rest = re.findall(r"\w+", path)  # "[1]['hidden_states']", or "[0][2]" for a positional one
            if positional == "0" and int(rest[0]) < len(parameters):
                rest[0] = parameters[int(rest[0])]
            return ".".join(rest)

        whole = self.whole if len(self.state) == 1 else None
        return {name(p): replace(self, state={result: p}, whole=whole) for result, p in self.state.items()}


def _paths(spec: TreeSpec) -> list[str]:
    return flat(tree_unflatten(list(range(spec.num_leaves)), spec))[0]


def grown(ones: Shapes, others: Shapes, times: int = 4, alike: bool = False) -> dict[str, int]:
    """{path: dimension} of what has `times` the size with `times` the samples.

    alike: whether the samples of both are the same; others may bring another length to the other dimensions."""
    dims = {}
    for path, shape in ones.items():
        other = others.get(path)
        if other is None or len(other) != len(shape):
            continue
        changed = [d for d, (a, b) in enumerate(zip(shape, other)) if a != b]
        by_samples = [d for d in changed if other[d] == times * shape[d]]
        if by_samples and (len(changed) == 1 or not alike):
            dims[path] = by_samples[0]
    return dims


class Watcher:
    """Runs the four samples and keeps, of each module to watch, how it is wired.

    Args:
        ones: the calls of a recorded forward of the first sample alone.
        names: of the modules to watch.
    """

    def __init__(self, ones: Sequence[Call], names: dict[nn.Module, str]) -> None:
        self.ones = {call.key: call for call in ones}
        self.sites = {module: Site(name, module) for module, name in names.items()}
        self.calls: list[Call] = []
        self.moved: dict[tuple[int, int], list[str]] = {}  # of each call, the arguments that depend on the noise
        self.argument_dims: dict[tuple[int, int], dict[str, int]] = {}
        # Names of sites without the noise whose results are in the arguments of one with it.
        self.joining: set[str] = set()
        self._aside: dict[str, Tensor] = {}
        self._before: dict[type[nn.Module], tuple[Call, dict[str, Any], dict[str, Any]]] = {}
        self._links: dict[tuple[int, int], dict[str, str]] = {}
        self._constant: dict[type[nn.Module], set[str]] = {}  # arguments that all calls of a class share

    def run(self, model: nn.Module, run: Callable[[], Any]) -> Any:
        result, self.calls = record(model, run, dict.fromkeys(self.sites, self._watch))
        for call in self.calls:
            if call.key in self.moved:
                self._wire(call, self.moved[call.key])
        self._before.clear()
        return result

    def _watch(self, call: Call, arguments: dict[str, Any], make: Callable[[], Any]) -> Any:
        kind, site, one = type(call.module), self.sites[call.module], self.ones.get(call.key)
        before = self._before.pop(kind, None)
        if before is not None:
            links: dict[str, str] = {}
            for j, result in before[1].items():
                for p, leaf in arguments.items():
                    if leaf is result and p not in links.values():
                        links.setdefault(j, p)
            self._links[before[0].key] = links
            same = {p for p, leaf in arguments.items() if isinstance(leaf, Tensor) and before[2].get(p) is leaf}
            self._constant[kind] = self._constant.get(kind, same) & same
        if one is None:
            return make()
        dims = grown(one.arguments, call.arguments)
        moved = [path for path, dim in dims.items() if _moved(arguments[path], dim)]
        entering = {path: arguments[path] for path in moved}
        result = make()
        paths, leaves, spec = flat(result)
        result_dims = grown(one.results, {p: leaf.shape for p, leaf in zip(paths, leaves) if isinstance(leaf, Tensor)})
        after = [p for p, leaf in zip(paths, leaves) if p in result_dims and _moved(leaf, result_dims[p])]
        if dims and result_dims:
            site.carries = bool(site.carries) or bool(moved and after)
        site.dims.update(result_dims)
        result_shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
        merged = {id(leaf) for leaf in entering.values() if leaf.shape in result_shapes}
        site.merges |= len(merged) > len(result_shapes)
        site.whole = spec, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._before[kind] = call, {p: leaf for p, leaf in zip(paths, leaves) if isinstance(leaf, Tensor)}, arguments
        self.moved[call.key], self.argument_dims[call.key] = moved, dims
        self._note_aside(site, call, arguments, dict(zip(paths, leaves)), bool(moved))
        return result

    def _note_aside(
        self, site: Site, call: Call, arguments: dict[str, Any], results: dict[str, Any], moved: bool
    ) -> None:
        """Remember a vector of what a module without the noise returns, and look for it where the noise is."""
        dims = self.argument_dims[call.key]
        tokens = [arguments[path] for path in dims if arguments[path].dim() > 2]
        if moved:
            for name, vector in self._aside.items():
                for leaf in tokens:
                    fits = leaf.shape[-1] == vector.numel() and leaf.dtype == vector.dtype
                    if fits and (leaf.flatten(0, -2) == vector).all(-1).any():
                        self.joining.add(name)
            return
        for path, leaf in results.items():
            if path in site.dims and leaf.dim() > 2 and leaf.is_floating_point():
                vector = leaf.flatten(0, -2)[0].clone()
                if vector.any():
                    self._aside[site.name] = vector

    def _wire(self, call: Call, moved: Sequence[str]) -> None:
        site, one = self.sites[call.module], self.ones[call.key]
        growing = grown(one.arguments, call.arguments)
        links = self._links.get(call.key, {})
        usual = links or next((v for k, v in self._links.items() if v and self._kind(k) is type(call.module)), {})
        constant = self._constant.get(type(call.module), set())
        state = {
            j: p
            for j, p in usual.items()
            if p in growing and j in site.dims and call.arguments.get(p) == call.results.get(j)
        }
        site.chained |= bool(links) and set(links.items()) <= set(state.items())
        tensors = [j for j in call.results if j in call.floating and j in site.dims]
        for j in tensors:
            if j in state:
                continue
            places = [
                p
                for p in growing
                if call.arguments[p] == call.results[j] and p not in state.values() and p not in constant
            ]
            places = [p for p in places if p in moved] or places
            if len(places) > 1 and len(tensors) > 1:
                site.unclear = (
                    f"{site.name} returns {len(tensors)} tensors and result {j} fits {len(places)} of its arguments: "
                    "wrap the block in a module with one state"
                )
            if places:
                state[j] = places[0]
        site.state = site.state or state
        # What comes first is what a block works on: a decoder's layer takes its state and then the encoder's.
        leading = [p for p in call.arguments if p in state.values() or (p in moved and p in constant)]
        site.aside |= bool(leading) and leading[0] not in state.values()
        if site.whole is not None:
            template = site.whole[1]
            opaque = any(leaf is not None and not isinstance(leaf, int | float | bool | str) for leaf in template)
            if opaque or set(call.results) != set(site.state):
                site.whole = None

    def _kind(self, key: tuple[int, int]) -> type[nn.Module]:
        return type(self.ones[key].module)


def _moved(leaf: Tensor, dim: int) -> bool:
    """Whether the part of the first sample differs with other noise, by more than with its place in the batch."""
    if not leaf.is_floating_point():
        return False
    parts = leaf.unflatten(dim, (4, -1)).movedim(dim, 0)
    wide = torch.promote_types(leaf.dtype, torch.float32)
    norm = partial(torch.linalg.vector_norm, dtype=wide)
    rounding = 8 * norm(parts[AGAIN] - parts[FIRST]) + 4 * torch.finfo(leaf.dtype).eps * norm(parts[FIRST])
    return bool(norm(parts[DISTURBED] - parts[FIRST]) > rounding)


class Zeroing:
    """A forward of two samples, one and itself with other noise, in which some calls return zeros.

    entries: {call key: the arguments that a call got}, copied, for the calls in `watch`."""

    def __init__(self, zeroed: Iterable[tuple[int, int]], watch: Iterable[tuple[int, int]]) -> None:
        self.zeroed, self.watch = set(zeroed), set(watch)
        self.entries: dict[tuple[int, int], dict[str, Tensor]] = {}

    def run(self, model: nn.Module, modules: Iterable[nn.Module], run: Callable[[], Any]) -> None:
        record(model, run, dict.fromkeys(modules, self._watch))

    def _watch(self, call: Call, arguments: dict[str, Any], make: Callable[[], Any]) -> Any:
        if call.key in self.watch:
            self.entries[call.key] = {
                path: leaf.clone()
                for path, leaf in arguments.items()
                if isinstance(leaf, Tensor) and leaf.is_floating_point()
            }
        result = make()
        if call.key not in self.zeroed:
            return result
        return tree_map(_zero, result)


def _zero(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def unchanged(before: Tensor, after: Tensor) -> bool:
    """Whether `after` is `before`, or two or more of it side by side (a skip connection of the same state)."""
    if before.shape[:-1] != after.shape[:-1] or after.shape[-1] % before.shape[-1] or not before.any():
        return False
    return all(torch.equal(part, before) for part in after.split(before.shape[-1], dim=-1))


def independent(leaf: Tensor, dim: int) -> bool:
    """Whether two samples with other noise have the same values here."""
    return torch.equal(*leaf.chunk(2, dim))
