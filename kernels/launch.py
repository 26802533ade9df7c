"""How a kernel is launched: frozen configurations from a checked-in table per architecture, never tuned at call time.

A row kernel walks [R, T, D] in tiles of `block_t` tokens by one or two power-of-two column tiles. Each program
takes a run of consecutive tokens of one sequence, so that it reads the modulation of that sequence once.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # decided, like Triton's own choice, when the kernels are defined
MAX_WIDTH = 8192  # the last entry of every table


@dataclass(frozen=True)
class LaunchConfig:
    """Launch of one kernel for widths up to its key in the table."""

    block_t: int  # tokens per tile
    num_warps: int
    programs: int  # programs to spread the work over, bounding the partial sums of a backward; 0: one per tile
    split: bool  # cover a width that is no power of two by two tiles (768 = 512 + 256) instead of padding it


@dataclass
class Launch:
    """One recorded kernel launch: what `Recording` collects."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int


@dataclass
class Recording:
    """Launches collected instead of run, with the tables of `architecture` (the compile matrix uses this)."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def record(architecture: str) -> Iterator[Recording]:
    """Collect every launch inside the block instead of running it; tensors may be on the meta device."""
    global _recording
    _recording = Recording(architecture)
    try:
        yield _recording
    finally:
        _recording = None


@functools.cache
def _device_architecture(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return "portable"
    return {8: "sm80", 9: "sm90", 10: "sm100"}.get(torch.cuda.get_device_capability(device)[0], "portable")


def architecture(device: torch.device) -> str:
    """The table used for a device: sm80 (8.x), sm90 (9.x), sm100 (10.x), else portable."""
    return _recording.architecture if _recording is not None else _device_architecture(device)


@functools.cache
def table_entry(architecture: str, kernel: str, width: int) -> LaunchConfig:
    """The table's entry for a row width; ValueError beyond the table."""
    from .tables import TABLES

    table = TABLES[architecture][kernel]
    for limit in sorted(table):
        if width <= limit:
            return table[limit]
    raise ValueError(f"{kernel}: width {width} is more than the kernels' {MAX_WIDTH}; use AGREPA_OPS=reference")


def configuration(kernel: str, width: int, device: torch.device) -> LaunchConfig:
    """The table's entry for a kernel family, a row width and a device.

    Raises:
        ValueError: the width is beyond the tables.
    """
    return table_entry(architecture(device), kernel, width)


@functools.cache
def column_tiles(width: int, config: LaunchConfig) -> tuple[int, int]:
    """Widths (main, tail) of the column tiles, powers of two; tail 0 where one tile covers the row.

    A tail has one 16-byte vector of half-precision numbers for each thread: with less, the compiler would cut the
    vectors up. Splitting is taken only where it still saves lanes: with two rows in four warps, 1152 -> (1024, 512)
    instead of (2048, 0), but 1600 -> (2048, 0).
    """
    padded = triton.next_power_of_2(width)
    main = padded // 2
    tail = max(16, 8 * 32 * config.num_warps // config.block_t, triton.next_power_of_2(width - main))
    return (main, tail) if config.split and main >= 64 and tail < main else (padded, 0)


def fresh(like: Tensor) -> Tensor:
    """An empty contiguous tensor in the shape, dtype and device of another: a third of what `torch.empty` takes."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def chunks(sequences: int, frames: int, config: LaunchConfig) -> tuple[int, int]:
    """(programs per sequence, tokens per program) that spread the work over about `config.programs` programs.

    Depends on shapes and table alone, so that partial sums are added in the same order in every run."""
    tiles = math.ceil(frames / config.block_t)
    per_sequence = min(max(1, math.ceil(config.programs / sequences)), tiles)
    tokens = math.ceil(tiles / per_sequence) * config.block_t
    return math.ceil(frames / tokens), tokens


def row_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy when its last dimension is not contiguous (the one copy the kernels make)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """Dtype of statistics and sums: float32, float64 for a float64 stream."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def alignment(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides.

    Kernels take strides in this unit and multiply it back in: the compiler then knows the divisibility and emits
    vector loads, also for widths such as 1500, without one compilation per sequence length."""
    return math.gcd(16, *strides)


@functools.cache
def options(num_warps: int, hip: bool = torch.version.hip is not None) -> dict[str, int]:
    """Compiler options of a launch. NVIDIA's assembler may spill to reach a rounder register count; given the most
    a block of this size can have, it takes what it needs."""
    fixed = {"num_warps": num_warps, "num_stages": 1}
    return fixed if hip else fixed | {"maxnreg": min(255, 2048 // num_warps)}


@functools.cache
def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def launch(kernel: Any, device: torch.device, programs: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the tensors' device, on its current stream."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, programs, arguments, constants, num_warps))
    elif not (cuda := _is_cuda(device)) and not INTERPRETED:
        raise ValueError(f"the Triton kernels run on CUDA tensors (elsewhere under TRITON_INTERPRET=1), got {device}")
    elif not cuda or device.index == torch.cuda.current_device():
        kernel[(programs,)](*arguments, **constants, **options(num_warps))
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, **options(num_warps))
