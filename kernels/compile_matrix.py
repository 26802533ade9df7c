"""Compile every kernel for every architecture, without a GPU, and read what came out of the compiler.

`python -m agrepa_fast.kernels.compile_matrix [page.md]` prints the table of registers, shared memory, spills, share
of 16-byte memory instructions and bytes moved, and writes it to the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import pooling, residual
from .launch import Launch, options, record
from .tables import TABLES

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Stream and modulation. A bfloat16 stream under float32 modulation holds the most registers of the half types.
DTYPES = {
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
}
SEQUENCES, FRAMES, STREAMS = 8, 2048, 13
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Case:
    """One op at one width, dtype and target; compiling it compiles its forward and backward kernels."""

    op: str
    width: int
    dtype: str
    target: str


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel."""

    case: Case
    kernel: str
    block_t: int
    num_warps: int
    registers: int
    shared: int  # bytes
    spills: int  # bytes of local memory (NVIDIA), spilled registers (AMD)
    wide_loads: float  # share of the bytes loaded by 16-byte instructions (NVIDIA; else nan)
    wide_stores: float
    bytes_per_row: float  # moved, per row of the stream
    minimum: float  # of that, what the operation cannot do without


def cases() -> list[Case]:
    """Every kernel, launch configuration and target in two dtype pairs; the other two at one width."""
    found = []
    for target in TARGETS:
        table = TABLES[target if target in TABLES else "portable"]
        widths = sorted(set(table["residual_forward"]) | set(table["residual_backward"]))
        for op in ("gated_residual_norm", "layer_norm_modulate", "gated_residual"):
            for width in widths:
                for dtype in DTYPES if width == 1024 else ("bf16+fp32", "fp32"):
                    found.append(Case(op, width, dtype, target))
        for op in ("masked_mean", "velocity_delta"):
            for width in sorted(table[op]):
                found += [Case(op, width, dtype, target) for dtype in ("bf16", "fp32", "fp16")]
    return found


def launches(case: Case) -> list[Launch]:
    """The launches of one op, forward and backward, recorded on meta tensors."""
    stream, other = DTYPES[case.dtype]

    def empty(*shape: int, dtype: torch.dtype = stream) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(SEQUENCES, FRAMES, case.width)
    with record(case.target if case.target in TABLES else "portable") as recording:
        if case.op == "masked_mean":
            mask = empty(SEQUENCES, FRAMES, dtype=torch.bool)
            pooled, count = pooling.masked_mean(x, mask)
            pooling.masked_mean_backward(pooled, mask, count, FRAMES)
        elif case.op == "velocity_delta":
            velocity = empty(STREAMS, SEQUENCES, FRAMES, case.width)
            mask = empty(SEQUENCES, FRAMES, dtype=torch.bool)
            change, energy, count = pooling.velocity_delta(velocity, mask)
            pooling.velocity_delta_backward(change, energy, velocity, mask, count)
        else:
            gate: Tensor | None
            shift: Tensor | None
            scale: Tensor | None
            gate, shift, scale = empty(SEQUENCES, 3 * case.width, dtype=other).chunk(3, dim=1)
            if case.op == "layer_norm_modulate":
                gate = None
            if case.op == "gated_residual":
                shift = scale = None
            branch = None if gate is None else x
            s = None if gate is None else empty(SEQUENCES, dtype=other)
            index = empty(SEQUENCES, dtype=torch.int64)
            _, h, mean, rstd = residual.forward(x, branch, gate, shift, scale, s, index, 1e-6, False)
            residual.backward(branch, h, x, branch, gate, scale, s, index, mean, rstd, False)
    return recording.launches


def source(launch: Launch) -> ASTSource:
    """What `triton.compile` needs to build a recorded launch: as the launcher would specialise it."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments)):
        if value is None:
            constants[name] = None
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[position,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    order = launch.kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in order}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, target: str) -> triton.compiler.CompiledKernel:
    """Build one recorded launch for a target."""
    chosen = options(launch.num_warps, hip=TARGETS[target].backend == "hip")
    return triton.compile(source(launch), target=TARGETS[target], options=chosen)


def _loop(ptx: str) -> str:
    """The lines of the row loop (between a label and a branch back to it); all lines where there is none."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\$\w+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        match = re.search(r"\bbra\S*\s+(\$\w+);", line)
        if match and labels.get(match[1], i) < i:
            inside.update(range(labels[match[1]], i))
    return "\n".join(lines[i] for i in sorted(inside)) if inside else ptx


def wide_share(ptx: str, instruction: str) -> float:
    """Share of the bytes of the row loop's global loads (`ld`) or stores (`st`) that 16-byte instructions move."""
    wide = total = 0
    for vector, bits in re.findall(rf"{instruction}\.global(?:\.\w+::\w+)*(?:\.v(\d))?\.[bfu](\d+)", _loop(ptx)):
        size = int(vector or 1) * int(bits) // 8
        total += size
        wide += size if size >= 16 else 0
    return wide / total if total else float("nan")


def _resources(kernel: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """(registers, spills) of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        number = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", kernel.asm["amdgcn"]))
        return int(number["vgpr_count"]), int(number["vgpr_spill_count"]) + int(number["sgpr_spill_count"])
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    number = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(number["REG"]), int(number["STACK"]) + int(number["LOCAL"])


def _bytes_per_row(case: Case, launch: Launch) -> tuple[float, float]:
    """(moved, minimum) bytes per row of the stream: each tensor once; the minimum counts the stream's alone."""
    rows = SEQUENCES * FRAMES
    tensors = [value for value in launch.arguments if isinstance(value, Tensor)]
    sizes = [value.numel() * value.element_size() / rows for value in tensors]
    whole = [size for value, size in zip(tensors, sizes) if value.numel() >= rows * case.width]
    return sum(sizes), sum(whole)


def compile_case(case: Case) -> list[Compiled]:
    """Compile the kernels of a case and read them."""
    found = []
    for launch in launches(case):
        kernel = compile_launch(launch, case.target)
        registers, spills = _resources(kernel)
        ptx = kernel.asm.get("ptx", "")
        moved, minimum = _bytes_per_row(case, launch)
        found.append(
            Compiled(
                case=case,
                kernel=launch.kernel.__name__.strip("_").removesuffix("_kernel"),
                block_t=launch.constants.get("BLOCK_T") or launch.constants["BLOCK_P"],
                num_warps=launch.num_warps,
                registers=registers,
                shared=kernel.metadata.shared,
                spills=spills,
                wide_loads=wide_share(ptx, "ld"),
                wide_stores=wide_share(ptx, "st"),
                bytes_per_row=moved,
                minimum=minimum,
            )
        )
    return found


def matrix(selected: list[Case] | None = None, processes: int | None = None) -> list[Compiled]:
    """Compile the cases (all by default) in parallel; equal kernels are compiled once, through Triton's cache."""
    selected = cases() if selected is None else selected
    processes = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_case, selected, chunksize=4) for row in rows]


def page(rows: list[Compiled]) -> str:
    """The table as a Markdown page."""
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: list[Compiled]) -> Iterator[str]:
    names = list(TARGETS)
    yield "# Compile matrix"
    yield ""
    yield "Written by `python -m agrepa_fast.kernels.compile_matrix docs/ops/compile-matrix.md`; nothing here was run."
    yield f"Triton {triton.__version__}. Registers are per thread; a trailing `+n` are n spills. 16-byte: share of the"
    yield "bytes loaded / stored by 16-byte instructions in the sm90 PTX. Bytes: moved per row of the stream, with each"
    yield f"tensor counted once, and the share of it that the operation cannot do without ({SEQUENCES} sequences of"
    yield f"{FRAMES} frames; velocity_delta: {STREAMS} streams)."
    yield ""
    yield (
        "| op | kernel | width | dtype | tile x warps | " + " | ".join(names) + " | shared | 16-byte | bytes | needed |"
    )
    yield "|---|---|--:|---|---|" + "--:|" * len(names) + "--:|--:|--:|--:|"
    by_target: dict[tuple[str, str, int, str], dict[str, Compiled]] = {}
    for row in rows:
        by_target.setdefault((row.case.op, row.kernel, row.case.width, row.case.dtype), {})[row.case.target] = row
    for (op, kernel, width, dtype), found in sorted(by_target.items()):
        row = found["sm90"]
        registers = [f"{r.registers}" + (f"+{r.spills}" if r.spills else "") for r in (found[n] for n in names)]
        yield (
            f"| {op} | {kernel} | {width} | {dtype} | {row.block_t} x {row.num_warps} | {' | '.join(registers)} | "
            f"{row.shared} | {row.wide_loads:.0%} / {row.wide_stores:.0%} | {row.bytes_per_row:.0f} | "
            f"{row.minimum / row.bytes_per_row:.1%} |"
        )


if __name__ == "__main__":
    text = page(matrix())
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
