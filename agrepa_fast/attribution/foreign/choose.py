"""Choose what is scored among the modules that were found and watched, and name what is not.

A module whose results the forward adds to the state is switched off by zeros, one whose results are the state by its
arguments. Where the results do not go into the next block as they are, a forward in which they are zeros tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .adds import Trial, settle_adds
from .find import Found, Group, has_matrix, holds_blocks, is_substantial, keeps_shape, listed
from .record import Call
from .subject import Subject
from .traces import settled
from .wiring import NOTHING, Site, Watcher, Zeroing, scaled, unchanged


@dataclass(frozen=True)
class Block:
    """One scored layer: its name in the model, and what switches it off (several sites if forward takes it apart)."""

    name: str
    sites: tuple[Site, ...]


class Unclear(ValueError):
    """Running the blocks `sites` does not show which of their arguments is their state."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites[0].unclear)
        self.modules = {site.module for site in sites}


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
        self.trial = Trial(subject, first, calls, watcher, state)
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
            inner = {n: call for n, call in inner.items() if is_substantial(call.module) and has_matrix(call.module)}
            # Where a stage holds lists of blocks, they are its blocks: what stands beside them shapes the state.
            listed = {name for name in inner if name.rpartition(".")[0] not in {group.name for group in members}}
            fitting = {name for name, call in inner.items() if keeps_shape(call)}
            fitting = fitting & listed or fitting
            candidates.update({name: inner[name].module for name in fitting})
            self.beside.update({name: call.module for name, call in inner.items() if name not in fitting})
        named = found.blocks if self.named else {}
        for site in (sites[module] for module in named.values() if self.adapter.adds):
            site.state = site.state or dict.fromkeys(site.dims, NOTHING)
        singles = [
            sites[module]
            for name, module in candidates.items()
            if sites[module].state and (sites[module].carries or name in named)
        ]
        if not self.named and not all(site.aside for site in singles):
            singles = [site for site in singles if not site.aside]
        if not self.adapter.adds:  # zeros need no argument
            unclear = [site for site in singles if site.unclear and not self._settle_states(site)]
            if unclear:
                raise Unclear(unclear)
        settle_adds(self.trial, singles, self.adapter.adds)
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
        run = self.trial.zeroing(keys, {call.key for group in groups for call in group.calls})
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
            unchanged(before, run.entries[call.key][path]) or scaled(before, run.entries[call.key][path])
            for call in following
            for path in moved.get(call.key, ())
            for before in entered
            if path in run.entries.get(call.key, ())
        )

    def _settle_states(self, site: Site) -> bool:
        """Find which result of a block is which of its arguments, where neither names nor the forward tell."""
        if len(site.state) == 1 and holds_blocks(site.module, self.calls):
            return False  # a stage of a U-Net and its skips
        state = settled(self.subject, self.first, site)
        if state is not None:
            site.state = state
        return state is not None

    def _nothing_found(self) -> str:
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and n}
        have = ", ".join(f"{name} ({len(module)})" for name, module in lists.items() if len(module)) or "none"
        scripted = [n for n, m in self.model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            return f"{scripted[0]} is a compiled ScriptModule, which cannot be driven: load the model unscripted"
        return (
            f"no blocks found in {self.kind}: its forward calls no members of a module list that take the noisy state "
            f"and return it in the same shape; it has: {have}. {self._closest()}"
        )

    def _closest(self) -> str:
        """Why the module that comes nearest to a block is none, or what the user can do: a sentence for the error."""
        calls = {call.module: call for call in reversed(self.calls)}
        called = {name: calls[module] for name, module in self.beside.items() if module in calls}
        packed = [name for name, module in self.found.blocks.items() if not self.watcher.sites[module].dims]
        if packed:
            return (
                f"{packed[0]} keeps the shape of its state, which does not grow with the number of samples (packed or "
                "listed samples): give samples of one length, or wrap the blocks so that they take [samples, ...]"
            )
        if not called:
            return "Name a list, as block_list='decoder.stages'"
        name, call = max(called.items(), key=lambda item: sum(p.numel() for p in item[1].module.parameters()))
        if not call.results:
            return f"{name} returns no tensor, so it changes its arguments or attributes: let it return its state"
        return (
            f"{name} maps {listed(call.arguments)} to {listed(call.results)} on one sample: wrap it in a module that "
            "takes the state as a tensor [samples, ...] and returns it in the same shape"
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
        lists = {name.rpartition(".")[0] for name in names}
        shaping = [
            name
            for name in others(self.beside)
            if sites[self.beside[name]].carries
            and (first < order[self.beside[name]] or name.rpartition(".")[0] in lists)  # not what embeds the input
        ]
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
