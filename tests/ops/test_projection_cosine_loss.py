"""projection_cosine_loss as an op: chunks, memory, int8 and unit targets, compilation, what it keeps for backward.

hidden [M, D]; weight [W, D]; target [M, W]. Values are compared with the definition in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from agrepa_fast import ops
from agrepa_fast.ops import cosine, projection_cosine
from agrepa_fast.reference import cosine as reference

ROWS, WIDTH, TEACHER = 11, 8, 6
KEPT = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1], dtype=torch.bool)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(dtype=torch.float64, rows=ROWS, width=WIDTH, teacher=TEACHER):
    values = [randn(rows, width), randn(teacher, width, seed=1), randn(teacher, seed=2)]
    return [value.to(dtype).requires_grad_() for value in values], randn(rows, teacher, seed=3).to(dtype)


def definition(hidden, weight, bias, target, row_weight=None, reduction="mean"):
    """In float64 and in one piece, through autograd."""
    y = hidden @ weight.T + (0 if bias is None else bias)
    rows = 1 - (y * target).sum(-1) / ((y.square().sum(-1) + 1e-8) * (target.square().sum(-1) + 1e-8)).sqrt()
    row_weight = torch.ones(len(rows), dtype=rows.dtype) if row_weight is None else row_weight.double()
    total = (rows * row_weight).sum()
    return {"none": rows * row_weight, "sum": total, "mean": total / row_weight.sum().clamp_min(1e-9)}[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows, chunk", [(11, 4), (11, 11), (11, 1), (1, 4), (12, 4), (11, 100)])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_change_nothing(rows, chunk, with_bias, reduction, masked):
    parameters, target = leaves(rows=rows)
    if not with_bias:
        parameters[2] = None
    given = [value for value in parameters if value is not None]
    mask = KEPT[:rows] if masked and rows <= len(KEPT) else None
    expected = definition(*parameters, target, mask, reduction)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    got = ops.projection_cosine_loss(*parameters, target, mask=mask, reduction=reduction, chunk=chunk)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for mine, exact in zip(torch.autograd.grad(got, given, upstream), torch.autograd.grad(expected, given, upstream)):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width, teacher", [(72, 100), (384, 1152), (40, 4096)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_widths_and_dtypes(width, teacher, dtype, bound):
    """RMS error of loss and gradients against float64 on the same rounded inputs."""
    parameters, target = leaves(dtype, 9, width, teacher)
    with torch.no_grad():
        parameters[1] /= width**0.5
    wide = [value.detach().double().requires_grad_() for value in parameters]
    expected = definition(*wide, target.double())
    got = ops.projection_cosine_loss(*parameters, target, chunk=4)
    assert got.item() == pytest.approx(expected.item(), abs=bound)
    exact = torch.autograd.grad(expected, wide)
    for value, want in zip(torch.autograd.grad(got, parameters), exact):
        assert value.dtype == dtype
        assert (value.double() - want).square().mean().sqrt() <= bound * want.square().mean().sqrt()


def test_gradients_are_kept_unscaled_so_that_float16_holds_them():
    """The mean over many rows has gradients below float16's smallest; a scaled loss must still find them."""
    parameters, target = leaves(torch.float16, 3000, 8, 6)
    scale = 2.0**15
    loss = ops.projection_cosine_loss(*parameters, target, chunk=512) * scale
    grad = torch.autograd.grad(loss, parameters[0])[0].double() / scale
    wide = [value.detach().double().requires_grad_() for value in parameters]
    exact = torch.autograd.grad(definition(*wide, target.double()), wide[0])[0]
    assert exact.abs().median() < 2e-4
    assert (grad - exact).square().mean().sqrt() <= 3e-3 * exact.square().mean().sqrt()


def test_the_upstream_gradient_is_applied_once_a_backward():
    """A kept graph can be differentiated again: the saved gradients were not scaled in place."""
    parameters, target = leaves()
    loss = ops.projection_cosine_loss(*parameters, target, chunk=4)
    exact = torch.autograd.grad(definition(*parameters, target), parameters)
    for factor in (3.0, -0.5):
        grads = torch.autograd.grad(loss, parameters, torch.tensor(factor, dtype=torch.float64), retain_graph=True)
        for value, want in zip(grads, exact):
            torch.testing.assert_close(value, factor * want, rtol=1e-10, atol=1e-12)
    for value, want in zip(torch.autograd.grad(2 * loss, parameters), exact):
        torch.testing.assert_close(value, 2 * want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (1,), (2,)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_what_takes_a_gradient_gets_one(frozen, reduction):
    parameters, target = leaves()
    for index in frozen:
        parameters[index].requires_grad_(False)
    given = [value for value in parameters if value.requires_grad]
    ops.projection_cosine_loss(*parameters, target, reduction=reduction).sum().backward()
    exact = torch.autograd.grad(definition(*parameters, target, reduction=reduction).sum(), given)
    for value, want in zip(given, exact):
        torch.testing.assert_close(value.grad, want, rtol=1e-10, atol=1e-12)
    assert all(parameters[index].grad is None for index in frozen)


def test_no_gradient_work_without_a_gradient():
    (hidden, weight, bias), target = leaves()
    with torch.no_grad():
        *_, grad_hidden, grad_weight, grad_bias = projection_cosine.PROJECTION_COSINE_SUM(
            hidden, weight, bias, target, None, None, 1e-8, False, 4, False, False
        )
        loss = ops.projection_cosine_loss(hidden, weight, bias, target)
    assert grad_hidden.numel() == grad_weight.numel() == grad_bias.numel() == 0
    torch.testing.assert_close(loss, definition(hidden, weight, bias, target).detach())


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_all_rows_masked(reduction):
    parameters, target = leaves()
    with torch.no_grad():
        parameters[0][:] = torch.nan
    loss = ops.projection_cosine_loss(
        *parameters, target * torch.inf, mask=torch.zeros(ROWS, dtype=torch.bool), reduction=reduction
    )
    loss.sum().backward()
    assert (loss == 0).all()
    for value in parameters:
        assert (value.grad == 0).all()


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_int8_targets_with_a_scale_for_each_row(dtype, bound):
    parameters, _ = leaves(dtype)
    target = torch.randint(-127, 128, (ROWS, TEACHER), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    # A scale so small that eps counts: the product, not the integers, is what is compared.
    scale = (randn(ROWS, seed=5).abs() * 1e-6).to(dtype)
    wide = target.double() * scale.double()[:, None]
    expected = definition(*(value.detach().double() for value in parameters), wide)
    got = ops.projection_cosine_loss(*parameters, target, target_scale=scale, chunk=4)
    assert got.item() == pytest.approx(expected.item(), rel=bound)
    assert abs(expected - definition(*(v.detach().double() for v in parameters), target.double())) > 1e-3
    y = F.linear(*parameters)
    torch.testing.assert_close(ops.cosine_loss(y, target, target_scale=scale), got, rtol=bound, atol=bound)
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (got, ops.cosine_loss(y, wide))]
    for value, want in zip(*grads):
        torch.testing.assert_close(value, want.to(dtype), rtol=30 * bound, atol=30 * bound)


def test_unit_targets():
    parameters, target = leaves()
    unit = F.normalize(target, dim=-1)
    expected = ops.projection_cosine_loss(*parameters, unit)
    torch.testing.assert_close(
        ops.projection_cosine_loss(*parameters, unit, normalized=True), expected, atol=1e-7, rtol=0
    )
    twice = ops.projection_cosine_loss(*parameters, 2 * unit, normalized=True)  # its length is not taken
    assert (1 - twice).item() == pytest.approx(2 * (1 - expected).item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("normalized", [False, True])
def test_gradcheck(reduction, normalized):
    parameters, target = leaves(rows=5, width=3, teacher=4)
    weight = torch.tensor([0.5, 2.0, 0.0, -1.0, 3.0], dtype=torch.float64)

    def projected(*values):
        return ops.projection_cosine_loss(
            *values, target, sample_weight=weight, reduction=reduction, normalized=normalized, chunk=2
        )

    assert torch.autograd.gradcheck(projected, parameters)
    y = randn(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: ops.cosine_loss(y, target, sample_weight=weight, reduction=reduction, normalized=normalized), y
    )


def test_opcheck():
    (hidden, weight, bias), target = leaves(torch.float32)
    row_weight = KEPT.float()
    torch.library.opcheck(
        projection_cosine.PROJECTION_COSINE_SUM.registered,
        (hidden, weight, bias, target, None, row_weight, 1e-8, False, 4, True, True),
    )
    torch.library.opcheck(
        projection_cosine.PROJECTION_COSINE_ROWS.registered,
        (hidden, weight, None, target, None, None, 1e-8, False, 4, False, False),
    )
    y = target.clone().requires_grad_()
    quantised, scale = (target * 20).to(torch.int8), row_weight + 0.05
    torch.library.opcheck(cosine.COSINE_LOSS.registered, (y, quantised, scale, None, 1e-8, True))
    torch.library.opcheck(
        cosine.COSINE_LOSS_BACKWARD.registered,
        (y.detach(), target + 1, None, row_weight, 1e-8, False),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("reduction, autocast", [("none", False), ("mean", True)])
def test_compiles_into_one_graph(reduction, autocast):
    """At several numbers of rows, with and without autocast; gradients too."""

    def step(hidden, weight, bias, target, mask):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = ops.projection_cosine_loss(hidden, weight, bias, target, mask=mask, reduction=reduction, chunk=4)
            return loss, ops.cosine_loss(F.linear(hidden, weight, bias), target, mask=mask)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (11, 6):
        parameters, target = leaves(torch.float32, rows)
        arguments = (*parameters, target, KEPT[:rows])
        results = []
        for run in (step, compiled):
            losses = run(*arguments)
            grads = torch.autograd.grad(losses[0].sum() * 3 + losses[1], parameters)
            results.append((*losses, *grads))
        assert all(value.dtype == torch.float32 for value in results[0])
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_autocast_is_as_close_as_a_linear_under_autocast():
    parameters, target = leaves(torch.float32, 64, 96, 80)
    wide = [value.detach().double().requires_grad_() for value in parameters]
    exact = torch.autograd.grad(definition(*wide, target.double()), wide)

    def errors(loss):
        grads = torch.autograd.grad(loss, parameters)
        return [(g.double() - e).square().mean().sqrt() / e.square().mean().sqrt() for g, e in zip(grads, exact)]

    with torch.autocast("cpu", torch.bfloat16):
        mine = errors(ops.projection_cosine_loss(*parameters, target, chunk=16))
        plain = errors(reference.cosine_loss(F.linear(*parameters), target))
    for got, allowed in zip(mine, plain):
        assert got <= 1.5 * allowed
        assert got > 1e-4  # it did run in bfloat16


def test_reference_mode_is_differentiable_twice(monkeypatch):
    monkeypatch.setattr(cosine.dispatch, "MODE", "reference")
    parameters, target = leaves(rows=3, width=3, teacher=2)
    assert torch.autograd.gradgradcheck(lambda *p: ops.projection_cosine_loss(*p, target), parameters)


def peak_bytes(run) -> int:
    """The most memory that `run` held at once, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_at_most_a_quarter_of_the_eager_forms(dtype):
    """2048 to 768 with 65,536 rows in chunks of 8192, at an eighth of each; beyond the gradients that both return."""
    parameters, target = leaves(dtype, 8192, 256, 96)

    def eager(hidden, weight, bias):
        return (1 - F.cosine_similarity(F.linear(hidden, weight, bias).float(), target.float(), dim=-1)).mean()

    def fused(hidden, weight, bias):
        return ops.projection_cosine_loss(hidden, weight, bias, target, chunk=1024)

    gradients = sum(value.numel() * value.element_size() for value in parameters)
    extra = {
        form.__name__: peak_bytes(lambda form=form: torch.autograd.grad(form(*parameters), parameters)) - gradients
        for form in (eager, fused)
    }
    assert extra["eager"] > target.numel() * 4
    assert 0 < extra["fused"] <= extra["eager"] / 4, extra


def test_bad_input_is_named():
    (hidden, weight, bias), target = leaves()
    scale = torch.ones(ROWS)
    with pytest.raises(ValueError, match=r"target_scale: int8 targets need .* floating \[11\], got None"):
        ops.projection_cosine_loss(hidden, weight, bias, target.to(torch.int8))
    with pytest.raises(ValueError, match=r"target_scale: .* got torch.float32 \[3\]"):
        ops.cosine_loss(target, target.to(torch.int8), target_scale=scale[:3])
    with pytest.raises(ValueError, match=r"target_scale: only for int8 targets, got a torch.float64 target"):
        ops.projection_cosine_loss(hidden, weight, bias, target, target_scale=scale)
    with pytest.raises(TypeError, match=r"target: expected a floating dtype or int8, got torch.int64"):
        ops.projection_cosine_loss(hidden, weight, bias, target.long())
    with pytest.raises(TypeError, match=r"weight: expected torch.float64 on cpu, like hidden, got torch.float32"):
        ops.projection_cosine_loss(hidden, weight.float(), bias, target)
    with pytest.raises(ValueError, match=r"hidden: expected at least one row .* got \[0, 8\]"):
        ops.projection_cosine_loss(hidden[:0], weight, bias, target[:0])
    with pytest.raises(TypeError, match=r"y: expected a floating dtype of 16 bits or more, got torch.int64"):
        ops.cosine_loss(target.long(), target)
    with pytest.raises(ValueError, match="chunk: expected a whole number of rows, at least one, got 0"):
        ops.projection_cosine_loss(hidden, weight, bias, target, chunk=0)
