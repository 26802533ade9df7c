"""CUDA graphs and streams: run work on a side stream until it is warm, record it once, replay it; or run work beside.

This file holds what all recordings share. `training.step` records a training step with it, `attribution.graph` a probe.
`training.feed` runs the teachers beside the step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device on which work is warmed up and recorded.

    cuBLAS keeps a workspace of 32 MiB on Hopper for every stream it has run on, so a new stream for each warm-up would
    use up memory."""
    return _stream(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def run_aside(work: Callable[[], Any], device: torch.device) -> None:
    """Run `work` on the side stream, after the current stream's work; the current stream then waits for it.

    The last runs before a recording must be on that stream: kernels are compiled, libraries take their workspaces, and
    autograd remembers the stream of a parameter's gradient.
    """
    current, aside = torch.cuda.current_stream(device), side_stream(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        work()
    current.wait_stream(aside)


class Beside:
    """Runs work at the same time as what the current stream was given before it.

    The work must not depend on what the current stream may still be doing: its inputs come from the host, or were
    finished before. What the current stream is given later waits for the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, work: Callable[[], T], tensors: Callable[[T], Iterable[Tensor]]) -> T:
        """Run `work` and return its result. `tensors(result)` lists all tensors that the current stream will read."""
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        for tensor in tensors(result):
            # The allocator knows one stream of a tensor, the one it was made on. Without this the next work would get
            # its memory as soon as Python drops it, while the current stream may have it still to read.
            tensor.record_stream(current)
        return result


class Recording:
    """`work()` recorded as a CUDA graph; `replay()` runs it again on the present contents of the same memory.

    Recording computes nothing. `output` is what `work` returned; every replay overwrites its tensors.

    Args:
        work: static device work, which neither waits for the device nor compiles anything. torch.compile is told to
            raise if it would compile, because a compilation breaks a recording with a less legible error.
        pool: another living recording to share memory with; the two must then never run at the same time.
        generators: the CUDA generators, besides the default one, from which `work` draws.

    Raises:
        RuntimeError: the work cannot be recorded. CUDA's allocator and generators may be unusable from then on, so the
            process should end.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        device: torch.device,
        pool: Recording | None = None,
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)
        try:
            with _compiling_refused():
                self.output = _record(self.graph, work, device, None if pool is None else pool.graph.pool())
        except RuntimeError as error:
            raise RuntimeError(f"the work cannot be recorded as a CUDA graph: {error}") from error

    def replay(self) -> None:
        """Run the recorded work; returns without waiting for the device."""
        self.graph.replay()


def _record(graph: torch.cuda.CUDAGraph, work: Callable[[], Any], device: torch.device, pool: Any) -> Any:
    # After a broken recording torch.cuda.graph leaves its stream current; the outer context restores the other.
    current, aside = torch.cuda.current_stream(device), side_stream(device)
    # "thread_local": under the default mode a call of another thread, such as the data loader's that pins the next
    # batch, would break the recording.
    options: dict[str, Any] = {"pool": pool, "stream": aside, "capture_error_mode": "thread_local"}
    with torch.cuda.stream(current), torch.cuda.graph(graph, **options):
        return work()


def _compiling_refused() -> contextlib.AbstractContextManager[Any]:
    """Make torch.compile raise if it would compile.

    If its module, which takes seconds to import, is not loaded, nothing can compile.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("fail_on_recompile")
