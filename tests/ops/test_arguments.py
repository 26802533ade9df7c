"""What every op says about an argument of the wrong kind, and that every op works on the meta device."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import ops

X, ROWS, WEIGHT = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(8, 8)
CALLS = {
    "gated_residual_norm": {"x": X, "branch": X, "gate": ROWS, "shift": ROWS, "scale": ROWS},
    "layer_norm_modulate": {"x": X, "shift": ROWS, "scale": ROWS},
    "gated_residual": {"x": X, "branch": X, "gate": ROWS},
    "masked_mean": {"x": X},
    "velocity_delta": {"velocity": torch.stack([X, X])},
    "cosine_loss": {"y": X, "target": X},
    "projection_cosine_loss": {"hidden": X, "weight": WEIGHT, "bias": None, "target": X},
}
TENSORS = [(op, name) for op, arguments in CALLS.items() for name, value in arguments.items() if value is not None]
OPTIONAL = [
    *((op, "mask") for op in CALLS if "residual" not in op and "modulate" not in op),
    *((op, name) for op in ("cosine_loss", "projection_cosine_loss") for name in ("sample_weight", "target_scale")),
    *((op, name) for op in ("gated_residual_norm", "gated_residual") for name in ("stream_scale", "sample_index")),
]


@pytest.mark.parametrize(("op", "name"), [*TENSORS, *OPTIONAL, ("projection_cosine_loss", "bias")])
@pytest.mark.parametrize("value", [[1.0, 2.0], 1.0, X.numpy()], ids=["list", "number", "array"])
def test_what_is_no_tensor_is_named(op, name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got {type(value).__name__}$"):
        getattr(ops, op)(**CALLS[op] | {name: value})


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair[1] != "target"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_without_arithmetic_are_named(op, name, dtype):
    with pytest.raises(TypeError, match=f"^{name}: expected a floating dtype of 16 bits or more, got {dtype}$"):
        getattr(ops, op)(**CALLS[op] | {name: CALLS[op][name].to(dtype)})


@pytest.mark.parametrize("op", ["gated_residual_norm", "layer_norm_modulate", "cosine_loss", "projection_cosine_loss"])
def test_eps(op):
    call = getattr(ops, op)
    call(**CALLS[op])  # the signature of a right call is remembered
    for eps in (-1e-6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^eps: expected a number >= 0, got {eps}$"):
            call(**CALLS[op], eps=eps)
    with pytest.raises(TypeError, match=r"^eps: expected a number, got str$"):
        call(**CALLS[op], eps="1e-6")


def test_complex_weights_are_refused():
    with pytest.raises(ValueError, match="sample_weight: expected real"):
        ops.cosine_loss(X, X, sample_weight=torch.ones(2, 3, dtype=torch.complex64))


def test_the_argument_that_differs_from_the_others_is_named():
    with pytest.raises(ValueError, match=r"^gate: expected \[2, 8\]"):
        ops.gated_residual_norm(X, X, ROWS[:1], ROWS, ROWS)


@pytest.mark.parametrize("op", CALLS)
def test_the_meta_device_gives_shapes_and_dtypes(op):
    arguments = {name: None if value is None else value.to("meta") for name, value in CALLS[op].items()}
    if op == "projection_cosine_loss":
        arguments["weight"].requires_grad_()
    results, expected = getattr(ops, op)(**arguments), getattr(ops, op)(**CALLS[op])
    pairs = zip(results, expected) if isinstance(results, tuple) else [(results, expected)]
    for result, value in pairs:
        assert (result.device.type, result.shape, result.dtype) == ("meta", value.shape, value.dtype)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.jagged])
def test_only_dense_tensors_are_taken(op, layout):
    name, first = next(iter(CALLS[op].items()))
    value = first.to_sparse() if layout == torch.sparse_coo else torch.nested.nested_tensor([*first], layout=layout)
    with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got one of layout {layout}$"):
        getattr(ops, op)(**CALLS[op] | {name: value})


@pytest.mark.parametrize("op", CALLS)
def test_lengths_may_be_dynamic_in_a_compiled_call(op):
    compiled = torch.compile(
        lambda arguments: getattr(ops, op)(**arguments), fullgraph=True, backend="eager", dynamic=True
    )
    for frames in (3, 7):
        longer = {  # [2, T, 8] and [streams, 2, T, 8]; rows of modulation and matrices stay
            name: torch.randn(*value.shape[:-2], frames, 8)
            if value is not None and value.shape[-2:] == (3, 8)
            else value
            for name, value in CALLS[op].items()
        }
        torch.testing.assert_close(compiled(longer), getattr(ops, op)(**longer), rtol=0, atol=0)
    torch._dynamo.reset()
