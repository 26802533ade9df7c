"""Differentiating twice gives the reference's value or an error, never a gradient without a graph; torch.func works."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from agrepa_fast import AlignmentLoss, DiT, DiTConfig, InterfaceLoss, LayerSelection, ops
from agrepa_fast.ops import dispatch
from agrepa_fast.ops.library import FusedOp

REFUSED = "no gradient of their gradient: set AGREPA_OPS=reference"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Y, Z, WEIGHT, BIAS = randn(4, 6), randn(4, 5, seed=1), randn(5, 6, seed=2), randn(5, seed=3)
X, ROW = randn(2, 4, 6), randn(2, 6, seed=4)
# Of one argument, which the tests differentiate by.
FUNCTIONS = {
    "cosine_loss": lambda y: ops.cosine_loss(y, Z[:, :1].expand(4, 6)),
    "cosine_loss rows": lambda y: ops.cosine_loss(y, Z[:, :1].expand(4, 6) + Y, reduction="none"),
    "projection_cosine_loss": lambda y: ops.projection_cosine_loss(y, WEIGHT, BIAS, Z),
    "projection_cosine_loss rows": lambda y: ops.projection_cosine_loss(y, WEIGHT, BIAS, Z, reduction="none"),
    "gated_residual_norm": lambda x: ops.gated_residual_norm(x, X, ROW, ROW, ROW)[1],
    "gated_residual_norm per token": lambda x: ops.gated_residual_norm(x, X, X, x, X, weight=X[0, 0], bias=X[0, 1])[1],
    "gated_residual": lambda x: ops.gated_residual(x.square(), x, ROW),
    "layer_norm_modulate": lambda x: ops.layer_norm_modulate(x, ROW, ROW),
    "layer_norm_modulate rms": lambda x: ops.layer_norm_modulate(x, ROW, ROW, norm="rms"),
    "masked_mean": lambda x: ops.masked_mean(x.square()),
    "velocity_delta": lambda x: torch.cat([part.flatten() for part in ops.velocity_delta(x.unflatten(0, (2, 1)))]),
}
COSINES = [name for name in FUNCTIONS if "cosine" in name]


def argument(name: str) -> torch.Tensor:
    return (Y if name in COSINES else X).clone()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_can_be_differentiated_twice(name, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "reference")
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], argument(name).requires_grad_())


@pytest.mark.parametrize("name", COSINES)
@pytest.mark.parametrize("upstream", ["constant", "differentiable"])
def test_the_fused_ops_refuse_a_second_gradient(name, upstream):
    """Also where the upstream gradient is a constant: the graph would then seem complete without this op."""
    y = argument(name).requires_grad_()
    value = FUNCTIONS[name](y)
    value = value.sum() if upstream == "constant" else value.square().sum()
    with pytest.raises(RuntimeError, match=REFUSED):
        grad(value, y, create_graph=True)
    [first] = grad(FUNCTIONS[name](y).sum(), y)
    assert first.any()
    assert not first.requires_grad


def test_every_op_with_a_gradient_refuses_a_second_one():
    """All registered ops alike, on the short path and through the dispatcher, with kernels or without."""
    found = []

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    op = FusedOp(
        "doubled_for_a_test",
        double,
        lambda a: torch.empty_like(a.x),
        save=lambda ctx, a, output: None,
        gradient=lambda ctx, upstream: {"x": upstream * 2},
    )
    for call in (op, op.registered):
        x = randn(3).requires_grad_()
        found.append(grad(call(x).sum(), x)[0])
        with pytest.raises(RuntimeError, match=REFUSED):
            grad(call(x).sum(), x, create_graph=True)
    assert all(value.equal(torch.full((3,), 2.0, dtype=torch.float64)) for value in found)


def test_a_gradient_penalty_through_alignment_is_exact_or_refused(monkeypatch):
    loss = AlignmentLoss(6, {"teacher": 5}, LayerSelection.uniform((0,))).double()
    hidden, targets = randn(3, 4, 6).requires_grad_(), {"teacher": randn(3, 5, seed=1)}

    def penalty(value):
        [slope] = grad(loss({0: value}, targets)[0], value, create_graph=True)
        return slope.square().sum()

    with pytest.raises(RuntimeError, match=REFUSED):
        penalty(hidden)
    monkeypatch.setattr(dispatch, "MODE", "reference")
    assert torch.autograd.gradcheck(penalty, hidden)


def test_a_compiled_op_refuses_a_second_gradient():
    compiled = torch.compile(FUNCTIONS["cosine_loss"], fullgraph=True)
    y = Y.clone().requires_grad_()
    torch.testing.assert_close(grad(compiled(y), y)[0], grad(FUNCTIONS["cosine_loss"](y), y)[0])
    with pytest.raises(RuntimeError, match="double backward"):  # torch.compile's own words
        grad(grad(compiled(y), y, create_graph=True)[0].sum(), y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_no_second_gradient(reentrant):
    function = FUNCTIONS["projection_cosine_loss rows"]
    plain, again = Y.clone().requires_grad_(), Y.clone().requires_grad_()
    function(plain).sum().backward()
    checkpoint(function, again, use_reentrant=reentrant).sum().backward()
    assert again.grad.equal(plain.grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func_takes_the_reference(name):
    function = FUNCTIONS[name]
    x = argument(name)
    slope = torch.func.grad(lambda value: function(value).square().sum())(x)
    wanted = grad(function(leaf := x.clone().requires_grad_()).square().sum(), leaf)[0]
    torch.testing.assert_close(slope, wanted)
    direction = randn(*x.shape, seed=9)
    _, forward = torch.func.jvp(lambda value: function(value).square().sum(), (x,), (direction,))
    torch.testing.assert_close(forward, (wanted * direction).sum())
    many = torch.func.vmap(function)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many, torch.stack([function(x), function(2 * x)]))
    assert torch.func.hessian(lambda value: function(value).square().sum())(x).shape == (*x.shape, *x.shape)


@pytest.mark.parametrize(
    "pool, head, objective", [("mean", "mlp", "cosine"), (None, "repa", "cosine"), (None, "linear", "cka")]
)
def test_alignment_as_a_function_of_its_parameters(pool, head, objective):
    loss = AlignmentLoss(6, {"teacher": 5}, LayerSelection.uniform((0, 1)), pool, head, objective)
    hidden = {layer: randn(3, 4, 6, seed=layer).float() for layer in (0, 1)}
    targets = {"teacher": randn(*((3, 5) if pool else (3, 4, 5)), seed=7).float()}
    of_parameters(loss, lambda module: module(hidden, targets)[0])


def test_bit_c_and_the_network_as_functions_of_their_parameters():
    embedding, targets = randn(3, 4, 6).float(), {"teacher": randn(3, 5).float()}
    of_parameters(InterfaceLoss(6, {"teacher": 5}, {}), lambda module: module(embedding, targets)[0])
    model = DiT(DiTConfig(2, 8, 2, 5, 0, 2, 0.0, 16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t, mask = randn(3, 4, 5).float(), torch.rand(3), torch.ones(3, 4, dtype=torch.bool)
    of_parameters(model, lambda module: module(x, t, None, mask).square().sum())


class Wrapped(torch.nn.Module):
    def __init__(self, module, run):
        super().__init__()
        self.module, self.run = module, run

    def forward(self):
        return self.run(self.module)


def of_parameters(module, run) -> None:
    """torch.func's gradients of all parameters are autograd's."""
    run(module).backward()
    whole = Wrapped(module, run)
    parameters = {name: p.detach() for name, p in whole.named_parameters()}
    slopes = torch.func.grad(lambda p: torch.func.functional_call(whole, p, ()))(parameters)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(slopes[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rows, missing", [([0, -1], -1), ([2, 0], 2), ([-3, 9], -3)])
def test_a_modulation_row_that_does_not_exist(rows, missing, dtype):
    index = torch.tensor(rows, dtype=dtype)
    for call in (
        lambda: ops.layer_norm_modulate(X, ROW, ROW, sample_index=index),
        lambda: ops.gated_residual(X, X, ROW, sample_index=index),
        lambda: ops.gated_residual_norm(X, X, ROW, ROW, ROW, sample_index=index),
    ):
        for _ in range(2):  # the second call's shapes have been checked before
            with pytest.raises(IndexError, match=f"sample_index: no row {missing}, the modulation has rows 0 to 1"):
                call()
    assert ops.gated_residual(X, X, ROW, sample_index=index.clamp(0, 1)).isfinite().all()
