"""The `agrepa_fast` operator library: each op once for the compiler and once, shorter, for eager PyTorch.

Ops are opaque to `torch.compile` (schema, shape algebra and gradient are registered, the kernel launch is not
traced), so that eps and flags reach the kernels as the Python constants they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .dispatch import transformed

LIBRARY = torch.library.Library("agrepa_fast", "DEF")


class FusedOp:
    """A registered op and its short eager path; both end in the same function that launches the kernels.

    Going through the dispatcher costs several microseconds of Python per call, more than small kernels take.
    It is needed under a compiler, a dispatch mode (fake tensors, selective checkpointing) or a tensor subclass.

    A gradient cannot be differentiated again: a backward that is asked for its own graph raises.
    """

    def __init__(
        self,
        schema: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
    ) -> None:
        """`run` launches; `fake` gives empty outputs; `gradient` is (setup_context, backward), None for the op of a
        gradient, which has none of its own."""
        name = schema.split("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, run, device)
        torch.library.register_fake(f"agrepa_fast::{name}", fake, lib=LIBRARY)
        setup_context, backward = (None, _refuse) if gradient is None else (gradient[0], _first_only(gradient[1]))
        torch.library.register_autograd(f"agrepa_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        self.registered = getattr(torch.ops.agrepa_fast, name).default
        self.run = run
        self.differentiable: Callable[..., Any] | None = None
        if gradient is not None:
            save = gradient[0]

            def forward(ctx: Any, *inputs: Any) -> Any:
                output = run(*inputs)
                save(ctx, inputs, output)
                return output

            # With forward and setup_context apart, and in `Function.apply` before it reaches C++, every call would
            # inspect signatures and look for transforms: three times the cost of the rest.
            members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            function = type(name, (torch.autograd.Function,), members)
            self.differentiable = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, first: Tensor, *others: Any) -> Any:
        if not eager(first):
            return self.registered(first, *others)
        if self.differentiable is not None and torch.is_grad_enabled():
            return self.differentiable(first, *others)
        return self.run(first, *others)


def eager(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, with no compiler, dispatch mode or function transform at work."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
    )


def _first_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward`, but an error where autograd would record it (`create_graph=True`).

    The kernels leave no graph behind, so what is recorded would lack every term that runs through this op, and
    autograd would not notice: it would take the gradient for a constant."""

    def first_only(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse()
        return backward(ctx, *grads)

    return first_only


def _refuse(*arguments: Any) -> Any:
    raise RuntimeError(
        "the fused ops have no gradient of their gradient: set AGREPA_OPS=reference to differentiate twice"
    )
