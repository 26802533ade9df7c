"""What a case is made of: problems, each with one set-up that correctness, speed and memory share.

A case is a module in `cases/` with `TITLE` and `problems(scale, device)`; see docs/benchmarks.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SCALES = ("toy", "quick", "full")  # smoke test; minutes on two CPU cores; a GPU, or patience

Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]


class Unavailable(Exception):
    """A provider that cannot run here, and why: not installed, no such device."""


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    Attributes:
        name: shown in tables; unique within the problem.
        role: "ours" (exactly one), "engine" (another way through this library), "rival", or "published" (the form
            the method's authors released).
        make: builds everything and returns the call, which gives the outputs that the gate checks. May raise
            `Unavailable`.
        capturable: the call never waits for the device, so that a CUDA graph may hold it.
    """

    name: str
    role: str
    make: Callable[[], Run]
    capturable: bool = False


@dataclass(frozen=True)
class Setup:
    """Providers over the same inputs, and what their outputs are held against.

    Attributes:
        providers: the contestants; one has the role "ours".
        reference: the right outputs, in float64 where affordable.
        bounds: {name of an output: largest relative rms error}, in the order of the outputs.
        expression: name of the provider whose error ours may at most double, or None.
    """

    providers: tuple[Provider, ...]
    reference: Callable[[], Outputs]
    bounds: Mapping[str, float]
    expression: str | None = None


@dataclass(frozen=True)
class Problem:
    """One size and mode of a case.

    Attributes:
        params: what it is, in the order to show.
        dtype: of the work, as "float32".
        bytes, flops: the least a call must move and compute, counted from the shapes; None where nobody can say.
        build: makes the set-up on a device; all its data is random.
        single: a call takes so long that one round must do.
        alone: the providers do not fit into memory together; each is built, timed and freed before the next.
    """

    params: Mapping[str, str | int]
    dtype: str
    bytes: int | None
    flops: int | None
    build: Callable[[torch.device], Setup]
    single: bool = False
    alone: bool = False

    @property
    def key(self) -> str:
        """The params in one line, e.g. "mode=forward rows=1024 width=384"."""
        return " ".join(f"{name}={value}" for name, value in self.params.items())


def dtype_of(name: str) -> torch.dtype:
    """ "float32" -> torch.float32."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def optional(name: str) -> ModuleType:
    """An optional package of a rival.

    Raises:
        Unavailable: it is not installed here, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name == name.partition(".")[0]:
            raise Unavailable(f"{error.name} is not installed") from None
        raise Unavailable(f"{name} cannot be imported: {error}") from None


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """`torch.compile` for a fixed shape; backward may be called again on the same graph.

    Graphs are the protocol's business: the modes that make their own would be timed with their copies."""
    import torch._functorch.config
    import torch._inductor.config

    # Said outright, it is part of Inductor's cache key: code that was compiled for two threads is not served to one.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    # A donated buffer is overwritten in backward, which timing backward alone repeats.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, mode=mode)


def backward(outputs: Outputs, inputs: Outputs, gradients: Outputs) -> Outputs:
    """Gradients of the inputs; the graph is kept for the next call."""
    return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def modes(forward: Callable[..., Outputs], inputs: Outputs, gradients: Outputs, mode: str) -> Run:
    """A call of `forward(*inputs)` in a mode: "forward" (no graph kept), "backward" (alone) or "both"."""
    if mode == "forward":

        def run() -> Outputs:
            with torch.no_grad():
                return forward(*inputs)

        return run
    if mode == "backward":
        outputs = forward(*inputs)
        return lambda: backward(outputs, inputs, gradients)

    def run_both() -> Outputs:
        outputs = forward(*inputs)
        return (*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, gradients))

    return run_both
