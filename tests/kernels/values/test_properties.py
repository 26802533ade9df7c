"""Random shapes, strides and dtypes through the ops, against float64.

They are in a file of their own, because a machine with a GPU may lack hypothesis.
"""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import ops

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

OPS = ("gated_residual_norm", "layer_norm_modulate", "gated_residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],  # shrinking takes minutes in the interpreter; the seed is fixed anyway
    "suppress_health_check": [HealthCheck.function_scoped_fixture],  # the poison holds for all examples
}


@settings(max_examples=12, **OPTIONS)
@given(data=st.data())
def test_the_residual_stream_of_any_shape(bench, device, data) -> None:
    sequences, dtype = data.draw(st.integers(1, 3), "sequences"), data.draw(st.sampled_from(DTYPES), "dtype")
    case = bench.make_case(
        device,
        data.draw(st.integers(2, 70), "width"),
        sequences=sequences,
        frames=data.draw(st.integers(1, 4), "frames"),
        samples=data.draw(st.none() | st.integers(1, 3), "samples"),
        active=data.draw(st.integers(0, sequences), "active"),
        streams=data.draw(st.booleans(), "streams"),
        dtype=dtype,
        modulation=data.draw(st.sampled_from([None, torch.float32]), "modulation") if dtype.itemsize == 2 else None,
        norm=data.draw(st.sampled_from(["layer", "rms"]), "norm"),
        per_token=data.draw(st.sampled_from(["", *bench.PER_TOKEN]), "per token"),
        affine=data.draw(st.booleans(), "affine"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    strides = data.draw(st.sampled_from(["rows", "every second", "expanded", "as it is"]), "strides")
    if strides == "rows":
        case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    elif strides == "every second":
        case.branch = case.branch.repeat_interleave(2, dim=2)[:, :, ::2]
    elif strides == "expanded":
        case.branch = case.branch[:, :1].expand_as(case.branch)
    bench.check(case, data.draw(st.sampled_from(OPS), "op"))


@settings(max_examples=10, **OPTIONS)
@given(data=st.data())
def test_pooling_of_any_shape(bench, device, data) -> None:
    batch, frames = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 40), "frames")
    width, streams = data.draw(st.integers(1, 70), "width"), data.draw(st.integers(1, 4), "streams")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    v = torch.randn(streams, batch, frames, width, generator=generator, dtype=torch.float64).to(device, dtype)
    mask = None
    if data.draw(st.booleans(), "masked"):
        mask = torch.rand(batch, frames, generator=generator).to(device) < 0.6
    bench.check_pooling(ops.masked_mean, v[0].clone(), mask)
    if streams > 1:
        bench.check_pooling(ops.velocity_delta, v, mask)
