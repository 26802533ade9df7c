"""The ops under PyTorch's compiler and checker: the same kernels, reached through the registered op."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from agrepa_fast import ops
from agrepa_fast.ops import pooling, residual


def arguments(bench, device, op, **how):
    case = bench.make_case(device, 12, frames=3, **how)
    for name in bench.used(case, op):
        getattr(case, name).requires_grad_()
    return case


def inputs(c, s=None, index=None, join=None, norm="layer", op="gated_residual_norm"):
    """Arguments of a registered op of the residual stream."""
    branch, modulation = (c.branch, c.gate), (c.shift, c.scale, c.weight, c.bias)
    if op == "layer_norm_modulate":
        branch = (None, None)
    if op == "gated_residual":
        modulation = (None,) * 4
    return (c.x, *branch, *modulation, s, index, join, 1e-6, norm)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck_gated_residual_norm(bench, device, rms, streams) -> None:
    c = arguments(bench, device, "gated_residual_norm")
    s, index = (c.stream_scale, c.sample_index) if streams else (None, c.sample_index.int())
    torch.library.opcheck(residual.GATED_RESIDUAL_NORM.registered, inputs(c, s, index, norm="rms" if rms else "layer"))


def test_opcheck_the_other_ops(bench, device) -> None:
    c = arguments(bench, device, "gated_residual_norm")
    torch.library.opcheck(
        residual.LAYER_NORM_MODULATE.registered, inputs(c, None, c.sample_index, op="layer_norm_modulate")
    )
    torch.library.opcheck(
        residual.GATED_RESIDUAL.registered, inputs(c, c.stream_scale, c.sample_index, op="gated_residual")
    )
    mask = torch.tensor([[True, True, False], [True, False, False], [True] * 3], device=device)
    torch.library.opcheck(pooling.MASKED_MEAN.registered, (c.x, mask))
    torch.library.opcheck(pooling.MASKED_MEAN.registered, (c.x, None))
    velocity = torch.stack([c.x, c.branch, c.x]).detach().requires_grad_()
    torch.library.opcheck(pooling.VELOCITY_DELTA.registered, (velocity, None))
    torch.library.opcheck(pooling.VELOCITY_DELTA.registered, (velocity, mask))


def test_opcheck_joining_sequences(bench, device) -> None:
    """Forward only, so on tensors without gradients."""
    c = bench.make_case(device, 12, frames=3, sequences=4, active=2)
    x, join = c.x[:2], c.x[2:]
    for norm in ("layer", "rms"):
        values = inputs(dataclasses.replace(c, x=x), c.stream_scale, c.sample_index, join, norm)
        torch.library.opcheck(residual.GATED_RESIDUAL_NORM.registered, values)
    values = inputs(dataclasses.replace(c, x=x), c.stream_scale, c.sample_index, join, op="gated_residual")
    torch.library.opcheck(residual.GATED_RESIDUAL.registered, values)


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck_per_token_and_affine(bench, device, affine) -> None:
    c = bench.make_case(device, 12, frames=3, per_token="gate, shift, scale", affine=affine)
    for name in bench.used(c, "gated_residual_norm"):
        getattr(c, name).requires_grad_()
    torch.library.opcheck(residual.GATED_RESIDUAL_NORM.registered, inputs(c, c.stream_scale, c.sample_index))
    torch.library.opcheck(
        residual.LAYER_NORM_MODULATE.registered, inputs(c, None, c.sample_index, op="layer_norm_modulate")
    )


def test_compiled_equals_eager_where_sequences_join(bench, device) -> None:
    def staircase(x, branch, gate, shift, scale, index):
        before = x[:2] * 0.5
        x, h = ops.gated_residual_norm(x, branch, gate, shift, scale, sample_index=index[:5], join=before)
        return h, ops.gated_residual(x, h.tanh(), gate, sample_index=index, join=x[1:3])

    c = bench.make_case(device, 12, frames=3)
    inputs = (c.x, c.branch, c.gate, c.shift, c.scale, torch.tensor([0, 0, 1, 0, 1, 1, 0], device=device))
    torch._dynamo.reset()
    eager, compiled = staircase(*inputs), torch.compile(staircase, fullgraph=True, backend="aot_eager")(*inputs)
    for one, other, sequences in zip(eager, compiled, (5, 7)):
        assert len(one) == sequences
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_opcheck_gradient_ops(bench, device) -> None:
    """The gradient ops on their own: schema and fake outputs (they have no gradient themselves)."""
    c = bench.make_case(device, 12, frames=3)
    grad = torch.randn_like(c.x)
    x_new, _, mean, rstd = residual.GATED_RESIDUAL_NORM.run(*inputs(c, c.stream_scale, c.sample_index))
    tests = ("test_schema", "test_faketensor")
    branch, streams, statistics = (c.branch, c.gate), (c.stream_scale, c.sample_index), (mean, rstd, "layer")
    backward = residual.RESIDUAL_BACKWARD
    affine = torch.randn(2, 12, device=device).unbind()
    for op, args in (
        (backward, (grad, grad, x_new, *branch, c.scale, None, None, *streams, *statistics)),
        (backward, (grad, grad, x_new, *branch, c.scale, *affine, *streams, *statistics)),
        (backward, (grad, None, x_new, None, None, c.scale, None, None, None, c.sample_index, *statistics)),
        (backward, (None, grad, None, *branch, None, None, None, *streams, None, None, "layer")),
        (pooling.MASKED_MEAN_BACKWARD, (grad[:, 0], None, grad.new_full((3,), 3.0), 3)),
        (
            pooling.VELOCITY_DELTA_BACKWARD,
            (grad[None].repeat(2, 1, 1, 1), None, grad.new_full((3,), 36.0), grad[:1, 0, :3], grad[0, 0, :3]),
        ),
    ):
        torch.library.opcheck(op.registered, args, test_utils=tests)


def chain(x, branch, gate, shift, scale, s, index, mask):
    """Three residual ops and both poolings; the sizes and numbers do not matter, the gradients do."""
    h = ops.layer_norm_modulate(x, shift, scale, sample_index=index)
    x, h = ops.gated_residual_norm(x, branch + h, gate, shift, scale, stream_scale=s, sample_index=index)
    x = ops.gated_residual(x, h.tanh(), gate, sample_index=index)
    change, energy = ops.velocity_delta(torch.stack([x, h, branch]), mask)
    return ops.masked_mean(x, mask), change, energy


@pytest.mark.parametrize("per_token", ["", "gate, shift, scale"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(bench, device, backend, per_token) -> None:
    c = arguments(bench, device, "gated_residual_norm", per_token=per_token)
    mask = torch.tensor([[True, True, False], [True, False, False], [True] * 3], device=device)
    leaves = [c.x, c.branch, c.gate, c.shift, c.scale, c.stream_scale]
    torch._dynamo.reset()

    def run(function):
        outputs = function(*leaves, c.sample_index, mask)
        return [*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)]

    eager, compiled = run(chain), run(torch.compile(chain, fullgraph=True, backend=backend))
    for i, (one, other) in enumerate(zip(eager, compiled)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"value {i}: {m}")


def test_the_compiled_graph_holds_the_ops(bench, device) -> None:
    """Not their decomposition: the compiled path must reach the kernels."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    c = bench.make_case(device, 12, frames=3)
    torch._dynamo.reset()
    mask = torch.ones(3, 3, dtype=torch.bool, device=device)
    torch.compile(chain, fullgraph=True, backend=backend)(
        c.x, c.branch, c.gate, c.shift, c.scale, c.stream_scale, c.sample_index, mask
    )
    wanted = {"layer_norm_modulate", "gated_residual_norm", "gated_residual", "velocity_delta", "masked_mean"}
    assert {f"agrepa_fast.{name}.default" for name in wanted} <= set(seen)


def test_function_transforms_take_the_reference(bench, device, monkeypatch) -> None:
    """torch.func would hand its wrappers to the kernels, which hold no data; AGREPA_OPS=triton says so."""
    c = bench.make_case(device, 12, frames=3)

    def total(x):
        return ops.layer_norm_modulate(x, c.shift, c.scale, sample_index=c.sample_index).square().sum()

    leaf = c.x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(leaf), leaf)
    monkeypatch.setattr(ops.dispatch, "MODE", "auto")
    torch.testing.assert_close(torch.func.grad(total)(c.x), wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(ops.dispatch, "MODE", "triton")
    with pytest.raises(ValueError, match=r"AGREPA_OPS=triton: torch.func cannot transform the kernels"):
        torch.func.grad(total)(c.x)


def test_checkpointing_and_autocast(bench, device) -> None:
    """Recomputed in the backward, with bfloat16 branches from autocast: the same gradients as without."""
    from torch.utils.checkpoint import checkpoint

    c = bench.make_case(device, 16, frames=3, samples=None, streams=False)
    linear = torch.nn.Linear(16, 16, device=device)
    c.x.requires_grad_()

    def block(x):
        h = ops.layer_norm_modulate(x, c.shift, c.scale)
        return ops.gated_residual_norm(x, linear(h), c.gate, c.shift, c.scale)[1]

    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        with torch.autocast(device.type, torch.bfloat16):
            out = run(c.x)
        assert out.dtype == torch.float32
        grads.append(torch.autograd.grad(out.square().sum(), [c.x, linear.weight]))
    for one, other in zip(*grads):
        assert torch.equal(one, other)
