"""Find the blocks of a model: the modules of its lists that one forward calls and that keep the shape of their state.

What is scored follows from the calls of a recorded forward, not from the lists' names. A block is a member of a module
list (or a single module of a block's class) whose first result has the shape of one of its arguments. Of nested lists
the outermost counts, unless its members change the shape (the stages of a U-Net) or are lists or modules that the
forward does not call itself but takes apart (`Group`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .record import Call

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Group:
    """A list's member that is not called itself; the forward calls the modules in it."""

    name: str
    calls: tuple[Call, ...]  # the outermost ones


@dataclass
class Found:
    """What a recorded forward shows: blocks and groups by name, and members of lists that cannot be switched off."""

    blocks: dict[str, nn.Module] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    left_out: dict[str, nn.Module] = field(default_factory=dict)


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The dotted name of each module, as the model calls it: without what torch.compile puts in between."""
    return {module: name.replace("._orig_mod", "") for name, module in model.named_modules()}


def is_leaf(module: nn.Module) -> bool:
    """Whether the module has no parts, beside what weight norm or a LoRA adapter adds to a Linear."""
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return is_leaf(base)
    return not [name for name in module._modules if name != "parametrizations"]


def is_builtin(module: nn.Module) -> bool:
    """Whether the module is a single layer of torch: a Linear, convolution, norm or activation, also if adapted."""
    kinds = type(getattr(module, "base_layer", module)).__mro__
    return is_leaf(module) and any(k.__module__.startswith("torch.nn.modules") for k in kinds if k is not nn.Module)


def is_substantial(module: nn.Module) -> bool:
    """Whether the module may be a block by itself: it has parts, or a matrix of its own."""
    return not is_leaf(module) or (not is_builtin(module) and not hasattr(module, "base_layer") and has_matrix(module))


def has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def keeps_shape(call: Call, leading: bool = True) -> bool:
    """Whether the first result, and each result of a shape that arguments have, can stand for an argument.

    leading: the first argument that may be a state must be among them: a result of the shape of a skip is no state."""
    states = [shape for path, shape in call.results.items() if path in call.floating and len(shape) > 1]
    free = Counter(call.arguments.values())
    if not states or not free[states[0]]:
        return False
    if leading:
        most = max(map(len, call.arguments.values()))
        if next(s for s in call.arguments.values() if len(s) >= min(3, most)) not in states:
            return False
    return all(free[shape] >= count for shape, count in Counter(states).items() if free[shape])


class _Search:
    def __init__(self, model: nn.Module, calls: Sequence[Call], substantial: Callable[[nn.Module], bool]) -> None:
        self.names = names_of(model)
        self.calls: dict[nn.Module, list[Call]] = {}
        for call in calls:
            self.calls.setdefault(call.module, []).append(call)
        self.substantial = substantial
        self.found = Found()
        self.singles: list[nn.Module] = []
        self.seen: set[nn.Module] = set()

    def count(self) -> int:
        return len(self.found.blocks) + len(self.found.groups)

    def runs(self, module: nn.Module) -> bool:
        return any(part in self.calls for part in module.modules())

    def can_be_off(self, module: nn.Module) -> bool:
        return module in self.calls and all(map(keeps_shape, self.calls[module]))

    def members(self, container: nn.Module) -> list[nn.Module]:
        return [child for child in container.children() if self.runs(child)]

    def descend(self, module: nn.Module) -> None:
        for child in module.children():
            if child in self.seen or not self.runs(child):
                continue
            self.seen.add(child)
            if isinstance(child, LISTS):
                self.visit_list(child)
            elif self.names[child]:
                self.visit_single(child)

    def open(self, member: nn.Module) -> None:
        if isinstance(member, nn.Sequential):
            self.visit_list(member)
        else:
            self.descend(member)

    def visit_single(self, module: nn.Module) -> None:
        before = self.count()
        self.descend(module)
        if self.count() == before and self.can_be_off(module) and self.substantial(module):
            self.singles.append(module)

    def visit_list(self, container: nn.Module) -> None:
        members = self.members(container)
        blocks_among = any(self.can_be_off(m) and self.substantial(m) for m in members)
        staged = any(map(self.is_stage, members))
        scripted = [m for m in container.children() if isinstance(m, torch.jit.ScriptModule)]
        if blocks_among and scripted:
            raise ValueError(
                f"{self.names[scripted[0]]} is a compiled ScriptModule, which cannot be driven: load the model "
                "unscripted"
            )
        for member in members:
            if member in self.seen:
                continue
            self.seen.add(member)
            if member not in self.calls:
                self.visit_group(member)
                continue
            if self.is_stage(member):
                self.open(member)
                continue
            block = self.can_be_off(member) and blocks_among and self.is_block(member, container)
            before = self.count()
            if staged or not block:
                self.open(member)
            if self.count() > before:
                continue
            if block:
                self.found.blocks[self.names[member]] = member
            elif self.substantial(member):
                self.found.left_out[self.names[member]] = member

    def is_block(self, member: nn.Module, container: nn.Module) -> bool:
        """Whether a member of a list with blocks is one, too; a norm or an activation between or behind them is not."""
        return self.substantial(member) or not (is_builtin(member) or isinstance(container, nn.Sequential))

    def visit_group(self, member: nn.Module) -> None:
        parts = set(member.modules())
        outermost = [
            call
            for module in parts
            for call in self.calls.get(module, ())
            if call.parent is None or call.parent.module not in parts
        ]
        outermost.sort(key=lambda call: call.order)
        self.found.groups.append(Group(self.names[member], tuple(outermost)))

    def is_stage(self, member: nn.Module) -> bool:
        """Whether nearly all of a list's member is a list of blocks in turn."""
        size = _size(member)
        for part in member.modules():
            if not isinstance(part, nn.ModuleList | nn.Sequential):
                continue
            inner = [m for m in part if self.can_be_off(m) and self.substantial(m)]
            alike = len(inner) > 1 and len({type(m) for m in inner}) == 1
            if alike and sum(map(_size, inner)) >= 0.8 * size:
                return True
        return False

    def add_singles(self) -> None:
        """Single modules of a block's class, or several of one class beside each other, are blocks too."""
        kinds = {type(block) for block in self.found.blocks.values()}
        siblings = Counter((type(m), self.names[m].rpartition(".")[0]) for m in self.singles)
        for module in self.singles:
            name = self.names[module]
            if type(module) in kinds or siblings[type(module), name.rpartition(".")[0]] > 1:
                self.found.blocks[name] = module


def find(model: nn.Module, calls: Sequence[Call]) -> Found:
    """Blocks and groups of a model by the calls of one forward, in the order of their first calls."""
    found = Found()
    # Lists of bare Linears, or of modules without weights, only where there is nothing else.
    for substantial in (is_substantial, has_matrix, lambda module: not is_builtin(module)):
        search = _Search(model, calls, substantial)
        search.descend(model)
        search.add_singles()
        found = search.found
        if search.count():
            break
    first = {call.module: call.order for call in reversed(calls)}
    found.blocks = dict(sorted(found.blocks.items(), key=lambda item: first[item[1]]))
    found.groups.sort(key=lambda group: group.calls[0].order)
    return found


def named_blocks(model: nn.Module, calls: Sequence[Call], block_list: str | Sequence[str]) -> Found:
    """The members of the named lists (or the modules of these names) that the recorded forward calls.

    Raises:
        ValueError: no such name, a module in two lists, or one that the forward does not call or cannot call as one.
    """
    chosen = [block_list] if isinstance(block_list, str) else list(block_list)
    modules = {name.replace("._orig_mod", ""): module for name, module in model.named_modules()}
    lists = {name: m for name, m in modules.items() if isinstance(m, LISTS) and name and len(m)}
    search = _Search(model, calls, has_matrix)
    found = search.found
    taken: set[nn.Module] = set()
    for name in chosen:
        if name not in modules or not name:
            have = ", ".join(f"{n} ({len(m)})" for n, m in lists.items()) or "none"
            raise ValueError(f"block_list: {type(model).__name__} has no module list {name!r}; it has: {have}")
        members = list(modules[name].children()) if name in lists else [modules[name]]
        for member in members:
            if isinstance(member, torch.jit.ScriptModule):
                raise ValueError(
                    f"{search.names[member]} is a compiled ScriptModule, which cannot be driven: load the model "
                    "unscripted"
                )
            if member in taken:
                raise ValueError(f"block_list: {search.names[member]} is named twice")
            taken.add(member)
            if not search.runs(member):
                raise ValueError(
                    f"{type(model).__name__}: expected forward to call the blocks of {name!r}; it does not call "
                    f"{search.names[member]}"
                )
            if member not in search.calls:
                search.visit_group(member)
                continue
            for call in search.calls[member]:
                if not keeps_shape(call, leading=False):
                    raise ValueError(
                        f"{search.names[member]} maps {_listed(call.arguments)} to {_listed(call.results)}: a block "
                        "that changes the shape of its input cannot be switched off"
                    )
            found.blocks[search.names[member]] = member
    first = {call.module: call.order for call in reversed(calls)}
    found.blocks = dict(sorted(found.blocks.items(), key=lambda item: first[item[1]]))
    return found


def _listed(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes.values()) or "nothing"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
