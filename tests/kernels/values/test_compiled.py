"""The ops under PyTorch's compiler and checker: the same kernels, reached through the registered op."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import ops
from agrepa_fast.ops import pooling, residual


def arguments(bench, device, op):
    case = bench.make_case(device, 12, frames=3)
    for name in bench.used(case, op):
        getattr(case, name).requires_grad_()
    return case


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck_gated_residual_norm(bench, device, rms, streams) -> None:
    c = arguments(bench, device, "gated_residual_norm")
    s, index = (c.stream_scale, c.sample_index) if streams else (None, c.sample_index.int())
    torch.library.opcheck(
        residual.GATED_RESIDUAL_NORM.registered, (c.x, c.branch, c.gate, c.shift, c.scale, s, index, 1e-6, rms)
    )


def test_opcheck_the_other_ops(bench, device) -> None:
    c = arguments(bench, device, "gated_residual_norm")
    torch.library.opcheck(residual.LAYER_NORM_MODULATE.registered, (c.x, c.shift, c.scale, c.sample_index, 1e-6, False))
    torch.library.opcheck(residual.GATED_RESIDUAL.registered, (c.x, c.branch, c.gate, c.stream_scale, c.sample_index))
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
    norm = (x, c.branch, c.gate, c.shift, c.scale, c.stream_scale, c.sample_index)
    for rms in (False, True):
        torch.library.opcheck(residual.GATED_RESIDUAL_NORM.registered, (*norm, 1e-6, rms, join))
    torch.library.opcheck(
        residual.GATED_RESIDUAL.registered, (x, c.branch, c.gate, c.stream_scale, c.sample_index, join)
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
    grad, (x_new, _, mean, rstd) = (
        torch.randn_like(c.x),
        residual.GATED_RESIDUAL_NORM.run(
            c.x, c.branch, c.gate, c.shift, c.scale, c.stream_scale, c.sample_index, 1e-6, False
        ),
    )
    tests = ("test_schema", "test_faketensor")
    for op, args in (
        (
            residual.GATED_RESIDUAL_NORM_BACKWARD,
            (grad, grad, x_new, c.branch, c.gate, c.scale, c.stream_scale, c.sample_index, mean, rstd, False),
        ),
        (residual.LAYER_NORM_MODULATE_BACKWARD, (grad, x_new, c.scale, c.sample_index, mean, rstd, False)),
        (residual.GATED_RESIDUAL_BACKWARD, (grad, c.branch, c.gate, c.stream_scale, c.sample_index)),
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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(bench, device, backend) -> None:
    c = arguments(bench, device, "gated_residual_norm")
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
