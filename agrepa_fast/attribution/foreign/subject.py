"""Another model with its inputs: run it on some of its samples, take its velocity, compare velocities."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .inputs import Inputs
from .intercept import forward_signature
from .register import Adapter


class NoVelocity(TypeError):
    """The result of a forward cannot be read as a velocity."""


class Subject:
    """A model, its inputs and its adapter; `kind` is the name of its class."""

    def __init__(
        self, model: nn.Module, inputs: Any, adapter: Adapter, batched: Sequence[str] | Mapping[str, bool] | None
    ) -> None:
        self.model, self.adapter, self.kind = model, adapter, type(model).__name__
        self.eps = 0.0  # of the coarsest dtype that a module returned: a forward may use autocast inside
        args, kwargs = arguments(inputs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            raise TypeError("inputs: expected at least one tensor with the samples first")
        self.inputs = Inputs(args, kwargs, bound(model, args, kwargs), batched)

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
                f"sample, got {list(velocity.shape)}; pick it with register_adapter(..., Adapter(velocity=...))"
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
        if isinstance(output, tuple | list) and [part for part in output if part is not None] == [output[0]]:
            output = output[0]
        if not isinstance(output, Tensor):
            raise NoVelocity(
                f"{self.kind} returns {type(output).__name__}: expected a tensor or an object with "
                ".sample; say which part is the velocity with register_adapter(..., Adapter(velocity=...))"
            )
        return output

    def same(self, expected: Tensor, velocity: Tensor) -> bool:
        return not expected.isfinite().all() or difference(expected, velocity) <= self._tolerance(expected)

    def _tolerance(self, velocity: Tensor) -> float:
        """Relative difference that rounding may make between batch sizes."""
        eps = max(self.eps, eps_of(self.model, velocity))
        if torch.is_autocast_enabled(velocity.device.type) or eps > 1e-4:
            return 0.1
        return 1e-3 if eps > 1e-10 else 1e-6  # some models compute parts of a float64 forward in float32


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
        signature = forward_signature(model).bind(*args, **kwargs)
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
