"""Modulation per token and a norm with weight and bias: the residual kernels against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from agrepa_fast.kernels import residual as kernels

OPS = ("gated_residual_norm", "layer_norm_modulate", "gated_residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Which modulation has a row for each token; the same as in conftest.py, which a test file cannot import.
PER_TOKEN = ("gate, shift, scale", "gate", "shift, scale", "shift", "scale, gate")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("per_token", PER_TOKEN)
def test_gated_residual_norm_per_token(bench, device, per_token, affine) -> None:
    """Each modulation with a row per sample or per token; sequences that share a sample, and that do not."""
    for samples in (2, None):
        case = bench.make_case(device, per_token=per_token, affine=affine, samples=samples)
        bench.check(case, "gated_residual_norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_per_token_and_affine(bench, device, op, dtype) -> None:
    case = bench.make_case(device, per_token=PER_TOKEN[0], affine=True, dtype=dtype, active=2, norm="rms")
    bench.check(case, op)


@pytest.mark.parametrize("op", OPS)
def test_per_token_in_many_tiles(bench, device, op, small_launches) -> None:
    case = bench.make_case(device, 190, frames=11, per_token=PER_TOKEN[0], affine=True, streams=op == OPS[0])
    bench.check(case, op)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("per_token", ["", PER_TOKEN[0]])
def test_only_one_of_weight_and_bias(bench, device, name, per_token, small_launches) -> None:
    case = bench.make_case(device, frames=11, per_token=per_token, affine=True)
    bench.check(dataclasses.replace(case, **{name: None}), OPS[0])
    bench.check(dataclasses.replace(case, **{name: None}), OPS[1])


def test_modulation_that_is_a_view_is_not_copied(bench, device, monkeypatch) -> None:
    """Chunks of one tensor, one row for all tokens or samples (strides of 0): the kernel reads them where they are."""
    read = []
    launch_kernel = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *a, **options: read.append(a[3]) or launch_kernel(*a, **options))
    case = bench.make_case(device, per_token=PER_TOKEN[0], affine=True, samples=None)
    case.gate = case.gate[:, :1].expand_as(case.gate)
    case.shift = case.shift[:1].expand_as(case.shift)
    case.weight = case.weight[:1].expand_as(case.weight)
    bench.check(case, OPS[0])
    for name in ("gate", "shift", "scale"):
        assert getattr(read[0], name).data_ptr() == getattr(case, name).data_ptr(), name
    # One row for each sample beside a row for each token: expanded as a view.
    case = bench.make_case(device, per_token="scale", samples=None)
    read.clear()
    bench.fused(case, OPS[1])
    assert read[0].shift.data_ptr() == case.shift.data_ptr()
    assert read[0].shift.stride(1) == 0
