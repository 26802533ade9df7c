"""Compile every kernel for every architecture without a GPU, and read the machine code.

`python -m agrepa_fast.kernels.compile_matrix [page.md]` prints the table of registers, shared memory, spills, share
of 16-byte memory instructions and bytes moved, and writes it to the page.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from . import cosine, pooling, residual, residual_backward, residual_sums
from .launch import MULTIPROCESSORS, WIDTHS, Launch, record, table_entry
from .machine_code import TARGETS, Source, compile_launch, parameters, resources, tensors, traffic

# Dtypes of stream and modulation, or of prediction and target.
DTYPES = {
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16+int8": (torch.bfloat16, torch.int8),
}
TWO = ("bf16+fp32", "fp32")  # dtypes of the cases outside the whole matrix
# Widest row whose kernels must not spill. Wider rows are compiled to show where spills begin.
SPILL_FREE, BEYOND = 4096, (6144, 8192)
# These are no powers of two. Their rows are multiples of 16 bytes, except 1500 in half precision.
ODD_WIDTHS = (72, 384, 760, 1152, 1500)
SUM_WIDTHS = (1024, 1500)  # the sum of partial rows has one tile; it is compiled for 16- and for 8-byte rows
SEQUENCES, FRAMES, STREAMS = 8, 2048, 13
RESIDUAL = ("gated_residual_norm", "layer_norm_modulate", "gated_residual")
_WITHOUT = {"layer_norm_modulate": ("gate",), "gated_residual": ("shift", "scale")}
# Variants of gated_residual_norm. With join, as many sequences join as there are in x.
JOIN, AFFINE, PER_TOKEN, PER_TOKEN_AFFINE = (
    f"gated_residual_norm + {variant}" for variant in ("join", "affine", "per token", "per token, affine")
)
_FAMILY = {"projection_cosine_loss": "cosine_rows", "cosine_loss": "cosine_rows"}


@dataclass(frozen=True)
class Case:
    """The kernels of one op in one direction, at one width, dtype and norm ("" where there is none)."""

    op: str
    direction: str  # "forward" or "backward"
    width: int
    dtype: str
    norm: str = ""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel."""

    case: Case
    target: str
    kernel: str
    block_t: int
    num_warps: int
    registers: int
    shared: int  # bytes
    spills: int  # bytes of local memory (NVIDIA), spilled registers (AMD)
    wide_loads: float  # share of the stream's bytes loaded by 16-byte instructions (NVIDIA; else nan)
    wide_stores: float
    passes: float  # how often an element of a tile is read or written; the maximum over the tensors of the stream
    bytes_per_row: float  # bytes moved for each row of the stream
    minimum: float  # the part of them that the operation needs


def _table(target: str) -> str:
    return target if target in MULTIPROCESSORS else "portable"


def _widths(kernel: str) -> list[int]:
    """Widths up to SPILL_FREE that cover every tile of the tables: the widest of those that share a tile."""
    tiles: dict[tuple[Any, ...], int] = {}
    for name in {_table(target) for target in TARGETS}:
        for width in sorted({min(width, SPILL_FREE) for width in WIDTHS[kernel]}):
            config = table_entry(name, kernel, width)
            tiles[name, config.block_t, config.num_warps, triton.next_power_of_2(width)] = width
    return sorted(set(tiles.values()))


@functools.cache
def cases() -> list[Case]:
    """Every kernel, dtype, norm and launch configuration.

    `gated_residual_norm` uses the whole residual kernels and is compiled in all dtypes. The two ops that use a part of
    them, modulation per token, weight and bias of the norm, odd widths and the halves of the cosine kernel are compiled
    in two dtypes, widths that may spill in one. `join` is compiled at one width."""
    every = []
    for direction in ("forward", "backward"):
        widths = _widths(f"residual_{direction}")
        for dtype in ("bf16+fp32", "fp32", "bf16", "fp16"):
            every += [Case(RESIDUAL[0], direction, width, dtype, norm) for norm in ("layer", "rms") for width in widths]
            chosen = widths if dtype in TWO else [1024]
            every += [Case(RESIDUAL[1], direction, width, dtype, "layer") for width in chosen]
            every += [Case(RESIDUAL[1], direction, 1024, dtype, "rms")]
            every += [Case(RESIDUAL[2], direction, width, dtype) for width in chosen]
        for dtype in TWO:
            every += [Case(RESIDUAL[0], direction, width, dtype, "layer") for width in ODD_WIDTHS]
        every += [Case(RESIDUAL[0], direction, width, "bf16+fp32", "layer") for width in BEYOND]
        for op in ("masked_mean", "velocity_delta"):
            for dtype in ("fp32", "bf16", "fp16"):
                every += [Case(op, direction, width, dtype) for width in _widths(op)]
        every += [Case("velocity_delta", direction, 100, dtype) for dtype in ("fp32", "bf16")]
        for dtype in TWO:
            every += [Case("cosine_loss", direction, width, dtype) for width in _widths("cosine_rows")]
        for variant, dtype in itertools.product((AFFINE, PER_TOKEN, PER_TOKEN_AFFINE), TWO):
            chosen = [1024, SPILL_FREE] if variant == AFFINE else widths
            every += [Case(variant, direction, width, dtype, "layer") for width in chosen]
            every += [Case(variant, direction, 1024, dtype, "rms")]
    every += [Case(JOIN, "forward", 1024, dtype, "layer") for dtype in ("bf16+fp32", "fp32", "bf16", "fp16")]
    for dtype in DTYPES:
        every += [Case("projection_cosine_loss", "forward", width, dtype) for width in _widths("cosine_rows")]
    every += [Case("projection_cosine_loss", "forward", 1152, dtype) for dtype in TWO]
    return list(dict.fromkeys(every))


def launches(case: Case, target: str) -> list[Launch]:
    """The launches of a case, recorded on meta tensors with the table of a target."""
    stream, other = DTYPES[case.dtype]
    forward, norm = case.direction == "forward", case.norm or "layer"

    def empty(*shape: int, dtype: torch.dtype = stream) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(SEQUENCES, FRAMES, case.width)
    rows = empty(SEQUENCES, FRAMES, dtype=torch.float32)
    samples = empty(SEQUENCES, dtype=torch.float32)
    with record(_table(target)) as recording:
        if case.op == "masked_mean":
            mask = empty(SEQUENCES, FRAMES, dtype=torch.bool)
            if forward:
                pooling.masked_mean(x, mask)
            else:
                pooling.masked_mean_backward(empty(SEQUENCES, case.width), mask, samples, FRAMES)
        elif case.op == "velocity_delta":
            velocity = empty(STREAMS, SEQUENCES, FRAMES, case.width)
            mask = empty(SEQUENCES, FRAMES, dtype=torch.bool)
            if forward:
                pooling.velocity_delta(velocity, mask)
            else:
                change = empty(STREAMS - 1, SEQUENCES, dtype=torch.float32)
                pooling.velocity_delta_backward(change, samples, velocity, mask, samples)
        elif case.op in _FAMILY:
            y, weight = x.flatten(0, 1), rows.flatten()
            z = empty(*y.shape, dtype=other)
            target_scale = weight if other == torch.int8 else None
            # The kernel of the projection overwrites the prediction by its gradient, in the same pass as the loss.
            loss = weight if forward else None
            grad = y if case.op == "projection_cosine_loss" or not forward else None
            cosine.cosine_rows(y, z, target_scale, weight, 1e-8, False, loss, grad)
        else:
            op, _, variant = case.op.partition(" + ")
            shape = (SEQUENCES, FRAMES, 3 * case.width) if "per token" in variant else (SEQUENCES, 3 * case.width)
            modulation = empty(*shape, dtype=other).chunk(3, dim=-1)
            gate, shift, scale = (
                None if name in _WITHOUT.get(op, ()) else each
                for name, each in zip(("gate", "shift", "scale"), modulation)
            )
            weight, bias = empty(2, case.width, dtype=other) if "affine" in variant else (None, None)
            branch = None if gate is None else x
            join = x if variant == "join" else None
            sequences = SEQUENCES if join is None else 2 * SEQUENCES
            s = None if gate is None else empty(sequences, dtype=other)
            index = None if "per token" in variant else empty(sequences, dtype=torch.int64)
            if forward:
                residual.forward(x, branch, gate, shift, scale, weight, bias, s, index, join, 1e-6, norm)
            else:
                mean, rstd = (None, None) if scale is None else (empty(0) if norm == "rms" else rows, rows)
                normed = grad_h = None if scale is None else x
                residual_backward.backward(
                    grad_h, branch, normed, branch, gate, scale, weight, bias, s, index, mean, rstd, norm
                )
    return recording.launches


def _row_traffic(launch: Launch, width: int, ptx: str) -> tuple[float, float, float]:
    """Shares of the stream's loads and stores by 16-byte instructions, and the most passes over a tile."""
    stream = {name: value for name, value in tensors(launch).items() if value.numel() >= SEQUENCES * FRAMES * width}
    moved = {key: sizes for key, sizes in traffic(ptx, parameters(launch)).items() if key[0] in stream}
    shares = []
    for kind in ("ld", "st"):
        sizes = [size for (_, k), each in moved.items() if k == kind for size in each]
        shares.append(sum(size for size in sizes if size >= 16) / sum(sizes) if sizes else float("nan"))
    constants = launch.constants
    columns = constants.get("BLOCK_D", 0)
    tile = constants.get("BLOCK_T", 0) * columns
    threads = 32 * launch.num_warps
    passes = [sum(sizes) * threads / (tile * stream[name].element_size()) for (name, _), sizes in moved.items()]
    return shares[0], shares[1], max(passes, default=float("nan"))


def _bytes_per_row(case: Case, launch: Launch) -> tuple[float, float]:
    """Bytes per row of the stream: (of all tensors, each counted once; of the tensors of the stream alone)."""
    rows = SEQUENCES * FRAMES
    sizes = [(value.numel(), value.numel() * value.element_size() / rows) for value in tensors(launch).values()]
    whole = [size for count, size in sizes if count >= rows * case.width]
    return sum(size for _, size in sizes), sum(whole)


def _name(case: Case, launch: Launch) -> str:
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return case.direction if name == "cosine" else name


def compile_case(case: Case, targets: Sequence[str] = tuple(TARGETS)) -> list[Compiled]:
    """Compile the kernels of a case for the targets and read them."""
    found = []
    for target in targets:
        names: set[str] = set()
        for launch in launches(case, target):
            if launch.kernel is residual_sums._sum_kernel and (case.width not in SUM_WIDTHS or case.norm == "rms"):
                continue
            # The sums of weight and bias are a second launch of the same kernel.
            name = _name(case, launch)
            name = f"{name}, affine" if name in names else name
            names.add(name)
            kernel = compile_launch(launch, target)
            registers, spills = resources(kernel)
            ptx = kernel.asm.get("ptx")
            wide_loads, wide_stores, passes = _row_traffic(launch, case.width, ptx) if ptx else (float("nan"),) * 3
            moved, minimum = _bytes_per_row(case, launch)
            found.append(
                Compiled(
                    case=case,
                    target=target,
                    kernel=name,
                    block_t=launch.constants.get("BLOCK_T") or launch.constants["BLOCK_P"],
                    num_warps=launch.num_warps,
                    registers=registers,
                    shared=kernel.metadata.shared,
                    spills=spills,
                    wide_loads=wide_loads,
                    wide_stores=wide_stores,
                    passes=passes,
                    bytes_per_row=moved,
                    minimum=minimum,
                )
            )
    Source.texts.clear()
    return found


def matrix(
    selected: Sequence[Case] | None = None, targets: Sequence[str] = tuple(TARGETS), processes: int | None = None
) -> list[Compiled]:
    """Compile cases (by default all) in parallel. Triton's cache compiles equal kernels once."""
    selected = cases() if selected is None else selected
    compile_one = functools.partial(compile_case, targets=tuple(targets))
    with ProcessPoolExecutor(
        processes or os.cpu_count() or 1, mp_context=get_context("spawn"), initializer=gc.disable
    ) as pool:
        return [row for rows in pool.map(compile_one, selected) for row in rows]


def page(rows: list[Compiled]) -> str:
    """The table as a Markdown page."""
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: list[Compiled]) -> Iterator[str]:
    names = list(TARGETS)
    yield "# Compile matrix"
    yield ""
    yield "Written by `python -m agrepa_fast.kernels.compile_matrix docs/ops/compile-matrix.md`; nothing here was run."
    yield f"Triton {triton.__version__}. `gated_residual_norm` is the residual kernels whole: in every dtype and norm,"
    yield f"at the widest row of each tile in the launch tables up to {SPILL_FREE}. The two ops that leave a part of it"
    yield "out, its variants with modulation per token and with the norm's weight and bias (affine), odd widths and the"
    yield "halves of the cosine kernel are compiled in two dtypes, widths beyond in one. With `join`, which brings as"
    yield "many sequences as there are, the forward kernel is compiled at one width."
    yield ""
    yield "Dtype: stream + modulation, or prediction + target. Registers are per thread; a trailing `+n` are n spills."
    yield "16-byte: share of the stream's bytes that 16-byte instructions load / store in the sm90 PTX; none where the"
    yield "bytes of a row are no multiple of 16. Bytes: moved per row of the stream, with each tensor counted once, and"
    yield f"the share that the operation cannot do without ({SEQUENCES} sequences of {FRAMES} frames; velocity_delta:"
    yield f"{STREAMS} streams)."
    yield ""
    yield (
        "| op | kernel | width | norm | dtype | tile x warps | "
        + " | ".join(names)
        + " | shared | 16-byte | bytes | needed |"
    )
    yield "|---|---|--:|---|---|---|" + "--:|" * len(names) + "--:|--:|--:|--:|"
    by_target: dict[tuple[str, str, int, str, str], dict[str, Compiled]] = {}
    for row in rows:
        case = row.case
        by_target.setdefault((case.op, row.kernel, case.width, case.norm, case.dtype), {})[row.target] = row
    for (op, kernel, width, norm, dtype), found in sorted(by_target.items()):
        row = found["sm90"]
        registers = [f"{r.registers}" + (f"+{r.spills}" if r.spills else "") for r in (found[n] for n in names)]
        yield (
            f"| {op} | {kernel} | {width} | {norm or '-'} | {dtype} | {row.block_t} x {row.num_warps} | "
            f"{' | '.join(registers)} | {row.shared} | {_share(row.wide_loads)} / {_share(row.wide_stores)} | "
            f"{row.bytes_per_row:.0f} | {row.minimum / row.bytes_per_row:.1%} |"
        )


def _share(value: float) -> str:
    return "-" if value != value else f"{value:.0%}"


if __name__ == "__main__":
    text = page(matrix())
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
