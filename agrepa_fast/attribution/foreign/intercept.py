"""Take part in a module's forward: an object that stands in for it, calls it, and keeps what it sees.

It is an attribute of the instance. Unlike a forward hook, it is also seen by code that was compiled before, and by
models that call `block.forward` themselves.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_INSTALLED: weakref.WeakSet[Intercept] = weakref.WeakSet()
# Without it torch.compile(fullgraph=True) refuses activation checkpointing around a block whose result is kept.
_CHECKPOINT_FLAG = "skip_fwd_side_effects_in_bwd_under_checkpoint"
_flag_before = False


def forward_signature(module: nn.Module, forward: Callable[..., Any] | None = None) -> inspect.Signature:
    """The parameters of a module's forward, or of `forward` in its place, without `self`.

    A wrapper on the instance (nnsight's, or one made with functools.wraps) may name the class's function as what it
    wraps, which has `self`.
    """
    signature = inspect.signature(module.forward if forward is None else forward)
    parameters = list(signature.parameters.values())
    has_self = parameters[:1] and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    if has_self and signature == inspect.signature(type(module).forward):
        return signature.replace(parameters=parameters[1:])
    return signature


class Intercept:
    """Called in place of a module's `forward`. Copies and pickles of the module get the module's own forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.on = True
        self.installed = False

    def install(self) -> None:
        global _flag_before
        config = torch._dynamo.config
        if not _INSTALLED and hasattr(config, _CHECKPOINT_FLAG):
            _flag_before = getattr(config, _CHECKPOINT_FLAG)
            setattr(config, _CHECKPOINT_FLAG, True)
        _INSTALLED.add(self)
        self.on_instance = "forward" in vars(self.module)
        self.own: Callable[..., Any] = self.module.forward
        vars(self.module)["forward"] = self
        self.installed = True

    def remove(self) -> None:
        self.installed = False
        _INSTALLED.discard(self)
        if not _INSTALLED and hasattr(torch._dynamo.config, _CHECKPOINT_FLAG):
            setattr(torch._dynamo.config, _CHECKPOINT_FLAG, _flag_before)
        outer, current = None, vars(self.module).get("forward")
        while isinstance(current, Intercept) and current is not self:
            outer, current = current, current.own
        if current is not self:  # another library has wrapped this forward since: it goes on calling us
            self.on = False
        elif outer is not None:
            outer.own, outer.on_instance = self.own, self.on_instance
        elif self.on_instance:
            vars(self.module)["forward"] = self.own
        else:
            del vars(self.module)["forward"]

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # where `inspect.signature` looks
        return self.own

    @property
    def __code__(self) -> Any:  # where `torch.export` looks
        return self.own.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if "own" in vars(self):
            return copy.deepcopy(self.own, memo)  # of a bound method: bound to the copy of its module
        memo[id(self)] = copied = object.__new__(type(self))  # never installed, so it is part of no module
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self) -> Any:
        return _itself, (self.own,)


def _itself(value: Any) -> Any:
    return value


@contextlib.contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Nothing that stands in for a forward inside `model` keeps anything; for probes, which run the blocks too."""
    modules = set(model.modules())
    running = [intercept for intercept in _INSTALLED if intercept.on and intercept.module in modules]
    try:
        for intercept in running:
            intercept.on = False
        yield
    finally:
        for intercept in running:
            intercept.on = True


def records() -> bool:
    """Whether this is a forward pass; activation checkpointing runs blocks again in the backward pass."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1


class CallCapture(Intercept):
    """Keeps the inputs of a network's last forward that recorded gradients, and the autocast that it ran under."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.last: tuple[tuple[Any, ...], dict[str, Any], torch.dtype | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.on and records() and torch.is_grad_enabled():
            kept_args, kept_kwargs = tree_map(_detached, (args, kwargs))
            self.last = (kept_args, kept_kwargs, _autocast_dtype(args, kwargs))
        return self.own(*args, **kwargs)

    def inputs(self, samples: int | None) -> tuple[Any, torch.dtype | None]:
        """Inputs for `attribute_layers`: those of the last forward, at most `samples` of them; and autocast's dtype.

        Raises:
            ValueError: there was no forward, or its arguments have no names."""
        if self.last is None:
            raise ValueError(
                "no inputs to probe on: no forward that records gradients since attach(); give inputs=, or run a "
                "training step first"
            )
        args, kwargs, autocast = self.last
        bound = forward_signature(self.module, self.own).bind(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise ValueError(f"the network takes *{name}, whose values have no names: give inputs=")
            named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        size = next((leaf.shape[0] for leaf in tree_leaves(named) if isinstance(leaf, Tensor) and leaf.dim()), 0)

        def first(leaf: Any) -> Any:
            carries = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
            return leaf[:samples] if carries else leaf

        return tree_map(first, named), autocast


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _autocast_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    device = next(leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
