"""The parts of a case: problems, each with one set-up that correctness, speed and memory share.

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

SCALES = ("toy", "quick", "full")  # a smoke test; minutes on two CPU cores; for a GPU (hours on a CPU)

Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]


class Unavailable(Exception):
    """A provider cannot run here; the message says why (not installed, no such device)."""


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a problem.

    Attributes:
        name: its name in tables, unique in the problem.
        role: "ours" (exactly one), "engine" (another way through this library), "rival", or "published" (the form that
            the method's authors released).
        make: builds everything and returns the call; the call returns the outputs that the gate checks. May raise
            `Unavailable`.
        capturable: the call never waits for the device, so a CUDA graph may record it.
    """

    name: str
    role: str
    make: Callable[[], Run]
    capturable: bool = False


@dataclass(frozen=True)
class Setup:
    """Providers on the same inputs, and the reference for their outputs.

    Attributes:
        providers: exactly one has the role "ours".
        reference: the right outputs, in float64 if that is affordable.
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
        params: sizes and mode, in the order to show.
        dtype: dtype of the work, such as "float32".
        bytes, flops: the least that a call must move and compute, counted from the shapes; None if unknown.
        build: makes the set-up on a device, with random data.
        single: one call takes so long that it is timed in a single round.
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
    """Import an optional package of a rival.

    Raises:
        Unavailable: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name == name.partition(".")[0]:
            raise Unavailable(f"{error.name} is not installed") from None
        raise Unavailable(f"{name} cannot be imported: {error}") from None
    except Exception as error:  # some packages ask for a device or a driver as they are imported
        raise Unavailable(f"{name} cannot be imported: {type(error).__name__}: {error}") from None


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """`torch.compile` for a fixed shape, whose backward may be called again on the same graph.

    It makes no CUDA graphs: the protocol does. Modes that make their own would be timed with their copies.
    """
    import torch._functorch.config
    import torch._inductor.config

    # Setting it makes it part of Inductor's cache key, so that code for two threads is not used with one.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    # Backward overwrites a donated buffer, but timing backward alone runs it several times.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, mode=mode)


def backward(outputs: Outputs, inputs: Outputs, gradients: Outputs) -> Outputs:
    """Gradients of the inputs. The graph is kept for the next call."""
    return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def modes(forward: Callable[..., Outputs], inputs: Outputs, gradients: Outputs, mode: str) -> Run:
    """A call of `forward(*inputs)` in a mode: "forward" (no graph is kept), "backward" (alone) or "both"."""
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
