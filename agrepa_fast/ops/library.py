"""The `agrepa_fast` operator library: each op once for the compiler and once, shorter, for eager PyTorch.

Ops are opaque to `torch.compile` (schema, shape algebra and gradient are registered, the kernel launch is not
traced), so that eps and flags reach the kernels as the Python constants they are.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .dispatch import transformed

LIBRARY = torch.library.Library("agrepa_fast", "DEF")


class FusedOp:
    """A registered op, written down once: the annotated signature of `run` is its schema.

    Everything else of an op picks what it needs from `arguments`, a named tuple of that signature, so that a new
    argument is written there, and where it is used.

    A call goes straight to `run` in eager PyTorch: the dispatcher costs several microseconds of Python, more than small
    kernels take. It is needed under a compiler, a dispatch mode (fake tensors, selective checkpointing) or a tensor
    subclass. A gradient cannot be differentiated again: a backward that is asked for its own graph raises.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[[Any], Any],
        *,
        outputs: int | None = None,
        save: Callable[[Any, Any, Any], None] | None = None,
        gradient: Callable[..., dict[str, Tensor | None]] | None = None,
        reference: Callable[..., Any] | None = None,
    ) -> None:
        """Register `agrepa_fast::name`.

        Args:
            run: launches the kernels and returns fresh tensors.
            fake: arguments (named tuple) -> empty outputs.
            outputs: how many tensors are returned; None where the annotation of `run` says it.
            save: (ctx, arguments, outputs) keeps what the gradient needs. The op of a gradient has neither.
            gradient: (ctx, gradients of the outputs) -> gradients of the arguments by name; others have none.
            reference: the op in plain PyTorch. Its parameters have names of `run`'s.
        """
        signature = inspect.signature(run, eval_str=True)
        self.arguments: Any = namedtuple(name, signature.parameters)  # type: ignore[misc]
        self.run = run
        self.reference = reference
        parameters = {} if reference is None else inspect.signature(reference).parameters
        self._reference_names = tuple(parameters)
        self.needed = tuple(n for n, p in parameters.items() if p.default is p.empty)  # cannot be None
        if unknown := set(self._reference_names) - set(signature.parameters):
            raise TypeError(f"{name}: the reference takes {', '.join(sorted(unknown))}, which the op does not")

        LIBRARY.define(_schema(name, signature, outputs), tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, run, device)
        qualified = f"agrepa_fast::{name}"
        torch.library.register_fake(qualified, lambda *inputs: fake(self.arguments(*inputs)), lib=LIBRARY)
        self.registered = getattr(torch.ops.agrepa_fast, name).default
        self._differentiable: Callable[..., Any] | None = None
        if save is None or gradient is None:
            torch.library.register_autograd(qualified, _refuse, lib=LIBRARY)
        else:
            self._register_gradient(name, save, gradient)

    def _register_gradient(self, name: str, save: Callable[..., None], gradient: Callable[..., Any]) -> None:
        run, arguments = self.run, self.arguments

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, arguments(*inputs), output)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            # The kernels leave no graph behind, so what is recorded would lack every term that runs through this op,
            # and autograd would not notice: it would take the gradient for a constant.
            if torch.is_grad_enabled():
                _refuse()
            return tuple(map(gradient(ctx, *grads).get, arguments._fields))

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            save(ctx, arguments(*inputs), output)
            return output

        qualified = f"agrepa_fast::{name}"
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
        # With forward and setup_context apart, and in `Function.apply` before it reaches C++, every call would
        # inspect signatures and look for transforms: three times the cost of the rest.
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(name, (torch.autograd.Function,), members)
        self._differentiable = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *inputs: Any) -> Any:
        """One of the first two inputs is a tensor; it shows whether the call may go past the dispatcher."""
        if not eager(inputs[1] if inputs[0] is None else inputs[0]):
            return self.registered(*inputs)
        if self._differentiable is not None and torch.is_grad_enabled():
            return self._differentiable(*inputs)
        return self.run(*inputs)

    def in_pytorch(self, arguments: Any) -> Any:
        """The reference on the arguments that it takes."""
        assert self.reference is not None, "only ops with a reference are called"
        return self.reference(**{name: getattr(arguments, name) for name in self._reference_names})


def _schema(name: str, signature: inspect.Signature, outputs: int | None) -> str:
    """The schema of an op; where `outputs` says how many tensors it returns, in place of the annotation."""

    def prototype() -> None: ...

    returns = signature.return_annotation
    if outputs is not None:
        returns = Tensor if outputs == 1 else tuple[(Tensor,) * outputs]  # type: ignore[misc]
    prototype.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, op_name=name, mutates_args=())


def eager(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, with no compiler, dispatch mode or function transform at work."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
    )


def _refuse(*arguments: Any) -> Any:
    raise RuntimeError(
        "the fused ops have no gradient of their gradient: set AGREPA_OPS=reference to differentiate twice"
    )
