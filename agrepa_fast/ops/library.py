"""The `agrepa_fast` operator library: a registered op for the compiler, and a shorter call for eager PyTorch.

`torch.compile` does not trace into the ops: their schema, shapes and gradient are registered. So eps and flags reach
the kernels as Python constants.
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
    """A registered op. The annotated signature of `run` is its schema.

    All other functions of an op take `arguments`, a named tuple of that signature. So a new argument is added to the
    signature and where it is used.

    In eager PyTorch a call goes to `run` directly, as the dispatcher takes several microseconds, more than small
    kernels. A compiler, a dispatch mode (fake tensors, selective checkpointing), a tensor subclass or a tensor on
    the meta device needs the dispatcher. Gradients cannot be differentiated again: a backward with create_graph=True
    raises.
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
            outputs: the number of returned tensors; None: as the annotation of `run` has it.
            save: (ctx, arguments, outputs) saves what the gradient needs. An op that is itself a gradient has neither.
            gradient: (ctx, gradients of the outputs) -> {argument: gradient}; other arguments have none.
            reference: the op in plain PyTorch. Its parameters are some of `run`'s.
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
            # The kernels record no graph, so the recorded graph would lack every term that runs through this op,
            # and autograd would treat the gradient as a constant without an error.
            if torch.is_grad_enabled():
                _refuse()
            return tuple(map(gradient(ctx, *grads).get, arguments._fields))

        def forward(ctx: Any, *all_inputs: Any) -> Any:
            *inputs, prepared = all_inputs
            output = run(*inputs) if prepared is None else prepared()
            save(ctx, arguments(*inputs), output)
            return output

        qualified = f"agrepa_fast::{name}"
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)

        def function_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *backward(ctx, *grads), None

        # With forward and setup_context apart, and in `Function.apply` before it reaches C++, every call would
        # inspect signatures and look for transforms: three times the cost of the rest.
        members = {"forward": staticmethod(forward), "backward": staticmethod(function_backward)}
        function = type(name, (torch.autograd.Function,), members)
        self._differentiable = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *inputs: Any) -> Any:
        """Run the op. The first tensor among the first two inputs tells whether the dispatcher is needed."""
        if not eager(inputs[1] if inputs[0] is None else inputs[0]):
            return self.registered(*inputs)
        if self._differentiable is not None and torch.is_grad_enabled():
            return self._differentiable(*inputs, None)
        return self.run(*inputs)

    def differentiable(self, prepared: Callable[[], Any], *inputs: Any) -> Any:
        """Run the op in eager PyTorch, with a gradient; `prepared()` returns what `run(*inputs)` would."""
        assert self._differentiable is not None, "the op has a gradient"
        return self._differentiable(*inputs, prepared)

    def in_pytorch(self, arguments: Any) -> Any:
        """Run the reference on the arguments that it takes."""
        assert self.reference is not None, "only ops with a reference are called"
        return self.reference(**{name: getattr(arguments, name) for name in self._reference_names})


def _schema(name: str, signature: inspect.Signature, outputs: int | None) -> str:
    """The schema of an op. `outputs`, if given, overrides the number of tensors in the return annotation."""

    def prototype() -> None: ...

    returns = signature.return_annotation
    if outputs is not None:
        returns = Tensor if outputs == 1 else tuple[(Tensor,) * outputs]  # type: ignore[misc]
    prototype.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, op_name=name, mutates_args=())


def eager(x: Tensor) -> bool:
    """Whether x is an ordinary tensor with data and no compiler, dispatch mode or function transform is active."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, Parameter)
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
    )


def _refuse(*arguments: Any) -> Any:
    raise RuntimeError(
        "the fused ops have no gradient of their gradient: set AGREPA_OPS=reference to differentiate twice"
    )
