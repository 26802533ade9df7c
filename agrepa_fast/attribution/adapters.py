"""FoG-A on other people's models: find the list of blocks, grow the batch between their calls, put all back.

A model is any `nn.Module` whose forward calls each block of a list once, in order. The residual state is whatever a
block returns and the next one takes (one tensor or several); switching block k off means it returns what it was given.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .native import nudged
from .plan import AblationPlan

USUAL_NAMES = ("transformer_blocks", "blocks", "layers", "layer", "h", "joint_blocks", "double_blocks", "resblocks")
TIME_NAMES = ("t", "time", "timestep", "timesteps", "sigma")


@dataclass(frozen=True)
class Adapter:
    """What a model cannot be asked: see `register_adapter`.

    Attributes:
        block_list: dotted name(s) of the block lists, in the order in which they run; None = found by usual names.
        velocity: picks the velocity [B, ...] out of what forward returns; None: it is a tensor or `.sample`.
        dense: run all streams from the start (long skips that the automatic check would find too).
    """

    block_list: str | Sequence[str] | None = None
    velocity: Callable[[Any], Tensor] | None = None
    dense: bool = False


_ADAPTERS: dict[type[nn.Module], Adapter] = {}


def register_adapter(model_type: type[nn.Module], adapter: Adapter) -> None:
    """Use `adapter` for models of this class and its subclasses (a later registration of a class replaces it).

    Raises:
        TypeError: model_type is not a class of modules, or adapter is not an `Adapter`.
    """
    if not (isinstance(model_type, type) and issubclass(model_type, nn.Module)):
        raise TypeError(f"model_type: expected a subclass of torch.nn.Module, got {model_type!r}")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an Adapter, got {type(adapter).__name__}")
    _ADAPTERS[model_type] = adapter


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter registered for the nearest class of the model, or the default one."""
    return next((_ADAPTERS[kind] for kind in type(model).__mro__ if kind in _ADAPTERS), Adapter())


class NotAStaircase(ValueError):
    """The model does something between its blocks, so that shared prefixes would not be exact."""


class _Stop(BaseException):
    """Leaves the model's forward after its last block; not an Exception, which a model might catch."""


@dataclass(frozen=True)
class Wiring:
    """How one block is called: leaves of its (args, kwargs) and of its result, numbered as pytree does.

    batch: {argument leaf: (dimension, size of one sample)}. state: {result leaf: argument leaf it replaces}."""

    batch: dict[int, tuple[int, int]]
    state: dict[int, int]
    results: int
    result_spec: Any


@dataclass
class _Call:
    block: int
    arguments: list[Any]
    results: list[Any]
    result_spec: Any


class BlockModel:
    """A foreign model, its blocks and how they are wired; found out by running it on its first samples.

    `inputs` is a mapping of keyword arguments or a tuple; tensors in it (also nested) whose first size is the batch
    N carry the batch, N being the first size of the first tensor. Use inside `eager`, in eval mode without gradient.
    """

    def __init__(self, model: nn.Module, inputs: Any, block_list: str | Sequence[str] | None = None) -> None:
        self.model = model
        self.adapter = adapter_of(model)
        self.args, self.kwargs = _arguments(inputs)
        tensors = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise TypeError("inputs: expected at least one tensor with the samples first")
        self.samples: int = tensors[0].shape[0]
        if self.samples == 0:
            raise ValueError("inputs: expected at least one sample, got a batch of 0")
        self.names, self.blocks = find_blocks(model, block_list or self.adapter.block_list)
        self.depth = len(self.blocks)
        self._named = _bind(model, self.args, self.kwargs)

    @property
    def t(self) -> Tensor | None:
        """[N] the samples' flow time where the inputs name one (t, time, timestep, ...)."""
        found = [self._named[name] for name in TIME_NAMES if isinstance(self._named.get(name), Tensor)]
        return found[0] if found and found[0].shape == (self.samples,) else None

    @property
    def mask(self) -> Tensor | None:
        """[N, T] bool: the input called `mask`, if it is such a one."""
        mask = self._named.get("mask")
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 2
        return mask if fits and mask is not None and mask.shape[0] == self.samples else None

    def inspect(self) -> torch.dtype:
        """Find the wiring out from runs on one sample (twice: is the forward deterministic?) and on two.

        Also `noise`, the relative mean square change of the velocity when the state enters block 0 a last bit away.
        Returns the velocity's dtype.

        Raises:
            ValueError: the forward is random, a block changes the shape of its state, or is not called once in order.
        """
        # The longest sample, where a mask says which: some models (F5-TTS) take its length for that of the batch.
        longest = 0 if self.mask is None else int(self.mask.sum(1).argmax())
        first = torch.tensor([longest])
        both = torch.tensor([longest, (longest + 1) % self.samples])
        one, calls_of_one = self._record(first)
        again, _ = self._record(first)
        if _difference(one, again) > 64 * _eps(self.model, one):
            raise ValueError(
                f"{type(self.model).__name__}: two runs of forward on the same input differ: it draws random numbers "
                "(noise, masks, dropout by function) that ablations must share; draw them outside and pass them in"
            )
        reference, calls_of_two = self._record(both)
        self._reference = dict(zip(both.tolist(), reference))
        for call in calls_of_one:
            self._check_shapes(call)
        self.wirings, self.not_a_chain = self._wire(calls_of_one, calls_of_two)
        self.noise = _difference(one, self._from_nudged(first)) ** 2
        return one.dtype

    def _from_nudged(self, rows: Tensor) -> Tensor:
        def enter(block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if block == 0:
                leaves, spec = tree_flatten((args, kwargs))
                for p in self.wirings[0].state.values():
                    if not leaves[p].is_floating_point():
                        raise TypeError(
                            f"{self.names[0]}: expected a floating residual state, got {leaves[p].dtype}: give the "
                            "model inputs of its own dtype"
                        )
                    leaves[p] = nudged(leaves[p])
                args, kwargs = tree_unflatten(leaves, spec)
            return forward(*args, **kwargs)

        with _overridden(self.blocks, enter):
            return self._forward(rows)

    def run(self, engine: str, plan: AblationPlan, rows: Tensor) -> Tensor:
        """Velocities [S, B, ...] of the samples `rows` (int64 [B]); stream 0 is the baseline.

        "prefix" raises `NotAStaircase` where shared prefixes are not exact."""
        engines = {"prefix": self._staircase, "stacked": self._dense, "loop": self._loop}
        velocity = engines[engine](plan, rows)
        for i, row in enumerate(rows.tolist()):
            expected = self._reference.get(row)
            if expected is None:
                continue
            if expected.isfinite().all() and _difference(expected, velocity[0, i]) > _tolerance(self.model, expected):
                raise NotAStaircase(
                    f"{type(self.model).__name__}: the baseline run block by block is not the model's own velocity "
                    f"(sample {row}): something reaches past the blocks of {self.names[0].rpartition('.')[0]!r}"
                )
        return velocity

    def _forward(self, rows: Tensor, repeats: int = 1) -> Tensor:
        def take(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != self.samples:
                return leaf
            return leaf.index_select(0, rows.to(leaf.device).repeat(repeats))

        args, kwargs = tree_map(take, (self.args, self.kwargs))
        velocity = self._velocity(self.model(*args, **kwargs))
        if not isinstance(velocity, Tensor) or not velocity.is_floating_point():
            got = getattr(velocity, "dtype", type(velocity).__name__)
            raise TypeError(f"velocity of {type(self.model).__name__}: expected a floating tensor, got {got}")
        batch = repeats * rows.numel()
        if velocity.dim() < 2 or velocity.shape[0] != batch or velocity.numel() == 0:
            raise ValueError(
                f"velocity of {type(self.model).__name__}: expected [{batch}, ...] with at least one value for each "
                f"sample, got {list(velocity.shape)}"
            )
        return velocity

    def _velocity(self, output: Any) -> Tensor:
        if self.adapter.velocity is not None:
            return self.adapter.velocity(output)
        output = getattr(output, "sample", output) if not isinstance(output, Tensor) else output
        if isinstance(output, tuple | list) and len(output) == 1:
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(self.model).__name__} returns {type(output).__name__}: expected a tensor or an object with "
                ".sample; say which part is the velocity with register_adapter(..., Adapter(velocity=...))"
            )
        return output

    def _record(self, rows: Tensor) -> tuple[Tensor, list[_Call]]:
        calls: list[_Call] = []

        def note(block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            # Kept alive: the next block's arguments are compared with these by identity.
            calls.append(_Call(block, tree_leaves((args, kwargs)), *tree_flatten(result)))
            return result

        with _overridden(self.blocks, note):
            velocity = self._forward(rows)
        if [call.block for call in calls] != list(range(self.depth)):
            got = ", ".join(self.names[call.block] for call in calls[:4]) or "none"
            raise ValueError(
                f"{type(self.model).__name__}: expected forward to call its {self.depth} blocks once each and in order "
                f"({self.names[0]} first); it called {len(calls)} ({got}, ...)"
            )
        return velocity, calls

    def _check_shapes(self, call: _Call) -> None:
        results = [leaf for leaf in call.results if isinstance(leaf, Tensor)]
        given = [leaf for leaf in call.arguments if isinstance(leaf, Tensor)]
        if not results or not any(leaf.shape == result.shape for leaf in given for result in results):
            raise ValueError(
                f"{self.names[call.block]} (layer {call.block}) maps {_shapes(given)} to {_shapes(results)}: a block "
                "that changes the shape of its input cannot be switched off"
            )

    def _wire(self, ones: list[_Call], twos: list[_Call]) -> tuple[list[Wiring], str]:
        """The wiring of every block, and why the blocks are no chain ("" where they are one)."""
        why = "" if not self.adapter.dense else "its adapter says dense"
        wirings: list[Wiring] = []
        for layer, (one, two) in enumerate(zip(ones, twos)):
            batch, odd = _batch_leaves(one.arguments, two.arguments)
            if odd:
                why = why or f"{self.names[layer]}: an argument grows from {odd[0]} to {odd[1]} with a second sample"
            state = {}
            if layer + 1 < self.depth:
                following = ones[layer + 1].arguments
                for j, result in enumerate(one.results):
                    places = [p for p, leaf in enumerate(following) if isinstance(leaf, Tensor) and leaf is result]
                    if places and places[0] < len(one.arguments):
                        state[j] = places[0]
            elif wirings:
                state = {j: p for j, p in wirings[-1].state.items() if isinstance(one.results[j], Tensor)}
            state = {j: p for j, p in state.items() if _same_shape(one.arguments[p], one.results[j])}
            tensors = [j for j, leaf in enumerate(one.results) if isinstance(leaf, Tensor)]
            chained = set(state) == set(tensors)
            for j in set(tensors) - set(state):
                places = [
                    p
                    for p, leaf in enumerate(one.arguments)
                    if _same_shape(leaf, one.results[j]) and p in batch and p not in state.values()
                ]
                if len(places) > 1 and len(tensors) > 1:
                    raise ValueError(
                        f"{self.names[layer]} returns {len(tensors)} tensors and result {j} fits {len(places)} of its "
                        "arguments: wrap the block in a module with one state"
                    )
                if places:
                    state[j] = places[0]
            if any(p not in batch for p in state.values()):
                raise ValueError(f"{self.names[layer]}: its state does not carry the samples of the inputs' first axis")
            if not chained and self.depth > 1:
                why = why or f"something happens between {self.names[layer]} and what follows it"
            if wirings and any(wirings[-1].state.get(j, p) != p for j, p in state.items()):
                why = why or f"{self.names[layer]} is called in another way than the block before"
            wirings.append(Wiring(batch, state, len(one.results), one.result_spec))
        return wirings, why

    def _staircase(self, plan: AblationPlan, rows: Tensor) -> Tensor:
        if self.not_a_chain:
            raise NotAStaircase(f"{type(self.model).__name__}: {self.not_a_chain}; engine='stacked' runs it")
        batch = rows.numel()
        ablated = {unit.layer for unit in plan.units}
        streams = 1
        final: dict[int, Tensor] = {}

        def grow(block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal streams
            wiring = self.wirings[block]
            leaves, spec = tree_flatten((args, kwargs))
            for p, (dim, unit) in wiring.batch.items():
                leaf = leaves[p]
                if leaf.shape[dim] == batch * unit:
                    leaves[p] = _repeat(leaf, streams, dim)
                elif leaf.shape[dim] != streams * batch * unit:
                    raise NotAStaircase(
                        f"{self.names[block]}: an argument of shape {list(leaf.shape)} fits neither {batch} samples "
                        f"nor {streams} streams of them"
                    )
            before = {}
            if block in ablated:
                for j, p in wiring.state.items():
                    dim, unit = wiring.batch[p]
                    # A copy: the block may write into its input.
                    before[j] = leaves[p].narrow(dim, 0, batch * unit).clone()
            args, kwargs = tree_unflatten(leaves, spec)
            results, result_spec = tree_flatten(forward(*args, **kwargs))
            for j, entering in before.items():
                results[j] = torch.cat([results[j], entering], dim=wiring.batch[wiring.state[j]][0])
            streams += bool(before)
            if block + 1 == self.depth:
                final.update({j: results[j] for j in wiring.state})
                raise _Stop
            return tree_unflatten(results, result_spec)

        with _overridden(self.blocks, grow), contextlib.suppress(_Stop):
            self._forward(rows)

        def pass_through(stream: int, block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            wiring = self.wirings[block]
            leaves = tree_leaves((args, kwargs))
            results: list[Any] = [None] * wiring.results
            for j, p in wiring.state.items():
                results[j] = leaves[p]
                if block + 1 == self.depth:
                    dim, unit = wiring.batch[p]
                    results[j] = final[j].narrow(dim, stream * batch * unit, batch * unit)
            return tree_unflatten(results, wiring.result_spec)

        velocities = []
        for stream in range(plan.streams):
            with _overridden(self.blocks, partial(pass_through, stream)):
                velocities.append(self._forward(rows))
        return torch.stack(velocities)

    def _dense(self, plan: AblationPlan, rows: Tensor) -> Tensor:
        batch, streams = rows.numel(), plan.streams
        stream_of = {unit.layer: 1 + k for k, unit in enumerate(plan.units)}

        def switch(block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if block not in stream_of:
                return forward(*args, **kwargs)
            wiring, stream = self.wirings[block], stream_of[block]
            leaves = tree_leaves((args, kwargs))
            kept = {}
            for j, p in wiring.state.items():
                dim, unit = wiring.batch[p]
                kept[j] = leaves[p].narrow(dim, stream * batch * unit, batch * unit).clone()
            results, spec = tree_flatten(forward(*args, **kwargs))
            for j, p in wiring.state.items():
                dim, unit = wiring.batch[p]
                results[j] = results[j].clone()
                results[j].narrow(dim, stream * batch * unit, batch * unit).copy_(kept[j])
            return tree_unflatten(results, spec)

        with _overridden(self.blocks, switch):
            return self._forward(rows, streams).unflatten(0, (streams, batch))

    def _loop(self, plan: AblationPlan, rows: Tensor) -> Tensor:
        def skip(layer: int, block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if block != layer:
                return forward(*args, **kwargs)
            wiring = self.wirings[block]
            leaves = tree_leaves((args, kwargs))
            results: list[Any] = [None] * wiring.results
            for j, p in wiring.state.items():
                results[j] = leaves[p]
            return tree_unflatten(results, wiring.result_spec)

        velocities = [self._forward(rows)]
        for unit in plan.units:
            with _overridden(self.blocks, partial(skip, unit.layer)):
                velocities.append(self._forward(rows))
        return torch.stack(velocities)


def find_blocks(model: nn.Module, block_list: str | Sequence[str] | None) -> tuple[list[str], list[nn.Module]]:
    """The blocks of a model and their dotted names, from the named lists or from one under a usual name.

    Raises:
        ValueError: none or several found (lists what there is), a name without a list, or blocks that cannot be driven.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and name and len(module)
    }
    have = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
    if block_list is not None:
        chosen = [block_list] if isinstance(block_list, str) else list(block_list)
        for name in chosen:
            if name not in lists:
                raise ValueError(f"block_list: {type(model).__name__} has no module list {name!r}; it has: {have}")
    else:
        usual = {name: blocks for name, blocks in lists.items() if name.rpartition(".")[2] in USUAL_NAMES}
        # Those inside another candidate's blocks are parts of blocks.
        usual = {n: b for n, b in usual.items() if not any(n.startswith(f"{other}.") for other in usual)}
        sizes = {n: sum(p.numel() for block in b for p in block.parameters()) for n, b in usual.items()}
        chosen = [n for n, size in sizes.items() if 10 * size >= max(sizes.values())]
        if not chosen:
            raise ValueError(
                f"no blocks found in {type(model).__name__}: looked for a module list called "
                f"{', '.join(USUAL_NAMES)}; it has: {have}. Name it, as block_list='decoder.stages'"
            )
        if len(chosen) > 1:
            raise ValueError(
                f"several block lists found in {type(model).__name__}: {', '.join(chosen)}. Name the one to score, or "
                "all in the order in which they run, as block_list=['double_blocks', 'single_blocks']"
            )
    named = [(f"{name}.{i}", block) for name in chosen for i, block in enumerate(lists[name])]
    for name, block in named:
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"{name} is a {type(block).__name__}, which forward cannot call as one block: wrap it")
        if isinstance(block, torch.jit.ScriptModule):
            raise ValueError(f"{name} is a compiled ScriptModule, which cannot be driven: load the model unscripted")
    if len({id(block) for _, block in named}) < len(named):
        raise ValueError(f"{chosen[0]}: the same block stands in it twice, and cannot be switched off apart")
    return [name for name, _ in named], [block for _, block in named]


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Compiled modules run eagerly, and PyTorch's fused encoder path stays off; both come back on every exit."""
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    wrapped = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is not None and "_orig_mod" in child._modules  # what torch.compile(module) returns
    ]
    # The fused path of nn.TransformerEncoder packs the batch away (nested tensors), so that it cannot be grown.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in compiled:
            module._compiled_call_impl = None
        for module, name, child in wrapped:
            module._modules[name] = child._modules["_orig_mod"]
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, name, child in wrapped:
            module._modules[name] = child
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def _overridden(blocks: Sequence[nn.Module], behaviour: Callable[..., Any]) -> Iterator[None]:
    """Block i's forward is `behaviour(i, its own forward, *args, **kwargs)`; undone on every exit."""
    own = [vars(block).get("forward") for block in blocks]
    try:
        for i, block in enumerate(blocks):
            vars(block)["forward"] = partial(behaviour, i, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise TypeError(f"inputs: expected a mapping of keyword arguments or a tuple, got {type(inputs).__name__}")


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise TypeError(f"inputs do not fit {type(model).__name__}.forward: {error}") from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _batch_leaves(
    one: Sequence[Any], two: Sequence[Any]
) -> tuple[dict[int, tuple[int, int]], tuple[list[int], list[int]] | None]:
    """Which leaves carry the batch, by what grew with a second sample; and the shapes of one that grew oddly."""
    batch, odd = {}, None
    for p, (a, b) in enumerate(zip(one, two)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape == b.shape:
            continue
        grown = [dim for dim in range(a.dim()) if a.dim() == b.dim() and a.shape[dim] != b.shape[dim]]
        if len(grown) != 1 or b.shape[grown[0]] != 2 * a.shape[grown[0]]:
            odd = (list(a.shape), list(b.shape))
        else:
            batch[p] = (grown[0], a.shape[grown[0]])
    return batch, odd


def _repeat(leaf: Tensor, times: int, dim: int) -> Tensor:
    return leaf if times == 1 else torch.cat([leaf] * times, dim=dim)


def _same_shape(argument: Any, result: Any) -> bool:
    return isinstance(argument, Tensor) and isinstance(result, Tensor) and argument.shape == result.shape


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in tensors) or "nothing"


def _difference(expected: Tensor, got: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; 0 where both are zero or not finite."""
    expected, got = expected.double(), got.double()
    change = (got - expected).square().mean().sqrt()
    ratio = change / expected.square().mean().sqrt()
    return 0.0 if change == 0 or ratio.isnan() else ratio.item()


def _eps(model: nn.Module, velocity: Tensor) -> float:
    dtypes = {velocity.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _tolerance(model: nn.Module, velocity: Tensor) -> float:
    """Relative difference that rounding may make between batch sizes."""
    eps = _eps(model, velocity)
    if torch.is_autocast_enabled(velocity.device.type) or eps > 1e-4:
        return 0.1
    return 1e-3 if eps > 1e-10 else 1e-10
