"""Branches of other people's blocks: modules inside a block whose results the block adds to its state.

A branch is named by its place in the block ("attn1", "ff"). Branches are found by running a block again on what it was
given, with some of its modules' results set to zero or doubled, from the last module to the first. A module ends a
branch where the block's result changes in proportion to the module's and still depends on the state without it. Once a
branch is found it stays silent, so that those before it are seen alone. A block that normalises after a sum is searched
again up to that norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from .find import has_matrix, is_leaf, names_of
from .inputs import SEED
from .record import Call, copies, flat, has_values, overridden, record
from .subject import eps_of
from .wiring import Site

AUTO = (True, "auto")


class _Trials:
    """Runs one call of a block again and again, inside the forward that makes it.

    Args:
        call: the block's own forward on copies of the arguments `leaves`; takes the leaves.
        eps: of the coarsest dtype of the model.
    """

    def __init__(self, site: Site, call: Callable[[list[Any]], Any], paths: list[str], leaves: list[Any], eps: float):
        self.site, self.call, self.eps = site, call, eps
        self.paths, self.leaves = paths, leaves
        generator = torch.Generator().manual_seed(SEED)
        self.added = {}
        for path in site.state.values():
            leaf = leaves[paths.index(path)]
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            self.added[path] = noise * leaf.float().square().mean().sqrt().to(leaf)
        self.silent: list[nn.Module] = []
        self.observed: nn.Module | None = None

    def result(self, factors: dict[nn.Module, int] | None = None, moved: bool = False) -> dict[str, Tensor]:
        """The block's states, with the results of silent modules zero and others times a factor; moved: from states
        with something added to them. Where a module is `observed`, what enters it."""
        times = dict.fromkeys(self.silent, 0) | (factors or {})
        leaves = copies(self.leaves)
        for path, added in self.added.items() if moved else ():
            leaves[self.paths.index(path)] += added

        entered: list[Tensor] = []

        def scaled(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            if module is self.observed:
                entered[:] = [args[0].double()]
            _, parts, spec = flat(forward(*args, **kwargs))
            return tree_unflatten([p * times.get(module, 1) if has_values(p) else p for p in parts], spec)

        with overridden([*times, *([self.observed] if self.observed is not None else [])], scaled):
            paths, parts, _ = flat(self.call(leaves))
        if self.observed is not None:
            return dict.fromkeys(self.site.state, entered[0])
        return {path: part.double() for path, part in zip(paths, parts) if path in self.site.state}

    def repeatable(self) -> bool:
        """Whether the block gives the same twice: it keeps nothing from the call before."""
        return torch.equal(self._joined(self.result()), self._joined(self.result()))

    def effect(self, module: nn.Module) -> str:
        """How a module takes part in the block's result.

        "none": it adds nothing, or a constant. "bent": the result is not in proportion to it. "cut": the state is gone
        without it. "branch": it adds to the state."""
        without, once, twice = (self._joined(self.result({module: factor})) for factor in (0, 1, 2))
        rounding = 64 * self.eps * once.norm()
        effect, bend = (once - without).norm(), (twice - 2 * once + without).norm()
        if effect <= rounding:
            return "none"
        if bend > 1e-3 * effect + rounding:
            return "bent"
        with_moved, moved = (self._joined(self.result({module: factor}, moved=True)) for factor in (1, 0))
        if (moved - without).norm() <= 1e-3 * self._joined(self.added).norm():
            return "cut"
        # A gate that multiplies a bias adds the same whatever the state is.
        return "branch" if ((with_moved - moved) - (once - without)).norm() > 1e-3 * effect + rounding else "none"

    def alike(self, one: nn.Module, other: nn.Module) -> bool:
        """Whether the block's result is the same without one as without the other."""
        a, b, usual = (self._joined(self.result(factors)) for factors in ({one: 0}, {other: 0}, {}))
        return bool((a - b).norm() <= 1e-3 * (usual - b).norm())

    def complete(self) -> bool:
        """Whether the silent modules are all that the block adds to its states, but for constants as biases are."""
        before, after = self.result(), self.result(moved=True)
        for path, entered in self.site.state.items():
            added = self.added[entered].double()
            if (after[path] - before[path] - added).norm() > 1e-3 * added.norm():
                return False
        return True

    def passes(self, norm: nn.Module) -> bool:
        """Whether the silent modules are all that is added to the result of `norm`, but for constants."""
        after_it, inside = [], _Inside(norm)
        for moved in (False, True):
            with inside:
                result = self._joined(self.result(moved=moved))
            after_it.append((result, inside.result.double().flatten()))
        (before, plain), (after, changed) = after_it
        if before.shape != plain.shape:
            return False
        return bool((after - before - (changed - plain)).norm() <= 1e-3 * (changed - plain).norm())

    def _joined(self, states: dict[str, Tensor]) -> Tensor:
        return torch.cat([states[path].double().flatten() for path in sorted(states)])


class _Inside:
    """Keeps the last result of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.result = torch.empty(0)

    def __enter__(self) -> None:
        self.hook = self.module.register_forward_hook(lambda _, args, result: setattr(self, "result", result.clone()))

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def _search_sums(trials: _Trials, calls: Sequence[Call]) -> list[nn.Module] | None:
    """The branches of a block, in the sum that it returns and in those that its norms take before that (a block that
    normalises after each sum); None where a sum has other parts, too."""
    found: list[nn.Module] = []
    while True:
        trials.silent = []
        found = _without_doubles(trials, _search(trials, calls, None)) + found
        if trials.complete():
            return found
        norms = [c for c in calls if is_leaf(c.module) and not has_matrix(c.module) and len(c.results) == 1]
        if len(trials.site.state) > 1 or not (norm := next((c for c in reversed(norms) if _cuts(trials, c)), None)):
            return None
        if not trials.passes(norm.module):
            return None
        trials.observed, calls = norm.module, [call for call in calls if call.order < norm.order]


def _cuts(trials: _Trials, call: Call) -> bool:
    usual = call.results.keys() == call.floating and call.arguments.get("[0][0]") in call.results.values()
    return usual and trials.effect(call.module) == "cut"


def _search(trials: _Trials, calls: Sequence[Call], parent: nn.Module | None) -> list[nn.Module]:
    """The branches among the modules that `parent` (None: the block) calls, and inside those that cut."""
    found: list[nn.Module] = []
    scope = [call for call in calls if (call.parent and call.parent.module) is parent]
    for i in range(len(scope) - 1, -1, -1):
        module = scope[i].module
        if trials.observed is not None and trials.observed in module.modules():
            found = _search(trials, calls, module) + found
            continue
        if not scope[i].floating or module in trials.silent or isinstance(module, nn.Identity):
            continue
        if not has_matrix(module) and any(call.module is module for call in scope[:i]):
            continue  # a dropout, say, of several branches
        effect = trials.effect(module)
        if effect == "cut":
            found = _search(trials, calls, module) + found
        elif effect == "branch":
            ends = _feeders(trials, scope[:i], module)
            for end, place in ends if len(ends) > 1 else [(module, i)]:
                branch = _with_weights(trials, scope[:place], end)
                found.insert(0, branch)
                trials.silent.append(branch)
    return found


def _feeders(trials: _Trials, before: Sequence[Call], module: nn.Module) -> list[tuple[nn.Module, int]]:
    """Where a branch ends in one Linear of several modules' results side by side (attention and feed-forward in
    parallel): those modules, each with its place among the calls `before`."""
    found: list[tuple[nn.Module, int]] = []
    if not isinstance(getattr(module, "base_layer", module), nn.Linear):
        return found
    silent = list(trials.silent)
    for i in range(len(before) - 1, -1, -1):
        feeder = before[i].module
        if not before[i].floating or trials.effect(feeder) != "branch":
            continue
        trials.silent.append(module)
        past = trials.effect(feeder) != "none"  # it reaches the state by another way, too
        trials.silent.remove(module)
        if not past:
            found.append((feeder, i))
            trials.silent.append(feeder)
    trials.silent[:] = silent
    return found


def _with_weights(trials: _Trials, before: Sequence[Call], module: nn.Module) -> nn.Module:
    """The module itself, or in place of a dropout, a scale, a norm or an activation the one whose result it takes."""
    if has_matrix(module):
        return module
    for call in reversed(before):
        if call.floating and has_matrix(call.module) and call.module not in trials.silent:
            return call.module if trials.alike(call.module, module) else module
    return module


def _without_doubles(trials: _Trials, found: list[nn.Module]) -> list[nn.Module]:
    """Leave out norms and the like that do nothing once another branch is silent: that branch has several results."""
    kept = list(dict.fromkeys(found))
    for module in found:
        trials.silent = [other for other in kept if other is not module]
        if not has_matrix(module) and trials.effect(module) == "none":
            kept.remove(module)
    trials.silent = kept
    return kept


def find_branches(known: Any, blocks: Sequence[Site]) -> dict[str, list[str]]:
    """{name of a block: the names of its branches inside it}, in the order in which the block calls them.

    Args:
        known: the `Examination` of the model.

    Raises:
        ValueError: what a block adds to its state is not the sum of the results of modules in it.
    """
    by_kind: dict[object, list[str] | None] = {}
    result: dict[str, list[str]] = {}
    pending = {site.module: site for site in blocks}

    def probe(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        site = pending.pop(module, None)
        if site is None:
            return forward(*args, **kwargs)
        names = names_of(module)
        kind = type(module), tuple(names.values())
        if kind not in by_kind:
            by_kind[kind] = _branches_of(known, site, names, forward, args, kwargs)
        found = by_kind[kind]
        if found is None:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"branches: what {site.name} adds to its state is no sum of results of its modules ({children}): give "
                "branches the names of those to switch off, or leave it out"
            )
        result[site.name] = found
        return forward(*args, **kwargs)

    with overridden(pending, probe):
        known.subject.forward(torch.tensor([known.first]))
    return result


def _branches_of(
    known: Any, site: Site, names: dict[nn.Module, str], forward: Callable[..., Any], args: Any, kwargs: Any
) -> list[str] | None:
    paths, leaves, spec = flat((args, kwargs))
    states = [leaves[paths.index(path)] for path in site.state.values()]
    if any(state is None or state.is_complex() for state in states):
        return None

    def call(changed: list[Any]) -> Any:
        again_args, again_kwargs = tree_unflatten(changed, spec)
        return forward(*again_args, **again_kwargs)

    trials = _Trials(site, call, paths, leaves, eps_of(known.model, torch.empty(0, dtype=known.dtype)))
    if not trials.repeatable():
        return None
    _, calls = record(site.module, lambda: call(copies(leaves)))
    found = _search_sums(trials, calls)
    return [names[module] for module in found] if found else None


def branch_names(model: nn.Module, blocks: Sequence[str], branches: Sequence[str]) -> dict[str, tuple[int, str]]:
    """{name of a module: (its block's layer, its name in the block)}, block by block.

    Raises:
        TypeError, ValueError: no names, or one that no block has; lists the modules that the first block has.
    """
    if isinstance(branches, str) or not branches or not all(isinstance(name, str) for name in branches):
        raise TypeError(
            f"branches: expected 'auto' or names of modules inside the blocks, as ['attn', 'ff'], got {branches!r}"
        )
    modules = dict(model.named_modules())
    for branch in branches:
        if not any(f"{block}.{branch}" in modules for block in blocks):
            have = ", ".join(name for name, _ in modules[blocks[0]].named_children()) or "none"
            raise ValueError(f"branches: no block has a module {branch!r}; the modules of {blocks[0]} are: {have}")
    return {
        f"{block}.{branch}": (layer, branch)
        for layer, block in enumerate(blocks)
        for branch in dict.fromkeys(branches)
        if f"{block}.{branch}" in modules
    }


def check_branches(known: Any, sites: Sequence[Site], names: dict[str, tuple[int, str]]) -> None:
    """Refuse a named module that its block does not add to the state, for each class of blocks once.

    Args:
        known: the `Examination` of the model. sites: of the blocks.

    Raises:
        ValueError: names the module.
    """
    modules = dict(known.model.named_modules())
    checked: set[tuple[type[nn.Module], str]] = set()
    for name, (layer, branch) in names.items():
        site = sites[layer]
        if (type(site.module), branch) in checked:
            continue
        checked.add((type(site.module), branch))
        try:
            found = find_branches(known, [site])[site.name]
        except ValueError:
            found = []
        if branch in found:
            continue
        together = {modules[other] for other, (at, _) in names.items() if at == layer and other != name}
        together |= {site.module.get_submodule(other) for other in found} - {modules[name]}
        inside = set(modules[name].modules())
        others = [m for m in together if m not in inside and modules[name] not in m.modules()]
        without, once, twice = (_block_result(known, site.module, modules[name], others, f) for f in (0, 1, 2))
        effect, bend = (once - without).norm(), (twice - 2 * once + without).norm()
        rounding = 64 * eps_of(known.model, once) * once.norm()
        if effect <= rounding:
            raise ValueError(f"branches: {name} changes nothing in what {site.name} returns: it is no branch of it")
        if bend > 1e-3 * effect + rounding:
            raise ValueError(
                f"branches: {site.name} does not add the result of {name} to its state"
                + (f"; its branches are {', '.join(found)}" if found else ": name all of its branches together")
            )


def _block_result(known: Any, block: nn.Module, branch: nn.Module, others: Iterable[nn.Module], factor: int) -> Tensor:
    """A block's results on the first sample, with one branch's result times `factor` and the others' set to zero."""
    results: list[Any] = []

    def scaled(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        if module is block:
            results.append(result)
            return result
        by = factor if module is branch else 0
        _, parts, spec = flat(result)
        return tree_unflatten([part * by if has_values(part) else part for part in parts], spec)

    with overridden([block, branch, *others], scaled):
        known.subject.forward(torch.tensor([known.first]))
    _, leaves, _ = flat(results)
    return torch.cat([leaf.double().flatten() for leaf in leaves if has_values(leaf)])
