"""The helpers of tests/gpu/test_kernels.py at toy size, so that a mistake in them is not found on the device only."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "gpu" / "test_kernels.py"


@pytest.fixture(scope="module")
def file():
    spec = importlib.util.spec_from_file_location("device_tests", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_of_every_op(file, device) -> None:
    """Finite, the same bits twice, other numbers for other inputs, and equal to the reference's."""
    from agrepa_fast.ops import dispatch

    arguments = file.inputs(2, 3, 12, torch.float32, device=device)
    first, second = file.step(*arguments), file.step(*arguments)
    other = file.step(*file.inputs(2, 3, 12, torch.float32, seed=1, device=device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MODE", "reference")
        plain = file.step(*arguments)
    assert len(first) == 1 + len(arguments)
    for one, again, changed, wanted in zip(first, second, other, plain):
        assert torch.equal(one, again)
        assert not torch.equal(one, changed)
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_the_tail_of_a_large_tensor(file, device) -> None:
    file.check_tails(2, 5, 16, torch.float32, device)
