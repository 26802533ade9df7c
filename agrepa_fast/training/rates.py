"""Speed and memory of a run: samples/s, frames/s, MFU (the share of the device's matmul rate), bytes."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ..models.cost import forward_flops
from ..models.dit import DiTConfig
from .nvml import Nvml


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
        self.samples = self.frames = self.flops = 0
        self.seconds = 0.0
        self.since = time.perf_counter()

    def count(self, samples: int, frames: int) -> None:
        """Count a forward and backward of `samples` clips of `frames` frames each, padding included."""
        self.samples += samples
        self.frames += samples * frames
        self.flops += 3 * forward_flops(self.dit, samples, frames)

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.since

    def go_on(self) -> None:
        self.since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Rates of this rank per second, MFU (0 to 1, relative to `matmul`), memory, and the card's state if NVML gives
        it.
        """
        self.pause()
        values = {
            "samples_per_second": self.samples / self.seconds,
            "frames_per_second": self.frames / self.seconds,
            "mfu": self.flops / self.seconds / self.matmul,
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
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * 4096
