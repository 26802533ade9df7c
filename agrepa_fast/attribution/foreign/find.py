"""Find the blocks of a model: the modules of its lists that one forward calls and that keep the shape of their state.

What is scored follows from the calls of a recorded forward, not from the lists' names. A block is a member of a module
list (or a single module of a block's class) whose first result has the shape of one of its arguments. Of nested lists
the outermost counts, unless its members change the shape (the stages of a U-Net) or are lists or modules that the
forward does not call itself but takes apart (`Group`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace

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
    """The result of the search: blocks and groups by name, and members of lists that cannot be switched off."""

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
    """Whether a parameter mixes channels; one value for each channel, as [1, C, 1], does not."""
    return any(sum(size > 1 for size in parameter.shape) > 1 for parameter in module.parameters())


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
    """One pass over a model's modules. feeds: as in `find`."""

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        substantial: Callable[[nn.Module], bool],
        feeds: Callable[[Call, Call], bool],
        opened: Container[nn.Module] = (),
    ) -> None:
        self.names = names_of(model)
        self.feeds, self.opened = feeds, opened
        self.calls: dict[nn.Module, list[Call]] = {}
        usual: dict[tuple[type[nn.Module], str], torch.Size] = {}  # shapes of the arguments of a class
        for call in calls:
            usual.update({(type(call.module), path): shape for path, shape in call.arguments.items()})
        for call in calls:
            # The first block may get None for a state that the others pass on: (hidden, residual).
            filled = {p: usual[type(call.module), p] for p in call.absent if (type(call.module), p) in usual}
            call = replace(call, arguments={**call.arguments, **filled}) if filled else call
            self.calls.setdefault(call.module, []).append(call)
        self.substantial = substantial
        self.found = Found()
        self.singles: list[nn.Module] = []  # outside of lists, as are those that cannot be switched off (shaping)
        self.shaping: list[nn.Module] = []
        self.seen: set[nn.Module] = set()

    def count(self) -> int:
        return len(self.found.blocks) + len(self.found.groups)

    def runs(self, module: nn.Module) -> bool:
        return any(part in self.calls for part in module.modules())

    def can_be_off(self, module: nn.Module) -> bool:
        return module in self.calls and module not in self.opened and all(map(keeps_shape, self.calls[module]))

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
        if self.count() == before and module in self.calls and self.substantial(module) and has_matrix(module):
            (self.singles if self.can_be_off(module) else self.shaping).append(module)

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
                first, second = sorted((self.calls[m][0] for m in inner), key=lambda call: call.order)[:2]
                return self.feeds(first, second)  # experts run beside each other, blocks one after the other
        return False

    def add_singles(self) -> None:
        """Single modules of a block's class, or several of one class beside each other, are blocks too; where there
        is no other block, also one that runs several times, or several of any class beside each other."""
        inside = {part for module in self.singles for part in module.modules() if part is not module}
        kinds = {type(block) for block in self.found.blocks.values()}
        siblings = Counter(map(self._beside, self.singles))
        chosen = [m for m in self.singles if type(m) in kinds or siblings[self._beside(m)] > 1]
        if not chosen and not self.count() and not self.found.left_out and self.substantial is is_substantial:
            outermost = [m for m in self.singles if m not in inside]
            chosen = [m for m in outermost if len(self.calls[m]) > 1] or (outermost if len(outermost) > 1 else [])
        within = {part for module in chosen for part in module.modules() if part is not module}
        chosen = [module for module in chosen if module not in within]
        self.found.blocks.update({self.names[module]: module for module in chosen})
        parents = {self._beside(module)[1] for module in chosen}
        for module in (*self.singles, *self.shaping):
            if module not in chosen and module not in within and self._beside(module)[1] in parents:
                self.found.left_out[self.names[module]] = module

    def _beside(self, module: nn.Module) -> tuple[type[nn.Module], str]:
        return type(module), self.names[module].rpartition(".")[0]


def find(
    model: nn.Module,
    calls: Sequence[Call],
    feeds: Callable[[Call, Call], bool],
    opened: Container[nn.Module] = (),
) -> Found:
    """Blocks and groups of a model by the calls of one forward, in the order of their first calls.

    feeds: whether what the first call returns changes what the second gets. opened: modules that are no blocks
    themselves."""
    found = Found()
    # Lists of bare Linears, or of modules without weights, only where there is nothing else.
    for substantial in (is_substantial, has_matrix, lambda module: not is_builtin(module)):
        search = _Search(model, calls, substantial, feeds, opened)
        search.descend(model)
        search.add_singles()
        found = search.found
        if search.count():
            break
    first = {call.module: call.order for call in reversed(calls)}
    found.blocks = dict(sorted(found.blocks.items(), key=lambda item: first[item[1]]))
    found.groups.sort(key=lambda group: group.calls[0].order)
    return found


def named_blocks(
    model: nn.Module, calls: Sequence[Call], block_list: str | Sequence[str], adds: bool = False, whole: bool = False
) -> Found:
    """The members of the named lists (or the modules of these names) that the recorded forward calls.

    adds: whether the forward adds their results to the state, so that their shapes do not matter.
    whole: whether the names are of modules, each of which is taken as one even if it is a list.

    Raises:
        ValueError: no such name, a module in two lists, or one that the forward does not call or cannot call as one.
    """
    chosen = [block_list] if isinstance(block_list, str) else list(block_list)
    modules = {name.replace("._orig_mod", ""): module for name, module in model.named_modules()}
    lists = {name: m for name, m in modules.items() if isinstance(m, LISTS) and name and len(m)}
    search = _Search(model, calls, has_matrix, lambda first, second: True)
    found = search.found
    taken: set[nn.Module] = set()
    for name in chosen:
        if name not in modules or not name:
            have = ", ".join(f"{n} ({len(m)})" for n, m in lists.items()) or "none"
            raise ValueError(f"block_list: {type(model).__name__} has no module list {name!r}; it has: {have}")
        members = list(modules[name].children()) if name in lists and not whole else [modules[name]]
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
                if not adds and not keeps_shape(call, leading=False):
                    raise ValueError(
                        f"{search.names[member]} maps {listed(call.arguments)} to {listed(call.results)}: a block "
                        "that changes the shape of its input cannot be switched off"
                    )
            found.blocks[search.names[member]] = member
    first = {call.module: call.order for call in reversed(calls)}
    found.blocks = dict(sorted(found.blocks.items(), key=lambda item: first[item[1]]))
    return found


def holds_blocks(module: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether a module is a stage: it has a list of modules that could be blocks."""
    listed = {m for part in module.modules() if isinstance(part, nn.ModuleList) for m in part if is_substantial(m)}
    return any(call.module in listed and keeps_shape(call) for call in calls)


def listed(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes.values()) or "nothing"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
