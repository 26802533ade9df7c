"""Launch kernels with fixed configurations, from a checked-in table or a rule. No call tunes anything.

A row kernel walks [R, T, D] in tiles of `block_t` tokens by the next power of two of D. Each program takes a run of
consecutive tokens of one sequence, so that it reads the modulation of that sequence once.
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

from . import direct
from .tables import TABLES

INTERPRETED = triton.knobs.runtime.interpret  # Triton also decides this when the kernels are defined
# Each configuration serves the row widths up to one of these.
WIDTHS = {
    "residual_forward": (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    "residual_backward": (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    "masked_mean": (8192,),
    "velocity_delta": (128, 256, 1024, 2048, 4096, 8192),
    "cosine_rows": (128, 256, 512, 1024, 2048, 4096, 8192),
}
MAX_WIDTH = 8192
# Number of multiprocessors that the rule assumes for each architecture (A100; H100 and H200; B200; any other).
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "portable": 128}


@dataclass(frozen=True)
class LaunchConfig:
    """Launch of one kernel, for row widths up to one of `WIDTHS`."""

    block_t: int  # tokens per tile
    num_warps: int
    programs: int  # at most so many programs share the work, each with a row of partial sums; 0: one program per tile


@dataclass
class Launch:
    """One recorded kernel launch: what `Recording` collects."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    registers: int


@dataclass
class Recording:
    """Launches that are recorded instead of run, with the table of `architecture`; for the compile matrix."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def record(architecture: str) -> Iterator[Recording]:
    """Record every launch inside the block instead of running it. Tensors may be on the meta device."""
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
    """The name of the table for a device: sm80 (8.x), sm90 (9.x), sm100 (10.x), else portable."""
    return _recording.architecture if _recording is not None else _device_architecture(device)


def rule(kernel: str, width: int, multiprocessors: int) -> LaunchConfig:
    """The configuration for a width that was never measured.

    The backward of the residual stream loads one 16-byte vector (8 half-precision numbers) per thread and tensor, so
    that its three sums over tokens fit into 128 registers. It launches as many programs as are then resident at once,
    since each leaves partial rows. The other kernels load two vectors. They use four warps, and more for wider rows.
    The forward of a padded width takes at most two rows per tile: the idle lanes of more rows would take registers, and
    so reduce the number of resident warps."""
    if kernel == "masked_mean":
        return LaunchConfig(32, 4, programs=0)
    if kernel in ("velocity_delta", "cosine_rows"):
        warps = max(4, min(16, width // 512))
        programs = multiprocessors * 8 if kernel == "velocity_delta" else 0
        return LaunchConfig(max(1, warps * 512 // width), warps, programs)
    columns = triton.next_power_of_2(width)
    warps = max(4, min(16, columns // 256))
    vectors, resident = (2, 64) if kernel == "residual_forward" else (1, 16)
    rows = max(1, warps * 256 * vectors // columns)
    return LaunchConfig(rows if columns == width else min(rows, 2), warps, multiprocessors * resident // warps)


@functools.cache
def table_entry(architecture: str, kernel: str, width: int) -> LaunchConfig:
    """The measured configuration for a row width, or that of the rule. ValueError beyond MAX_WIDTH."""
    if width > MAX_WIDTH:
        raise ValueError(f"{kernel}: width {width} is more than the kernels' {MAX_WIDTH}; use AGREPA_OPS=reference")
    limit = next(limit for limit in WIDTHS[kernel] if width <= limit)
    measured = TABLES.get(architecture, {}).get(kernel, {}).get(limit)
    return rule(kernel, limit, MULTIPROCESSORS[architecture]) if measured is None else LaunchConfig(*measured)


def configuration(kernel: str, width: int, device: torch.device) -> LaunchConfig:
    """The configuration for a kernel family, a row width and a device.

    Raises:
        ValueError: the width is more than MAX_WIDTH.
    """
    return table_entry(architecture(device), kernel, width)


def fresh(like: Tensor) -> Tensor:
    """An empty contiguous tensor like another. It takes a third of the time of `torch.empty`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def chunks(sequences: int, frames: int, config: LaunchConfig) -> tuple[int, int]:
    """(programs per sequence, tokens per program) that spread the work over at most `config.programs` programs.

    Only more sequences than that take more. One program above the number that is resident at once would begin when the
    others end, and so nearly double the time.

    They depend on shapes and table alone, so that partial sums are added in the same order in every run."""
    tiles = math.ceil(frames / config.block_t)
    per_sequence = min(max(1, config.programs // sequences), tiles)
    tokens = math.ceil(tiles / per_sequence) * config.block_t
    return math.ceil(frames / tokens), tokens


def row_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last dimension is not contiguous. The kernels make no other copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strided(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """The tensor (a copy if its last dimension is not contiguous) and its strides.

    The strides are (of the first dimension, of the rows) for three dimensions, and (of the rows, 0) for [B, D]."""
    if tensor is None:
        return None, (0, 0)
    tensor = row_contiguous(tensor)
    stride = tensor.stride()
    return tensor, (stride[0], stride[1] if len(stride) == 3 else 0)


def accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """Dtype of statistics and sums: float32, float64 for a float64 stream."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def alignment(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides.

    Kernels take strides in this unit and multiply them by it. So the compiler knows the divisibility and emits vector
    loads, also for widths such as 1500, without a compilation for each sequence length."""
    return math.gcd(16, *strides)


def unspecialised(value: int) -> int:
    """Encode a member of a tuple argument so that Triton does not specialise on it; the kernel decodes it by `>> 4`.

    `do_not_specialize` does not apply to members of tuples: Triton compiles a 1 as a constant, and makes another build
    for multiples of 16, so that batches of other sizes would be compiled again. 16 value + 8 is neither."""
    return value << 4 | 8


@functools.cache
def options(num_warps: int, registers: int = 255, hip: bool = torch.version.hip is not None) -> dict[str, int]:
    """Compiler options of a launch. NVIDIA's assembler may spill registers to reach a rounder count. With an explicit
    limit (`registers`, or the most that a block of this size can have) it takes what it needs."""
    fixed = {"num_warps": num_warps, "num_stages": 1}
    return fixed if hip else fixed | {"maxnreg": min(registers, 2048 // num_warps)}


@functools.cache
def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def launch(
    kernel: Any,
    device: torch.device,
    programs: int,
    *arguments: Any,
    num_warps: int,
    registers: int = 255,
    **constants: Any,
) -> None:
    """Run `programs` programs of a kernel on the tensors' device, on its current stream.

    registers: the most that the compiler may give a thread (NVIDIA)."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, programs, arguments, constants, num_warps, registers))
    elif not (cuda := _is_cuda(device)) and not INTERPRETED:
        raise ValueError(f"the Triton kernels run on CUDA tensors (elsewhere under TRITON_INTERPRET=1), got {device}")
    elif not cuda:
        kernel[(programs,)](*arguments, **constants, **options(num_warps, registers))
    elif device.index == torch.cuda.current_device():
        direct.run(kernel, device.index, programs, arguments, constants, options(num_warps, registers))
    else:
        with torch.cuda.device(device):
            direct.run(kernel, device.index, programs, arguments, constants, options(num_warps, registers))
