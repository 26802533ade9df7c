"""Every kernel compiles for every architecture, without spills, with 16-byte loads and stores; no GPU needed.

Compiled here: the largest kernels (`gated_residual_norm`) at every launch configuration up to 4096, and each other
kernel and dtype at some. The page in docs/ops holds the whole matrix and must agree with what is compiled here.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import triton

from agrepa_fast.kernels import compile_matrix, residual
from agrepa_fast.kernels.compile_matrix import TARGETS, Case, Compiled

PAGE = Path(__file__).parents[2] / "docs" / "ops" / "compile-matrix.md"
NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda"]


def chosen(case: Case) -> bool:
    if case.op == "gated_residual_norm":
        return case.width <= 4096 and (case.dtype in ("bf16+fp32", "fp32") or case.target == "sm90")
    if case.op == "velocity_delta":
        return case.width in (128, 1024) and case.dtype == "bf16"
    if case.op == "masked_mean":
        return case.dtype == "bf16"
    return case.width in (384, 1024) and case.dtype == "bf16+fp32"


@pytest.fixture(scope="module")
def rows() -> list[Compiled]:
    found = compile_matrix.matrix(
        [case for case in compile_matrix.cases() if chosen(case)], processes=min(2, os.cpu_count() or 1)
    )
    assert {row.case.target for row in found} == set(TARGETS)
    return found


def test_no_spills(rows) -> None:
    spilling = [row for row in rows if row.spills and row.case.target in NVIDIA]
    assert not spilling, spilling
    # The figure is read, not assumed: every kernel uses registers, the backward kernels more than the forward.
    assert all(row.registers >= 16 for row in rows)


def test_a_spill_would_be_seen() -> None:
    """The same kernel with an eighth of the warps has eight times the values per thread, and must spill."""
    launch = compile_matrix.launches(Case("gated_residual_norm", 4096, "fp32", "sm90"))[1]
    assert launch.kernel is residual._backward_kernel
    launch.num_warps = 2
    registers, spills = compile_matrix._resources(compile_matrix.compile_launch(launch, "sm90"))
    assert registers == 255
    assert spills > 0


def test_rows_move_in_16_byte_instructions(rows) -> None:
    """In the row loop of the sm90 build; the rest are mean and rstd, one number a row, and the tail of odd widths."""
    for row in rows:
        if row.case.target != "sm90" or row.kernel not in ("forward", "backward"):
            continue
        whole = row.case.width & (row.case.width - 1) == 0
        least = 0.79 if whole else 0.49
        assert row.wide_loads >= least, row
        assert row.wide_stores >= least, row


def test_the_share_of_16_byte_instructions_is_read_from_the_loop() -> None:
    ptx = """
    ld.global.b32 {%r1}, [%rd1];
$L__BB0_1:
    @%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];
    @%p1 ld.global.L1::evict_last.v2.b32 {%r1, %r2}, [%rd2];
    st.global.v4.b32 [%rd3], {%r1, %r2, %r3, %r4};
    @%p2 bra $L__BB0_1;
    st.global.b16 [%rd3], {%rs1};
"""
    assert compile_matrix.wide_share(ptx, "ld") == pytest.approx(16 / 24)
    assert compile_matrix.wide_share(ptx, "st") == 1
    assert math.isnan(compile_matrix.wide_share("ret;", "ld"))


@pytest.mark.parametrize(
    "op, forward, backward", [("gated_residual_norm", 4, 6), ("layer_norm_modulate", 2, 3), ("gated_residual", 3, 3)]
)
def test_bytes_moved_are_those_of_the_formula(op, forward, backward) -> None:
    """Of kernels/residual.py: 4, 2 and 3 D b forward; 6, 3 and 3 backward; 8 bytes of statistics."""
    case = Case(op, 1024, "bf16", "sm90")
    for launch, count in zip(compile_matrix.launches(case), (forward, backward)):
        moved, minimum = compile_matrix._bytes_per_row(case, launch)
        assert minimum == count * 1024 * 2
        assert minimum <= moved <= 1.1 * minimum


def page_rows() -> dict[tuple[str, str, int, str], list[str]]:
    table = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {(op, kernel, int(width), dtype): cells for op, kernel, width, dtype, *cells in table[1:]}


def test_the_page_holds_the_whole_matrix_and_agrees(rows) -> None:
    page = page_rows()
    cases = {(case.op, case.width, case.dtype) for case in compile_matrix.cases()}
    assert {(op, width, dtype) for op, _, width, dtype in page} == cases, "run the command at the top of the page"
    names = list(TARGETS)
    for (op, kernel, width, dtype), cells in page.items():
        for name, registers in zip(names, cells[1:]):
            assert "+" not in registers or width > 4096 or name not in NVIDIA, (op, kernel, width, dtype, name)
    same_compiler = f"Triton {triton.__version__}." in PAGE.read_text()
    for row in rows:
        cells = page[row.case.op, row.kernel, row.case.width, row.case.dtype]
        assert cells[0] == f"{row.block_t} x {row.num_warps}", "the tables have changed: write the page again"
        if same_compiler:
            assert cells[1 + names.index(row.case.target)].split("+")[0] == str(row.registers), row
