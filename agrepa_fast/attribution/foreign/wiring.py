"""Find out how blocks are wired: what is their state, along which dimension it grows with the batch, who adds it.

Four samples run together, in an order of their own: another one, the first, the first with other noise, and the first
again (a last bit away, see `Watcher`). Against a run of the first alone they show what grows with the batch; against
each other, what depends on the noisy state, by more than rounding. A
forward that zeroes what a block returns shows whether the model's forward adds it to the state (`adds`).
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from ..native import nudged
from .record import Call, Shapes, Watch, flat, has_values, record

NOTHING = ""  # in place of an argument's path: zeros of the result's shape
OTHER, FIRST, DISTURBED, AGAIN = range(4)  # of the four samples


@dataclass(eq=False)
class Site:
    """A module that can be switched off, with paths into its (args, kwargs) and into its result.

    Attributes:
        state: {result path: path of the argument that it replaces}.
        dims: {result path: the dimension that grows with the batch}; layout: see `_moved`, 1 where samples are in one
            piece.
        carries: whether the noisy state passes through; None where it cannot be told.
        chained: whether a later module of its class takes its results as they are.
        aside: whether it reads the noisy state and returns another one, as a branch for control signals does.
        adds: whether the forward adds the results to the state: then zeros, not the arguments, switch it off.
        unclear: why its state is not known, where it is not; places: the arguments that each such result may replace.
        whole: template of the result (spec and leaves without tensors) where every tensor of it is state.
        written, replaced: arguments that the block changes, see `Call`.
    """

    name: str
    module: nn.Module
    state: dict[str, str] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    layout: int = 1
    carries: bool | None = None
    chained: bool = False
    adds: bool = False
    merges: bool = False
    aside: bool = False
    unclear: str = ""
    places: dict[str, list[str]] = field(default_factory=dict)
    whole: tuple[TreeSpec, list[Any]] | None = None
    written: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)

    def off(self, forward: Callable[..., Any], args: Any, kwargs: Any, run: bool = True) -> Any:
        """The result with the block switched off: its states as they came in, or zeros where the forward adds them.

        The block runs, since later blocks may read what it puts elsewhere (into a list, a cache, an attribute). Its
        states, and tensors that it would write into, are copies.

        run: False leaves the block out where every part of its result is a state."""
        paths, leaves, _ = flat((args, kwargs))
        by_path = dict(zip(paths, leaves))
        if not run and self.whole is not None and NOTHING not in self.state.values():
            spec, results = self.whole
            result_paths = _paths(spec)
        else:
            own_args = [self._apart(f"[0][{i}]", value) for i, value in enumerate(args)]
            own_kwargs = {name: self._apart(f"[1]['{name}']", value) for name, value in kwargs.items()}
            result_paths, results, spec = flat(forward(*own_args, **own_kwargs))
        by_result = dict(zip(result_paths, results))
        for result, argument in self.state.items():
            entered = by_result[result] if argument == NOTHING else by_path[argument]
            by_result[result] = torch.zeros_like(entered) if self.adds or argument == NOTHING else entered
        return tree_unflatten([by_result[path] for path in result_paths], spec)

    def _apart(self, place: str, value: Any) -> Any:
        """The argument at a path; a copy where it holds a state or something that the block writes into."""
        paths, leaves, spec = flat(value)
        mine = [path for path in paths if place + path in self.written or place + path in self.state.values()]
        if not mine:
            return value
        return tree_unflatten(
            [leaf.clone() if path in mine and isinstance(leaf, Tensor) else leaf for path, leaf in zip(paths, leaves)],
            spec,
        )

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
        nudge: modules; the states of the first of them that gets the noise are a last bit away in the sample AGAIN.

    Attributes:
        nudged: that module, and its arguments for which that was done; None where it was not.
    """

    def __init__(
        self, ones: Sequence[Call], names: dict[nn.Module, str], nudge: Collection[nn.Module] = frozenset()
    ) -> None:
        self.nudge = nudge
        self.nudged: tuple[nn.Module, set[str]] | None = None
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
        self._noisy: dict[tuple[int, int], list[str]] = {}  # of each call, the results that depend on the noise
        self._constant: dict[type[nn.Module], set[str]] = {}  # arguments that all calls of a class share

    def run(self, model: nn.Module, run: Callable[[], Any]) -> Any:
        # Nothing needs the calls of modules inside a watched module that holds no other watched one.
        innermost = [m for m in self.sites if self.sites.keys() & set(m.modules()) == {m}]
        skipped = {part for module in innermost for part in module.modules() if part is not module}
        only = {module for module in model.modules() if module not in skipped}
        result, self.calls = record(model, run, dict.fromkeys(self.sites, self._watch), only)
        for call in self.calls:
            if call.key in self.moved:
                self._wire(call, self.moved[call.key])
        self._before.clear()
        return result

    def _watch(self, call: Call, arguments: dict[str, Any], make: Callable[..., Any]) -> Any:
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
        layouts = {path: layout for path, dim in dims.items() if (layout := _moved(arguments[path], dim))}
        site.layout = max([site.layout, *layouts.values()])
        moved = list(layouts)
        entering = {path: arguments[path] for path in moved}
        result = make(self._nudged(call, arguments, dims, layouts))
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
        self._noisy[call.key] = after
        self._note_aside(site, call, arguments, dict(zip(paths, leaves)), bool(moved))
        return result

    def _nudged(
        self, call: Call, arguments: dict[str, Any], dims: dict[str, int], layouts: dict[str, int]
    ) -> dict[str, Tensor]:
        """The probable states of a call, changed by one last bit in the sample AGAIN.

        An argument is probably a state if it has the shape of a result; those that depend on the noise come first.
        Empty after the first call of a module in `nudge`, and for the other modules."""
        if self.nudged is not None or call.module not in self.nudge or set(layouts.values()) != {1}:
            return {}
        free = Counter(self.ones[call.key].results.values())
        changed = {}
        for path in (*layouts, *(path for path in dims if path not in layouts)):
            leaf, size = arguments[path], arguments[path].shape[dims[path]] // 4
            if not has_values(leaf) or not free[self.ones[call.key].arguments[path]]:
                continue
            free[self.ones[call.key].arguments[path]] -= 1
            changed[path] = leaf.clone()
            part = changed[path].narrow(dims[path], AGAIN * size, size)
            part.copy_(nudged(part))
        self.nudged = call.module, set(changed)
        return changed

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
            if path in site.dims and leaf.dim() > 2 and has_values(leaf):
                vector = leaf.flatten(0, -2)[0].clone()
                if vector.any():
                    self._aside[site.name] = vector

    def _wire(self, call: Call, moved: Sequence[str]) -> None:
        site, one = self.sites[call.module], self.ones[call.key]
        site.written |= call.written
        site.replaced |= call.replaced
        growing = grown(one.arguments, call.arguments)
        links = self._links.get(call.key, {})
        usual = links or next((v for k, v in self._links.items() if v and self._kind(k) is type(call.module)), {})
        constant = self._constant.get(type(call.module), set())
        state = {
            j: p
            for j, p in usual.items()
            if j in site.dims
            and (
                call.arguments.get(p) == call.results.get(j)
                if p in growing
                else p in call.absent and j in self._noisy[call.key]
            )
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
            if len(places) > 1 and (len(tensors) > 1 or set(places) <= set(moved)):
                site.unclear = (
                    f"{site.name}: result {j or '0'} of {len(tensors)} fits {len(places)} of its arguments: "
                    "wrap the block in a module with one state"
                )
                site.places.setdefault(j, places)
            if places:
                state[j] = places[0]
        site.state = site.state or state
        # A block works on its first argument: a decoder's layer takes its state, and then the encoder's.
        leading = [p for p in call.arguments if p in state.values() or (p in moved and p in constant)]
        site.aside |= bool(leading) and leading[0] not in state.values()
        if site.whole is not None:
            template = site.whole[1]
            opaque = any(leaf is not None and not isinstance(leaf, int | float | bool | str) for leaf in template)
            if opaque or set(call.results) != set(site.state):
                site.whole = None

    def _kind(self, key: tuple[int, int]) -> type[nn.Module]:
        return type(self.ones[key].module)


def _moved(leaf: Tensor, dim: int) -> int:
    """0 where the part of the first sample is the same with other noise, but for rounding; else the layout of the
    batch: 1 for one sample after the other, k where the k-th parts of all samples stand together (windows, or a copy of
    the batch for guidance)."""
    if not has_values(leaf):
        return 0
    wide = torch.promote_types(leaf.dtype, torch.float32)
    norm = partial(torch.linalg.vector_norm, dtype=wide)
    size = leaf.shape[dim] // 4
    for layout in (k for k in range(1, size + 1) if size % k == 0):
        parts = leaf.unflatten(dim, (layout, 4, -1)).movedim(dim + 1, 0)
        again, size_of_first = norm(parts[AGAIN] - parts[FIRST]), norm(parts[FIRST])
        if norm(parts[DISTURBED] - parts[FIRST]) > 8 * again + 4 * torch.finfo(leaf.dtype).eps * size_of_first:
            return layout
        if again <= 0.05 * size_of_first:  # the first sample's parts are equal, so this is the layout
            return 0
    return 0


class Zeroing:
    """A forward of two samples, one and itself with other noise, in which some calls return zeros.

    entries: {call key: the arguments that a call got}, copied, for the calls in `watch`."""

    def __init__(self, zeroed: Iterable[tuple[int, int]], watch: Iterable[tuple[int, int]]) -> None:
        self.zeroed, self.watch = set(zeroed), set(watch)
        self.entries: dict[tuple[int, int], dict[str, Tensor]] = {}

    def run(self, model: nn.Module, modules: Iterable[nn.Module], run: Callable[[], Any]) -> None:
        watch: dict[nn.Module, Watch] = dict.fromkeys(modules, self._watch)
        record(model, run, watch, only=watch)

    def _watch(self, call: Call, arguments: dict[str, Any], make: Callable[..., Any]) -> Any:
        if call.key in self.watch:
            self.entries[call.key] = {path: leaf.clone() for path, leaf in arguments.items() if has_values(leaf)}
        result = make()
        if call.key not in self.zeroed:
            return result
        _, leaves, spec = flat(result)
        return tree_unflatten([_zero(leaf) for leaf in leaves], spec)


def _zero(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if has_values(leaf) else leaf


def unchanged(before: Tensor, after: Tensor) -> bool:
    """Whether `after` is `before`, or two or more of it side by side (a skip connection of the same state)."""
    if before.shape[:-1] != after.shape[:-1] or after.shape[-1] % before.shape[-1] or not before.any():
        return False
    return all(torch.equal(part, before) for part in after.split(before.shape[-1], dim=-1))


def scaled(before: Tensor, after: Tensor) -> bool:
    """Whether `after` is `before` with each channel, the last dimension, times a number of its own."""
    if before.shape != after.shape or before.dim() < 3 or before.shape[-2] < 2 or not before.any() or not after.any():
        return False
    wide = torch.promote_types(before.dtype, torch.float64)
    rows, other = before.flatten(0, -2).to(wide), after.flatten(0, -2).to(wide)
    factor = (rows.conj() * other).sum(0) / rows.abs().square().sum(0)
    return bool(torch.allclose(rows * factor, other, rtol=1e-3, atol=1e-4 * float(other.abs().max())))


def independent(leaf: Tensor, dim: int, layout: int = 1) -> bool:
    """Whether two samples with other noise have the same values here."""
    return torch.equal(*leaf.unflatten(dim, (layout, 2, -1)).unbind(dim + 1))
