"""Speed and memory of a run: samples/s, frames/s, MFU (the share of the device's matmul rate), bytes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from ..models.cost import forward_flops
from ..models.dit import DiTConfig
from .nvml import Nvml

T = TypeVar("T")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured floating point operations per second of a large matrix product, the best of five."""
    size = 4096 if device.type == "cuda" else 768
    # It has a generator of its own, because the global one belongs to the training.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first one warms up
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Rates:
    """Counts since the last `read`. Pauses (validation, probes, checkpoints) are not counted."""

    def __init__(self, dit: DiTConfig, device: torch.device, bf16: bool) -> None:
        self.dit = dit
        self.device = device
        self.matmul = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
        self.nvml = Nvml(device)
        self._clear()

    def _clear(self) -> None:
        self.batches = self.samples = self.frames = self.flops = 0
        self.seconds = self.waited = 0.0
        self.since = time.perf_counter()

    def count(self, samples: int, frames: int) -> None:
        """Count a forward and backward of `samples` clips of `frames` frames each, padding included."""
        self.batches += 1
        self.samples += samples
        self.frames += samples * frames
        self.flops += 3 * forward_flops(self.dit, samples, frames)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches. The time that it takes to get each is counted as waiting for data."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.since

    def go_on(self) -> None:
        self.since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds for each batch, rates of this rank per second, MFU (0 to 1, relative to `matmul`), the share of the
        time in which training waited for data, memory, and the card's state if NVML gives it.
        """
        self.pause()
        values = {
            "batch_seconds": self.seconds / self.batches,
            "samples_per_second": self.samples / self.seconds,
            "frames_per_second": self.frames / self.seconds,
            "mfu": self.flops / self.seconds / self.matmul,
            "data_wait": self.waited / self.seconds,
            "memory_bytes": _memory(self.device),
            "watts": self.nvml.watts(),
            "sm_mhz": self.nvml.clock("SM"),
            "utilisation": self.nvml.utilisation(),
        }
        self._clear()
        return {name: value for name, value in values.items() if value is not None}


def _memory(device: torch.device) -> int | None:
    """Bytes in use: the peak of the CUDA allocator, or the resident set of the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()


def resident_bytes() -> int | None:
    """The resident set of this process; None where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * 4096
