"""The cosine kernel compiles for every architecture without spills; no GPU needed, and nothing is run."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.kernels import compile_matrix, cosine
from agrepa_fast.kernels.compile_matrix import TARGETS
from agrepa_fast.kernels.launch import record
from agrepa_fast.kernels.tables import TABLES

CASES = [(target, width, torch.bfloat16, torch.float32) for target in TARGETS for width in (128, 2048)]
CASES += [("sm90", width, torch.float32, torch.float32) for width in (4096, 8192)]
CASES += [("sm90", 768, torch.float16, torch.int8)]


@pytest.mark.parametrize("target, width, dtype, target_dtype", CASES)
def test_no_spills(target, width, dtype, target_dtype) -> None:
    """Loss and gradient in one pass, which holds the most registers."""
    y, z = (torch.empty(64, width, dtype=each, device="meta") for each in (dtype, target_dtype))
    row = torch.empty(64, device="meta")
    scale = row if target_dtype == torch.int8 else None
    with record(target if target in TABLES else "portable") as recording:
        cosine.cosine_rows(y, z, scale, row, 1e-8, False, row, y)
    [launch] = recording.launches
    registers, spills = compile_matrix._resources(compile_matrix.compile_launch(launch, target))
    assert spills == 0
    assert registers >= 16  # it was read, not assumed


def test_every_width_up_to_the_kernels_limit_has_a_configuration() -> None:
    assert [cosine.configuration(width).block_t for width in (1, 128, 129, 1152, 8192)] == [16, 16, 8, 1, 1]
    with pytest.raises(ValueError, match="width 8193 is more than"):
        cosine.configuration(8193)
