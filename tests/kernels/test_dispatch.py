"""Which path an op takes: AGREPA_OPS, the device, a missing Triton; and what the user is told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from agrepa_fast import ops
from agrepa_fast.errors import UserError
from agrepa_fast.ops import dispatch


@pytest.fixture
def on(monkeypatch):
    """Pretend: a mode, a Triton or none, an interpreter or none."""

    def change(mode="auto", triton=True, interpreted=False):
        monkeypatch.setattr(dispatch, "MODE", mode)
        monkeypatch.setattr(dispatch, "TRITON", triton)
        monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)

    return change


class Row:
    """As much of a tensor as the choice looks at."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, width: int = 64) -> None:
        self.device, self.dtype, self.shape = torch.device(device), dtype, (2, width)


def test_auto(on) -> None:
    on()
    assert dispatch.use_kernels(Row("cuda"))
    assert not dispatch.use_kernels(Row("cpu"))
    assert not dispatch.use_kernels(Row("meta"))
    assert not dispatch.use_kernels(Row("cuda", torch.float8_e4m3fn))
    assert not dispatch.use_kernels(Row("cuda", width=8193))
    on(triton=False)
    assert not dispatch.use_kernels(Row("cuda"))
    on(interpreted=True)
    assert dispatch.use_kernels(Row("cpu"))
    assert not dispatch.use_kernels(Row("meta"))


def test_reference_is_always_the_reference(on) -> None:
    on("reference", interpreted=True)
    assert not dispatch.use_kernels(Row("cuda"))
    assert not dispatch.use_kernels(Row("cpu"))


@pytest.mark.parametrize(
    "row, changes, reason",
    [
        (Row("cpu"), {}, "need CUDA, not cpu"),
        (Row("cuda"), {"triton": False}, "Triton is not installed"),
        (Row("cuda", torch.float8_e4m3fn), {}, "float8_e4m3fn"),
        (Row("cuda", width=9000), {}, "9000"),
    ],
)
def test_triton_runs_the_kernels_or_says_why_not(on, row, changes, reason) -> None:
    on("triton", **changes)
    with pytest.raises(UserError, match=reason):
        dispatch.use_kernels(row)
    on("triton")
    assert dispatch.use_kernels(Row("cuda"))


def test_an_unknown_mode_names_the_known_ones(on) -> None:
    on("tritonn")
    with pytest.raises(UserError, match="auto, triton, reference, got 'tritonn'"):
        ops.masked_mean(torch.randn(1, 2, 3))
    assert "not a mode" in "\n".join(dispatch.explain())


def test_explain_names_every_public_op_once_per_device(on) -> None:
    for mode in dispatch.MODES:
        on(mode)
        text = "\n".join(dispatch.explain())
        assert f"AGREPA_OPS={mode}" in text
        for name in ops.__all__:
            assert text.count(f" {name},") + text.count(f" {name}\n") + text.endswith(f" {name}") >= 1, name
    on()
    assert any(line.startswith("cpu: reference") for line in dispatch.explain())
    on("triton")
    assert any(line.startswith("cpu: an error") for line in dispatch.explain())


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_environment_is_read_and_triton_may_be_missing() -> None:
    """One process: Triton cannot be imported, the package can, and its ops run."""
    code = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
import torch
sys.meta_path.insert(0, Missing())
for name in [n for n in sys.modules if n.split(".")[0] == "triton"]:
    del sys.modules[name]
import agrepa_fast as ag
from agrepa_fast.ops import dispatch
print(dispatch.MODE, dispatch.TRITON, dispatch.INTERPRETED, ag.ops.masked_mean(torch.ones(1, 2, 3)).tolist())
"""
    assert python(code, AGREPA_OPS="reference", TRITON_INTERPRET="1").split("\n")[0] == (
        "reference False True [[1.0, 1.0, 1.0]]"
    )


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"x": torch.randn(2, 3)}, ValueError, "x: expected"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "x: expected a floating"),
        ({"branch": torch.randn(2, 3, 5)}, ValueError, "branch: expected"),
        ({"branch": torch.randn(3, 3, 4)}, ValueError, "at most 2"),
        ({"gate": torch.randn(2, 5)}, ValueError, "gate: expected"),
        ({"gate": torch.ones(2, 4, dtype=torch.int32)}, TypeError, "gate: expected a floating"),
        ({"shift": torch.randn(3, 4)}, ValueError, "shift: expected"),
        ({"scale": torch.randn(4)}, ValueError, "scale: expected"),
        ({"scale": torch.empty(2, 4, device="meta")}, ValueError, "scale: expected on x's device cpu, got meta"),
        ({"branch": torch.empty(2, 3, 4, device="meta")}, ValueError, "branch: expected on x's device"),
        ({"stream_scale": torch.ones(3)}, ValueError, "stream_scale: expected"),
        ({"sample_index": torch.zeros(2)}, ValueError, "sample_index: expected int64"),
        ({"sample_index": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "sample_index: expected on"),
        ({"norm": "batch"}, ValueError, "norm: expected"),
        ({"gate": torch.randn(0, 4)}, ValueError, r"gate: expected \[2, 4\]"),
    ],
)
def test_bad_arguments_are_named(change, error, text) -> None:
    good = {name: torch.randn(2, 4) for name in ("gate", "shift", "scale")}
    good |= {"x": torch.randn(2, 3, 4), "branch": torch.randn(2, 3, 4)}
    with pytest.raises(error, match=text):
        ops.gated_residual_norm(**(good | change))


def test_bad_poolings_are_named() -> None:
    x = torch.randn(2, 3, 4)
    for mask, text in ((torch.ones(2, 3), "mask: expected bool"), (torch.ones(3, 2) > 0, r"\[2, 3\]")):
        with pytest.raises(ValueError, match=text):
            ops.masked_mean(x, mask)
        with pytest.raises(ValueError, match=text):
            ops.velocity_delta(x[None], mask)
    with pytest.raises(ValueError, match="mask: expected on cpu"):
        ops.masked_mean(x, torch.empty(2, 3, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match="floating"):
        ops.masked_mean(torch.ones(2, 3, 4, dtype=torch.int64))
