"""FoG-A on other people's models: grow the batch between the calls of their blocks, and put all back.

A model is any `nn.Module` whose forward calls each block of a list once, in order. The residual state is whatever a
block returns and the next one takes (one tensor or several); switching block k off means it returns what it was given.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..native import nudged
from ..plan import AblationPlan
from .find import find_blocks
from .register import adapter_of
from .wiring import Call, check_shapes, wire

TIME_NAMES = ("t", "time", "timestep", "timesteps", "sigma")


class NotAStaircase(ValueError):
    """The model does something between its blocks, so that shared prefixes would not be exact."""


class _Stop(BaseException):
    """Leaves the model's forward after its last block; not an Exception, which a model might catch."""


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
            check_shapes(self.names[call.block], call)
        self.wirings, self.not_a_chain = wire(self.names, calls_of_one, calls_of_two)
        if self.adapter.dense:
            self.not_a_chain = "its adapter says dense"
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

    def _record(self, rows: Tensor) -> tuple[Tensor, list[Call]]:
        calls: list[Call] = []

        def note(block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            # Kept alive: the next block's arguments are compared with these by identity.
            calls.append(Call(block, tree_leaves((args, kwargs)), *tree_flatten(result)))
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


def _repeat(leaf: Tensor, times: int, dim: int) -> Tensor:
    return leaf if times == 1 else torch.cat([leaf] * times, dim=dim)


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
