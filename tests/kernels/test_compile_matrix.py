"""Every kernel compiles for every architecture, without spills, with 16-byte loads and stores; no GPU needed.

On a working day the largest kernels (`gated_residual_norm`) are compiled at every launch configuration and the others
at some; in CI the whole matrix. The page in docs/ops holds the whole matrix and must agree with what is compiled here.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from pathlib import Path

import pytest
import torch
import triton

from agrepa_fast.kernels import compile_matrix, machine_code, residual, residual_backward
from agrepa_fast.kernels.compile_matrix import DTYPES, PER_TOKEN, RESIDUAL, SPILL_FREE, TWO, Case, Compiled
from agrepa_fast.kernels.launch import MULTIPROCESSORS, WIDTHS, record, table_entry
from agrepa_fast.kernels.machine_code import TARGETS, Source

PAGE = Path(__file__).parents[2] / "docs" / "ops" / "compile-matrix.md"
NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda"]


def chosen(case: Case) -> bool:
    """All cases in CI; on a working day those that show a mistake soonest."""
    if os.environ.get("CI"):
        return True
    if case.op == "gated_residual_norm":
        return (case.dtype == "bf16+fp32" and case.norm == "layer") or case.width == 1024
    if case.op.startswith(RESIDUAL):
        return case.width in (384, 1024) and case.dtype == "bf16+fp32"
    if case.op == "velocity_delta":
        return case.width in (100, 1024) and case.dtype == "bf16"
    return case.dtype in ("bf16", "bf16+int8") and case.width in (1024, 4096)


@pytest.fixture(scope="module")
def rows() -> list[Compiled]:
    found = compile_matrix.matrix(
        [case for case in compile_matrix.cases() if chosen(case)], processes=min(2, os.cpu_count() or 1)
    )
    assert {row.target for row in found} == set(TARGETS)
    return found


def test_the_matrix_holds_every_kernel_dtype_norm_and_tile_of_the_tables() -> None:
    """Counted here from the tables, for each architecture: tokens, warps and column tiles make a tile."""
    cases = compile_matrix.cases()

    def tile(name, kernel, width):
        config = table_entry(name, kernel, width)
        return config.block_t, config.num_warps, triton.next_power_of_2(width)

    families = [
        ("masked_mean", "masked_mean", ("fp32", "bf16", "fp16"), ("",)),
        ("velocity_delta", "velocity_delta", ("fp32", "bf16", "fp16"), ("",)),
        ("cosine_loss", "cosine_rows", TWO, ("",)),
        ("projection_cosine_loss", "cosine_rows", tuple(DTYPES), ("",)),
    ]
    whole, *ends = RESIDUAL  # the two ends leave a part of the same kernels out
    families.append((whole, "residual_{}", ("bf16+fp32", "fp32", "bf16", "fp16"), ("layer", "rms")))
    families.append((PER_TOKEN, "residual_{}", TWO, ("layer",)))
    families += [(op, "residual_{}", TWO, ("",) if op == "gated_residual" else ("layer",)) for op in ends]
    for (op, family, dtypes, norms), direction in itertools.product(families, ("forward", "backward")):
        if (op, direction) == ("projection_cosine_loss", "backward"):
            continue  # its one kernel writes the gradient in the forward pass
        kernel = family.format(direction)
        for name, dtype, norm in itertools.product(MULTIPROCESSORS, dtypes, norms):
            wanted = {tile(name, kernel, min(width, SPILL_FREE)) for width in WIDTHS[kernel]}
            found = {
                tile(name, kernel, case.width)
                for case in cases
                if (case.op, case.direction, case.dtype, case.norm) == (op, direction, dtype, norm)
            }
            assert wanted <= found, (op, direction, name, dtype, norm)
            assert any(case.op == op and case.width == SPILL_FREE for case in cases)


def test_no_spills(rows) -> None:
    spilling = [row for row in rows if row.spills and row.target in NVIDIA and row.case.width <= SPILL_FREE]
    assert not spilling, spilling
    # The figure is read, not assumed: every kernel uses registers, and beyond the limit some do spill.
    assert all(row.registers >= 16 for row in rows)
    assert any(row.spills for row in rows if row.case.width > SPILL_FREE)


def test_the_forward_leaves_room_for_24_warps_on_a_multiprocessor(rows) -> None:
    """65,536 registers: two blocks of eight warps, as without a limit, do not hide the latency of rows up to 2048."""
    taken = {
        (row.case.width, row.case.dtype): 32 * row.num_warps * row.registers
        for row in rows
        if row.target == "sm90" and row.kernel == "forward" and row.case.op == RESIDUAL[0]
        if 512 < row.case.width <= 2048
    }
    assert {width for width, _ in taken} >= {1024, 2048}
    # Four warps: six blocks; eight warps: three.
    assert all(65536 // registers >= (6 if width <= 1024 else 3) for (width, _), registers in taken.items()), taken


def test_a_spill_would_be_seen() -> None:
    """The same kernel with an eighth of the warps has eight times the values per thread, and must spill."""
    launch = compile_matrix.launches(Case("gated_residual_norm", "backward", 4096, "fp32", "layer"), "sm90")[0]
    assert launch.kernel is residual_backward._backward_kernel
    launch.num_warps, launch.registers = 2, 255
    registers, spills = machine_code.resources(machine_code.compile_launch(launch, "sm90"))
    assert registers == 255
    assert spills > 0


def test_rows_move_in_16_byte_instructions(rows) -> None:
    """All of the stream's bytes in the row loop of the sm90 build, also in odd widths; none where a row's bytes are no
    multiple of 16, so that rows begin between two vectors."""
    seen = set()
    for row in rows:
        if row.target != "sm90" or math.isnan(row.passes):
            continue
        stream, other = (dtype.itemsize for dtype in DTYPES[row.case.dtype])
        whole = row.case.width * min(stream, other if "cosine" in row.case.op else stream) % 16 == 0
        for share in (row.wide_loads, row.wide_stores):
            assert math.isnan(share) or share == whole, row
        seen.add((row.case.width, row.case.direction, whole))
    for width in (72, 384, 760, 1152):
        assert {(width, "forward", True), (width, "backward", True)} <= seen
    assert (1500, "backward", False) in seen


def test_every_tensor_moves_once_per_tile(rows) -> None:
    """The stated bytes are those of the compiled instructions: each tensor of the stream is read or written once for
    each element of a tile (velocity_delta: once for the baseline, once in the loop over the other streams)."""
    seen = set()
    for row in rows:
        if row.target in NVIDIA and not math.isnan(row.passes):
            looped = row.kernel == "delta" or (row.kernel == "delta_backward" and row.passes != 1)
            assert row.passes == (2 if looped else 1), row
            seen.add(row.kernel)
    assert seen >= {"forward", "backward", "mean", "mean_backward", "delta", "delta_backward"}


def test_traffic_is_read_from_the_loop_and_by_tensor() -> None:
    ptx = """
    ld.param.b64 %rd1, [_kernel_param_0];
    ld.param.b64 %rd2, [_kernel_param_1];
    ld.param.b32 %r9, [_kernel_param_2];
    ld.global.b32 {%r1}, [%rd1];
$L__BB0_1:
    add.s64 %rd3, %rd1, %rd9;
    mad.wide.s32 %rd4, %r9, 4, %rd2;
    @%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd3 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b32 {%r1, %r2}, [ %rd5 + 0 ];
    st.global.v4.b32 [ %rd4 + 0 ], {%r1, %r2, %r3, %r4};
    st.global.b32 [ %rd77 + 0 ], {%r1};
    add.s64 %rd5, %rd3, 64;
    @%p2 bra $L__BB0_1;
    st.global.b16 [ %rd4 + 0 ], {%rs1};
"""
    found = machine_code.traffic(ptx, ["x", "out"])
    assert found == {("x", "ld"): [16, 8], ("out", "st"): [16], (machine_code.UNTRACED, "st"): [4]}
    assert machine_code.traffic("ret;", ["x"]) == {}


def test_a_module_read_back_from_its_text_compiles_to_the_same_code(tmp_path) -> None:
    case = Case("layer_norm_modulate", "forward", 128, "bf16+fp32", "layer")

    def instructions(folder) -> list[str]:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(tmp_path / folder)
            [launch] = compile_matrix.launches(case, "sm90")
            text = machine_code.compile_launch(launch, "sm90").asm["ptx"]
        lines = [line.split("//")[0].strip() for line in text.split(".section")[0].splitlines()]
        return [line for line in lines if line and not re.match(r"\.loc|\.file|\$L__tmp", line)]

    Source.texts.clear()
    made = instructions("made")
    [key] = Source.texts
    assert instructions("read back") == made
    assert sum("ld.global" in line for line in made) > 2
    Source.texts[key] = Source.texts[key].replace("1.000000e+00", "2.000000e+00")
    assert instructions("another") != made, "the text was not what was compiled"
    Source.texts.clear()


@pytest.mark.parametrize(
    "op, direction, tensors, per_row",
    [
        ("gated_residual_norm", "forward", 4, 8),
        ("gated_residual_norm", "backward", 6, 8),
        ("gated_residual_norm + join", "forward", 7, 16),  # 4 for a row of x, 3 for one that joins
        ("gated_residual_norm + affine", "forward", 4, 8),
        ("gated_residual_norm + affine", "backward", 6, 8),
        ("gated_residual_norm + per token", "forward", 7, 8),
        ("gated_residual_norm + per token", "backward", 11, 8),  # reads gate and scale, writes three gradients
        ("gated_residual_norm + per token, affine", "backward", 11, 8),
        ("layer_norm_modulate", "forward", 2, 8),
        ("layer_norm_modulate", "backward", 3, 8),
        ("gated_residual", "forward", 3, 0),
        ("gated_residual", "backward", 3, 0),
        ("masked_mean", "forward", 1, 1),
        ("masked_mean", "backward", 1, 1),
        ("velocity_delta", "forward", compile_matrix.STREAMS, 1),
        ("velocity_delta", "backward", 2 * compile_matrix.STREAMS, 1),
        ("cosine_loss", "forward", 2, 8),
        ("cosine_loss", "backward", 3, 4),
        ("projection_cosine_loss", "forward", 3, 8),
    ],
)
def test_bytes_moved_are_those_of_the_formula(op, direction, tensors, per_row) -> None:
    """The counts that the kernel files and docs state, times D b, and the numbers a row has beside: mean and rstd, a
    mask byte, a loss and a weight. What remains is per sample and per program: under a tenth."""
    width = 1024
    launch = compile_matrix.launches(Case(op, direction, width, "bf16", "layer"), "sm90")[0]
    moved, minimum = compile_matrix._bytes_per_row(Case(op, direction, width, "bf16"), launch)
    assert minimum == tensors * width * 2
    assert minimum + per_row <= moved <= 1.1 * (minimum + per_row)


def page_rows() -> dict[tuple[str, str, int, str, str], list[str]]:
    table = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {
        (op, kernel, int(width), "" if norm == "-" else norm, dtype): cells
        for op, kernel, width, norm, dtype, *cells in table[1:]
    }


def test_the_page_holds_the_whole_matrix_and_agrees(rows) -> None:
    page = page_rows()
    cases = {(case.op, case.width, case.norm, case.dtype) for case in compile_matrix.cases()}
    assert {(op, width, norm, dtype) for op, _, width, norm, dtype in page} == cases, "run the command on the page"
    names = list(TARGETS)
    for key, cells in page.items():
        for name, registers in zip(names, cells[1:]):
            assert "+" not in registers or key[2] > SPILL_FREE or name not in NVIDIA, (key, name)
    same_compiler = f"Triton {triton.__version__}." in PAGE.read_text()
    for row in rows:
        cells = page[row.case.op, row.kernel, row.case.width, row.case.norm, row.case.dtype]
        if row.target == "sm90":
            assert cells[0] == f"{row.block_t} x {row.num_warps}", "the tables have changed: write the page again"
        if same_compiler:
            assert cells[1 + names.index(row.target)].split("+")[0] == str(row.registers), row


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_without_statistics_the_forward_compiles_as_well(norm) -> None:
    """An eager call without a gradient launches it so; the matrix holds the forward with statistics."""
    width = 1024
    empty = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    x, m = empty(4, 128, width), empty(4, width)
    inputs = residual.Inputs(x, x, m, m, m)
    with record("sm90") as recording:
        prepared = residual.prepare(inputs, 1e-6, norm)
        assert len(residual.run(prepared, inputs, statistics=False)) == 2
        assert len(residual.run(prepared, inputs, statistics=True)) == 4
    bare, whole = (machine_code.compile_launch(launch, "sm90") for launch in recording.launches)
    registers, spills = machine_code.resources(bare)
    assert spills == 0
    assert registers <= machine_code.resources(whole)[0]
    stores = [kernel.asm["ptx"].count("st.global") for kernel in (bare, whole)]
    assert stores[0] < stores[1]
