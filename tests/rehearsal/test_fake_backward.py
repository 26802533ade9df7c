"""The backward of every op on tensors that say they are on a CUDA device; conftest.py says how."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import agrepa_fast.ops as fused

BATCH, FRAMES = 4, 12


def test_the_walk_over_the_graph_gives_autograds_gradients(backward) -> None:
    """On the CPU: broadcasts, an input that is used twice, nodes of several outputs, a function written in Python."""
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    scale, shift = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    scale.requires_grad_()

    def loss() -> Tensor:
        first, second = (x @ w).chunk(2, dim=-1)
        h = fused.layer_norm_modulate(torch.cat([second, first.tanh()], -1), shift, scale)
        return (h * w[0]).square().mean() + x.sum()

    wanted = torch.autograd.grad(loss(), [x, w, scale])
    backward(loss())
    for leaf, gradient in zip((x, w, scale), wanted):
        torch.testing.assert_close(leaf.grad, gradient)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def residual(op: str, per_token: bool, norm: str) -> Tensor:
    x, branch = leaf(BATCH, FRAMES, 16), leaf(BATCH, FRAMES, 16)
    rows = (2, FRAMES, 16) if per_token else (2, 16)
    gate, shift, scale = (leaf(*rows, dtype=torch.float32) for _ in range(3))
    index = torch.tensor([0, 1, 0, 1])
    if op == "gated_residual":
        return fused.gated_residual(x, branch, gate, sample_index=index, stream_scale=leaf(BATCH))
    options = {"weight": leaf(16), "bias": leaf(16), "sample_index": index, "norm": norm}
    if op == "layer_norm_modulate":
        return fused.layer_norm_modulate(x, shift, scale, **options)
    return torch.cat(fused.gated_residual_norm(x, branch, gate, shift, scale, stream_scale=leaf(BATCH), **options))


def pooled() -> Tensor:
    return fused.masked_mean(leaf(BATCH, FRAMES, 16), torch.ones(BATCH, FRAMES, dtype=torch.bool))


def delta() -> Tensor:
    change, energy = fused.velocity_delta(leaf(3, BATCH, FRAMES, 16), torch.ones(BATCH, FRAMES, dtype=torch.bool))
    return torch.cat([change.flatten(), energy])


def cosine(projected: bool, reduction: str, target: torch.dtype) -> Tensor:
    x, mask = leaf(BATCH, FRAMES, 16), torch.ones(BATCH, FRAMES, dtype=torch.bool)
    if target == torch.int8:
        teacher = torch.zeros(BATCH, FRAMES, 8, dtype=target)
        options = {"target_scale": torch.ones(BATCH, FRAMES)}
    else:
        teacher, options = torch.randn(BATCH, FRAMES, 8, dtype=target), {}
    options |= {"mask": mask, "reduction": reduction}
    if projected:
        return fused.projection_cosine_loss(x, leaf(8, 16), leaf(8), teacher, **options)
    return fused.cosine_loss(x[..., :8], teacher, **options)


CALLS = {
    f"{op}, {norm}, {'per token' if per_token else 'per sample'}": functools.partial(residual, op, per_token, norm)
    for op in ("gated_residual_norm", "layer_norm_modulate", "gated_residual")
    for per_token in (False, True)
    for norm in (("layer",) if op == "gated_residual" else ("layer", "rms"))
}
CALLS |= {"masked_mean": pooled, "velocity_delta": delta}
CALLS |= {
    f"{'projection_' if projected else ''}cosine_loss, {reduction}, {target}": functools.partial(
        cosine, projected, reduction, target
    )
    for projected in (False, True)
    for reduction in ("mean", "none")
    for target in (torch.float16, torch.int8)
}


# {part of a call's name: the kernels of its backward}; the first that fits
KERNELS = {
    "projection_cosine_loss, mean": set(),  # its gradients are taken in the forward
    "projection_cosine_loss, none": {"projection_cosine_sum"},
    "cosine_loss": {"cosine_loss_backward"},
    "masked_mean": {"masked_mean_backward"},
    "velocity_delta": {"velocity_delta_backward"},
    "": {"residual_backward"},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_gradients_of_an_op_stay_on_the_device(ops, backward, call) -> None:
    output = CALLS[call]()
    before = set(ops.seen)
    leaves = backward(output)
    assert ops.seen - before == KERNELS[next(name for name in KERNELS if name in call)]
    assert leaves
    for value in leaves:
        assert (value.grad.device.type, value.grad.shape, value.grad.dtype) == ("cuda", value.shape, value.dtype)
