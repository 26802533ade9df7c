"""Facts about a class of models that a probe cannot find out by running, registered once by the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """Facts about a class of models that a probe cannot find out by running; `register_adapter` keeps them.

    Attributes:
        block_list: dotted name(s) of block lists or single blocks; None: what one forward calls.
        velocity: picks the velocity [B, ...] out of what forward returns; None: it is a tensor, or an object's
            `.sample` or `.last_hidden_state`.
        dense: run all streams from the start.
        adds: whether the model's forward adds a block's result to the state (x = x + block(x)); None: found by running.
    """

    block_list: str | Sequence[str] | None = None
    velocity: Callable[[Any], Tensor] | None = None
    dense: bool = False
    adds: bool | None = None


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
