"""Examine another model on a few of its samples: inputs, velocity, blocks in the order of the forward, wiring, noise.

It costs a forward of one sample that records all calls, one of four samples, one of one sample for the noise floor,
and one or two of two samples only where a block's results do not go into the next block as they are.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..native import nudged
from .find import Group, find, has_matrix, is_substantial, keeps_shape, named_blocks, names_of
from .inputs import TRIALS, Inputs
from .record import Call, flat, overridden, record
from .register import Adapter
from .wiring import DISTURBED, Site, Watcher, Zeroing, independent, unchanged


@dataclass(frozen=True)
class Block:
    """One scored layer: its name in the model, and what switches it off (several sites where forward takes it apart)."""

    name: str
    sites: tuple[Site, ...]


class NoVelocity(TypeError):
    """What a forward returns is no velocity."""


class Examination:
    """What is known of a model and its inputs. Use inside `guard.quiet`, in eval mode without gradient.

    Attributes:
        blocks: in the order in which the forward calls them.
        calls: of a forward of one sample. shapes: {call key: shapes of its results} and the growing dimensions of it.
        references: {sample: velocity} of some samples. noise: relative mean square change of the velocity when the
            state enters the first block a last bit away.

    Raises:
        TypeError: inputs that do not fit the forward, or a velocity that is no floating tensor.
        ValueError: see `attribute_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        adapter: Adapter,
        block_list: str | Sequence[str] | None,
        batched: Sequence[str] | Mapping[str, bool] | None,
        mask: Tensor | None,
        coupled: bool = False,
    ) -> None:
        self.model, self.adapter = model, adapter
        self.block_list = block_list or adapter.block_list
        args, kwargs = arguments(inputs)
        self.inputs = Inputs(args, kwargs, bound(model, args, kwargs), batched)
        self.kind = type(model).__name__
        self.references: dict[int, Tensor] = {}
        self.first, calls, velocity = self._settle(coupled)
        self.mask = self._frame_mask(mask, velocity.shape[1:])
        self.velocity_shape, self.dtype = velocity.shape[1:], velocity.dtype
        self.calls = calls
        self._find()
        self.noise = difference(velocity, self._nudged()) ** 2

    # --- which inputs carry the samples ------------------------------------------------------------------------

    def _settle(self, coupled: bool) -> tuple[int, list[Call], Tensor]:
        """The sample to examine, its recorded calls and its velocity, with `inputs.batched` settled."""
        failure: Exception | None = None
        first_guess: tuple[int, list[Call], Tensor] | None = None
        guesses = list(itertools.islice(self.inputs.hypotheses(), TRIALS))
        for guess in guesses:
            self.inputs.samples, self.inputs.batched = guess
            sample = self.inputs.longest()
            other = (sample + 1) % self.inputs.samples if self.inputs.samples else 0
            try:
                velocity, calls = record(self.model, lambda s=sample: self.forward(torch.tensor([s])))
            except Exception as error:
                if isinstance(error, NoVelocity) or out_of_memory(error):
                    raise
                failure = failure or error
                continue
            self._watch(calls)
            try:
                four = self._run_four(sample, other, velocity)
            except Exception as error:
                if out_of_memory(error):
                    raise
                failure = failure or error
                continue
            if self.same(velocity, four[1:2]) or (coupled and self.inputs.samples == 1):
                self.references = {other: four[0], sample: four[1]}
                return sample, calls, velocity
            if first_guess is None:
                first_guess = sample, calls, velocity
        self.inputs.samples, self.inputs.batched = guesses[0]
        if first_guess is not None:
            sample, calls, velocity = first_guess
            again = self.forward(torch.tensor([sample]))
            if difference(velocity, again) > 64 * eps_of(self.model, velocity):
                raise ValueError(
                    f"{self.kind}: two runs of forward on the same input differ: it draws random numbers "
                    "(noise, masks, dropout by function) that ablations must share; draw them outside and pass them in"
                )
            if coupled:
                return first_guess
            raise ValueError(
                f"{self.kind}: the velocity of sample {sample} depends on which samples run beside it (statistics of "
                "the batch, dynamic quantisation), or an input that carries the samples is not known to: say with "
                f"batched= which of {self._shown()} do; or score each sample by itself: engine='loop', max_samples=1"
            )
        assert failure is not None
        try:
            self.model(*self.inputs.args, **self.inputs.kwargs)
        except Exception:
            raise failure from None  # the inputs do not fit the model as they are
        raise ValueError(
            f"{self.kind}: forward runs on all {self.inputs.samples} samples but not on one of them ({failure}): say with "
            f"batched= which of {self._shown()} carry the samples"
        ) from failure

    def _shown(self) -> str:
        return ", ".join(str(node) for node in self.inputs.nodes.values())

    def forward(self, rows: Tensor, repeats: int = 1, replace: Mapping[str, Any] | None = None) -> Tensor:
        """The velocity [repeats x R, ...] of the samples `rows` [R]."""
        args, kwargs = self.inputs.take(rows, repeats, replace)
        batch = repeats * rows.numel()
        velocity = self._velocity(self.model(*args, **kwargs), batch)
        if not isinstance(velocity, Tensor) or not velocity.is_floating_point():
            got = getattr(velocity, "dtype", type(velocity).__name__)
            raise NoVelocity(f"velocity of {self.kind}: expected a floating tensor, got {got}")
        if velocity.dim() < 2 or velocity.shape[0] != batch or velocity.numel() == 0:
            raise ValueError(
                f"velocity of {self.kind}: expected [{batch}, ...] with at least one value for each "
                f"sample, got {list(velocity.shape)}"
            )
        return velocity

    def _velocity(self, output: Any, batch: int) -> Any:
        if self.adapter.velocity is not None:
            return self.adapter.velocity(output)
        for name in ("sample", "last_hidden_state"):
            output = output if isinstance(output, Tensor) else getattr(output, name, output)
        parts = output if isinstance(output, tuple | list) and all(isinstance(p, Tensor) for p in output) else ()
        if isinstance(output, list) and len(parts) == batch and any(p.dim() == 0 or p.shape[0] != batch for p in parts):
            if len({part.shape for part in parts}) > 1:
                raise NoVelocity(
                    f"{self.kind} returns samples of several shapes ({list(parts[0].shape)}, ...): give samples of one "
                    "shape, or max_samples=1"
                )
            return torch.stack(list(parts))
        if len(parts) == 1:
            output = parts[0]
        if not isinstance(output, Tensor):
            raise NoVelocity(
                f"{self.kind} returns {type(output).__name__}: expected a tensor or an object with "
                ".sample; say which part is the velocity with register_adapter(..., Adapter(velocity=...))"
            )
        return output

    # --- which frames count ------------------------------------------------------------------------------------

    def _frame_mask(self, mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        samples, frames = self.inputs.samples, {size for size in shape if size > 1}
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
                got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(
                    f"mask: expected a bool tensor [samples, frames], True for a frame that counts, got {got}"
                )
            if mask.shape[0] != samples or mask.shape[1] not in shape[:2] or len(shape) != 2:
                raise ValueError(
                    f"mask: expected [{samples}, frames] for a velocity {[samples, *shape]}, got {list(mask.shape)}"
                )
            return mask
        path = self.inputs.state_path(shape)
        if path is not None and isinstance(self.inputs.nodes[path].value, Tensor):
            frames |= set(self.inputs.nodes[path].value.shape[1:])
        if len(shape) != 2:
            frames = set()  # an image or a vector
        used = self.inputs.frame_mask()
        if used is not None and (len(shape) != 2 or used.shape[1] not in shape):
            used = None
        unused = [name for name in self.inputs.masks(frames) if used is None or name != "mask"]
        if used is None and unused:
            warnings.warn(
                f"{', '.join(map(repr, unused))} may say which frames are real, but which of its values does is not known: "
                "all frames count; pass mask= ([samples, frames] bool, True for a frame that counts)",
                stacklevel=5,
            )
        return used

    # --- which blocks there are --------------------------------------------------------------------------------

    def _watch(self, calls: list[Call]) -> None:
        """Choose which modules of the recorded calls to watch while three samples run."""
        self.automatic = find(self.model, calls)
        self.found = self.automatic if self.block_list is None else named_blocks(self.model, calls, self.block_list)
        names = names_of(self.model)
        watched = self.found.blocks | self.automatic.blocks | self.automatic.left_out
        for group in (*self.found.groups, *self.automatic.groups):
            watched.update({names[call.module]: call.module for call in group.calls})
        self.watcher = Watcher(calls, {module: name for name, module in watched.items()})

    def _run_four(self, sample: int, other: int, velocity: Tensor) -> Tensor:
        rows = torch.tensor([other, sample, sample, sample])
        path = self.inputs.state_path(velocity.shape[1:])
        replace = None if path is None else {path: self.inputs.disturbed(path, rows, DISTURBED)}
        return self.watcher.run(self.model, lambda: self.forward(rows, replace=replace))

    def _find(self) -> None:
        sites, found = self.watcher.sites, self.found
        if not any(site.carries for site in sites.values()):
            # No noisy state, or one so large that noise does not show: what runs is taken to carry it.
            for site in sites.values():
                site.carries = bool(site.dims)
        blocks = []
        self.beside = dict(self.automatic.left_out)
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
        named = found.blocks if self.block_list is not None else {}
        singles = [
            sites[module]
            for name, module in candidates.items()
            if sites[module].state and (sites[module].carries or name in named)
        ]
        if self.block_list is None and not all(site.aside for site in singles):
            singles = [site for site in singles if not site.aside]
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
        pairs = [(a, b) for i, (a, b) in enumerate(itertools.pairwise(calls)) if i % 2 == 1 or len(calls) == 2]
        run = self._zeroing({a.key for a, _ in pairs}, {call.key for call in calls})
        same = False
        for a, b in pairs:
            entry = run.entries.get(a.key, {}).get(next(iter(of[a.module].state.values())))
            path = next(iter(of[b.module].state.values()))
            following = run.entries.get(b.key, {}).get(path)
            if entry is None or following is None:
                continue
            if independent(following, self.watcher.argument_dims[b.key][path]):
                return False
            same |= unchanged(entry, following)
        if same:
            return True
        raise ValueError(
            f"{self.kind}: cannot tell what forward does with the results of {of[calls[0].module].name} and its like: "
            "say with register_adapter(..., Adapter(adds=True)) that it adds them to the state, with adds=False that "
            "they are the new state"
        )

    def _zeroing(self, zeroed: set[tuple[int, int]], watch: set[tuple[int, int]]) -> Zeroing:
        rows = torch.tensor([self.first, self.first])
        path = self.inputs.state_path(self.velocity_shape)
        replace = None if path is None else {path: self.inputs.disturbed(path, rows, 1)}
        run = Zeroing(zeroed, watch)
        run.run(self.model, self.watcher.sites, lambda: self.forward(rows, replace=replace))
        return run

    def _nothing_found(self) -> str:
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and n}
        have = ", ".join(f"{name} ({len(module)})" for name, module in lists.items() if len(module)) or "none"
        scripted = [n for n, m in self.model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            return f"{scripted[0]} is a compiled ScriptModule, which cannot be driven: load the model unscripted"
        return (
            f"no blocks found in {self.kind}: its forward calls no members of a module list that take the noisy state and "
            f"return it in the same shape; it has: {have}. Name a list, as block_list='decoder.stages'"
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
        # What cannot be told to carry the state is named, too.
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
                stacklevel=6,
            )
        first = order[self.blocks[0].sites[0].module]
        shaping = [n for n in others(self.beside) if sites[self.beside[n]].carries and first < order[self.beside[n]]]
        if shaping and self.block_list is None:
            warnings.warn(
                f"{self.kind}: {', '.join(shaping)} are not scored: the state passes through them, but they change its shape "
                "or stand beside the blocks of a stage",
                stacklevel=6,
            )
        joining = {name.rpartition(".")[0] for name in self.watcher.joining}
        aside = [n for n in others(self.automatic.blocks) if n.rpartition(".")[0] in joining and n not in carrying]
        if aside:
            warnings.warn(
                f"{self.kind}: {', '.join(aside)} are not scored: they see the condition alone, before it joins the state; "
                "add them to block_list to score them",
                stacklevel=6,
            )

    def _nudged(self) -> Tensor:
        """The velocity of the first sample when the state around the first block is a last bit away."""
        site = self.blocks[0].sites[0]

        def enter(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            paths, leaves, spec = flat(forward(*args, **kwargs) if site.adds else (args, kwargs))
            places = site.state if site.adds else site.state.values()
            for i, path in enumerate(paths):
                if path in places:
                    if not leaves[i].is_floating_point():
                        raise TypeError(
                            f"{site.name}: expected a floating residual state, got {leaves[i].dtype}: give the "
                            "model inputs of its own dtype"
                        )
                    leaves[i] = nudged(leaves[i])
            if site.adds:
                return tree_unflatten(leaves, spec)
            args, kwargs = tree_unflatten(leaves, spec)
            return forward(*args, **kwargs)

        with overridden([site.module], enter):
            return self.forward(torch.tensor([self.first]))

    def same(self, expected: Tensor, velocity: Tensor) -> bool:
        return not expected.isfinite().all() or difference(expected, velocity) <= tolerance(self.model, expected)


def _by_list(groups: Sequence[Group]) -> list[list[Group]]:
    lists: dict[str, list[Group]] = {}
    for group in groups:
        lists.setdefault(group.name.rpartition(".")[0], []).append(group)
    return list(lists.values())


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise TypeError(f"inputs: expected a mapping of keyword arguments or a tuple, got {type(inputs).__name__}")


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the forward's parameters."""
    try:
        signature = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise TypeError(f"inputs do not fit {type(model).__name__}.forward: {error}") from None
    named: dict[str, Any] = {}
    for name, value in signature.arguments.items():
        kind = signature.signature.parameters[name].kind
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def difference(expected: Tensor, got: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; 0 where both are zero or not finite."""
    expected, got = expected.double(), got.double()
    change = (got - expected).square().mean().sqrt()
    ratio = change / expected.square().mean().sqrt()
    return 0.0 if change == 0 or ratio.isnan() else ratio.item()


def eps_of(model: nn.Module, velocity: Tensor) -> float:
    dtypes = {velocity.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def tolerance(model: nn.Module, velocity: Tensor) -> float:
    """Relative difference that rounding may make between batch sizes."""
    eps = eps_of(model, velocity)
    if torch.is_autocast_enabled(velocity.device.type) or eps > 1e-4:
        return 0.1
    return 1e-3 if eps > 1e-10 else 1e-6  # some models compute parts of a float64 forward in float32
