"""Choose what is scored among the modules that were found and watched, and name what is not.

A module whose results the forward adds to the state is switched off by zeros, one whose results are the state by its
arguments. Where the results do not go into the next block as they are, a forward in which they are zeros tells.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .find import Found, Group, has_matrix, is_substantial, keeps_shape
from .record import Call
from .subject import Subject
from .wiring import Site, Watcher, Zeroing, independent, unchanged


@dataclass(frozen=True)
class Block:
    """One scored layer: its name in the model, and what switches it off (several sites if forward takes it apart)."""

    name: str
    sites: tuple[Site, ...]


class Choice:
    """The blocks of a model, in the order in which its forward calls them.

    Args:
        first: the examined sample; calls: of a forward of it alone. watcher: has run on the four samples.
        found: what block_list names (`named`), or else what was found; automatic: what was found.
        state: path of the noisy state in the inputs, None where there is none.
    """

    def __init__(
        self,
        subject: Subject,
        first: int,
        calls: Sequence[Call],
        watcher: Watcher,
        found: Found,
        automatic: Found,
        named: bool,
        state: str | None,
    ) -> None:
        self.subject, self.first, self.calls, self.watcher = subject, first, calls, watcher
        self.found, self.automatic, self.named, self.state = found, automatic, named, state
        self.model, self.kind, self.adapter = subject.model, subject.kind, subject.adapter
        self.beside = dict(automatic.left_out)
        self.blocks: list[Block] = []
        self._choose()

    def _choose(self) -> None:
        sites, found = self.watcher.sites, self.found
        if not any(site.carries for site in sites.values()):
            # No noisy state, or one so large that noise does not show: what runs is taken to carry it.
            for site in sites.values():
                site.carries = bool(site.dims)
        blocks = []
        candidates = dict(found.blocks)
        for members in _by_list(found.groups):
            if not any(sites[call.module].carries for group in members for call in group.calls):
                continue
            if self._forward_adds(members):
                blocks += [Block(group.name, self._added(group)) for group in members]
                continue
            inner = {sites[call.module].name: call for group in members for call in group.calls}
            inner = {name: call for name, call in inner.items() if is_substantial(call.module)}
            # Where a stage holds lists of blocks, they are its blocks: what stands beside them shapes the state.
            listed = {name for name in inner if name.rpartition(".")[0] not in {group.name for group in members}}
            fitting = {name for name, call in inner.items() if keeps_shape(call)}
            fitting = fitting & listed or fitting
            candidates.update({name: inner[name].module for name in fitting})
            self.beside.update({name: call.module for name, call in inner.items() if name not in fitting})
        named = found.blocks if self.named else {}
        singles = [
            sites[module]
            for name, module in candidates.items()
            if sites[module].state and (sites[module].carries or name in named)
        ]
        if not self.named and not all(site.aside for site in singles):
            singles = [site for site in singles if not site.aside]
        for site in singles:
            if site.unclear:
                raise ValueError(site.unclear)
        self._who_adds(singles)
        blocks += [Block(site.name, (site,)) for site in singles]
        order = {call.module: call.order for call in reversed(self.calls)}
        blocks.sort(key=lambda block: order[block.sites[0].module])
        if not blocks:
            raise ValueError(self._nothing_found())
        self.blocks = blocks
        self._warn_of_others(order)

    def _added(self, group: Group) -> tuple[Site, ...]:
        """The modules of a group whose results the forward may add to the state."""
        sites = dict.fromkeys(self.watcher.sites[call.module] for call in group.calls if keeps_shape(call))
        return tuple(site for site in sites if site.carries and not site.merges and has_matrix(site.module))

    def _forward_adds(self, groups: Sequence[Group]) -> bool:
        """Whether the state is the same before and after a group whose modules return zeros."""
        sites = self.watcher.sites
        states = [site for group in groups for site in self._added(group)]
        if not states or any(site.chained for site in states):
            return False
        zeroed = [group for i, group in enumerate(groups) if i % 2 == 0 and i + 1 < len(groups)] or list(groups)
        off = {site.module for group in zeroed for site in self._added(group)}
        keys = {call.key for group in zeroed for call in group.calls if call.module in off}
        run = self._zeroing(keys, {call.key for group in groups for call in group.calls})
        if not any(self._passes_on(run, group, after, off) for group, after in zip(groups, [*groups[1:], None])):
            return False
        for site in states:
            site.adds = True
        return all(sites[site.module].state for site in states)

    def _passes_on(self, run: Zeroing, group: Group, after: Group | None, off: set[nn.Module]) -> bool:
        """Whether what follows a group that returned zeros takes what entered one of its modules."""
        moved = self.watcher.moved
        last = max((i for i, call in enumerate(group.calls) if call.module in off), default=None)
        if last is None:
            return False
        # A call with two states would show the state whether or not zeros were added to it.
        following = [call for call in group.calls[last + 1 :] if len(moved.get(call.key, ())) == 1]
        following += after.calls[:1] if after is not None else ()
        entered = [
            run.entries[call.key][path]
            for call in group.calls[: last + 1]
            for path in moved.get(call.key, ())
            if path in run.entries.get(call.key, ())
        ]
        return any(
            unchanged(before, run.entries[call.key][path])
            for call in following
            for path in moved.get(call.key, ())
            for before in entered
            if path in run.entries.get(call.key, ())
        )

    def _who_adds(self, sites: Sequence[Site]) -> None:
        """Settle `adds` of the blocks, class by class, where their results are not the next one's arguments."""
        by_kind: dict[type[nn.Module], list[Call]] = {}
        of = {site.module: site for site in sites}
        for call in self.calls:
            if call.module in of:
                by_kind.setdefault(type(call.module), []).append(call)
        for kind, calls in by_kind.items():
            own = [of[call.module] for call in calls]
            if self.adapter.adds is not None:
                adds = self.adapter.adds
            elif any(site.chained for site in own) or len(calls) == 1:
                continue
            else:
                adds = self._adds(kind, calls, of)
            for site in own:
                site.adds = adds

    def _adds(self, kind: type[nn.Module], calls: Sequence[Call], of: Mapping[nn.Module, Site]) -> bool:
        """Whether the forward adds the results of blocks of one class: what the next one gets when one returns zeros.

        They are the state where that depends neither on the noise nor on the block before; they are added where it is
        what entered, or that with something else added to it which is the same whatever entered.
        """
        path = {call.key: next(iter(of[call.module].state.values())) for call in calls}
        pairs = list(itertools.pairwise(calls))
        single = pairs[1::2] or pairs
        runs = [self._zeroing({a.key for a, _ in part}, set(path)) for part in (single, pairs)]

        def entering(run: Zeroing, call: Call) -> Tensor | None:
            return run.entries.get(call.key, {}).get(path[call.key])

        added = []
        for before, after in pairs:
            (x, y), (x_all, y_all) = ((entering(run, before), entering(run, after)) for run in runs)
            if x is None or y is None or x_all is None or y_all is None:
                continue
            dim = self.watcher.argument_dims[after.key][path[after.key]]
            if independent(y_all, dim) or ((before, after) in single and independent(y, dim)):
                return False
            if (before, after) in single:
                if unchanged(x, y):
                    added.append(True)
                elif x.shape == y.shape == x_all.shape and not torch.equal(x, x_all):
                    if torch.equal(y, y_all):
                        return False
                    added.append(torch.allclose(y - x, y_all - x_all, rtol=1e-3, atol=1e-4 * float(x.abs().max())))
        if any(added):
            return True
        raise ValueError(
            f"{self.kind}: cannot tell what forward does with the results of {of[calls[0].module].name} and its like: "
            "say with register_adapter(..., Adapter(adds=True)) that it adds them to the state, with adds=False that "
            "they are the new state"
        )

    def _zeroing(self, zeroed: set[tuple[int, int]], watch: set[tuple[int, int]]) -> Zeroing:
        rows = torch.tensor([self.first, self.first])
        replace = None if self.state is None else {self.state: self.subject.inputs.disturbed(self.state, rows, 1)}
        run = Zeroing(zeroed, watch)
        run.run(self.model, self.watcher.sites, lambda: self.subject.forward(rows, replace=replace))
        return run

    def _nothing_found(self) -> str:
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and n}
        have = ", ".join(f"{name} ({len(module)})" for name, module in lists.items() if len(module)) or "none"
        scripted = [n for n, m in self.model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            return f"{scripted[0]} is a compiled ScriptModule, which cannot be driven: load the model unscripted"
        return (
            f"no blocks found in {self.kind}: its forward calls no members of a module list that take the noisy state "
            f"and return it in the same shape; it has: {have}. Name a list, as block_list='decoder.stages'"
        )

    def _warn_of_others(self, order: Mapping[nn.Module, int]) -> None:
        scored = {site.module for block in self.blocks for site in block.sites}
        covered = {part for module in scored for part in module.modules()}
        names = [block.name for block in self.blocks]

        def others(modules: Mapping[str, nn.Module]) -> list[str]:
            return [
                name
                for name, module in modules.items()
                if module not in covered
                and not scored & set(module.modules())
                and not any(name.startswith(f"{block}.") for block in names)
            ]

        sites = self.watcher.sites
        # A module of which a run does not show whether it carries the state is named, too.
        carrying = [n for n in others(self.automatic.blocks) if sites[self.automatic.blocks[n]].carries is not False]
        carrying += [
            group.name
            for group in self.automatic.groups
            if group.name not in names
            and all(others({"": call.module}) for call in group.calls)
            and any(sites[call.module].carries for call in group.calls)
        ]
        if carrying:
            warnings.warn(
                f"{self.kind}: the state also passes through {', '.join(carrying)}, which are not scored: add them to "
                "block_list",
                stacklevel=8,
            )
        first = order[self.blocks[0].sites[0].module]
        shaping = [n for n in others(self.beside) if sites[self.beside[n]].carries and first < order[self.beside[n]]]
        if shaping and not self.named:
            warnings.warn(
                f"{self.kind}: {', '.join(shaping)} are not scored: the state passes through them, but they change its "
                "shape or stand beside the blocks of a stage",
                stacklevel=8,
            )
        joining = {name.rpartition(".")[0] for name in self.watcher.joining}
        aside = [n for n in others(self.automatic.blocks) if n.rpartition(".")[0] in joining and n not in carrying]
        if aside:
            warnings.warn(
                f"{self.kind}: {', '.join(aside)} are not scored: they see the condition alone, before it joins the "
                "state; add them to block_list to score them",
                stacklevel=8,
            )


def _by_list(groups: Sequence[Group]) -> list[list[Group]]:
    lists: dict[str, list[Group]] = {}
    for group in groups:
        lists.setdefault(group.name.rpartition(".")[0], []).append(group)
    return list(lists.values())
