"""`cosine_loss` and `projection_cosine_loss` with their kernel against the reference in float64.

Losses, gradients, masks, int8 targets, mutants."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from agrepa_fast import ops
from agrepa_fast.kernels import cosine as kernels
from agrepa_fast.reference import cosine as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(y, target, row_weight=None):
    """As one would write it, every step in the tensors' own dtype: what errors are compared with."""
    rows = 1 - (y * target).sum(-1) / ((y.square().sum(-1) + 1e-8).sqrt() * (target.square().sum(-1) + 1e-8).sqrt())
    return rows if row_weight is None else torch.where(row_weight != 0, rows * row_weight.to(rows.dtype), 0)


def oracle(y, target, **how):
    return reference.cosine_loss(y, target, reduction="none", **how)


def check(bench, device, dtype, rows, width, weighted=True, **how):
    """cosine_loss and its gradient; rows of weight 0 hold nan, which must not be read."""
    generator = torch.Generator().manual_seed(0)
    y, z, g = (torch.randn(*s, generator=generator) for s in ((rows, width), (rows, width), (rows,)))
    row_weight = None
    if weighted:
        row_weight = torch.tensor(([1.0, 0.0, 0.5, -2.0] * rows)[:rows])
    y, z, g = y.to(device, dtype), z.to(device, dtype), g.to(device)
    given = None if row_weight is None else row_weight.to(device)
    if weighted:
        y = torch.where((given != 0)[:, None], y, torch.nan)
    y.requires_grad_()
    rows_found = ops.cosine_loss(y, z, sample_weight=given, reduction="none", **how)
    found = [rows_found, *torch.autograd.grad(rows_found, y, g.to(rows_found))]

    def results(function, to):
        x = torch.nan_to_num(y.detach().cpu().to(to), nan=1.0).requires_grad_()
        value = function(x, z.cpu().to(to), row_weight)
        return [value, *torch.autograd.grad(value, x, g.cpu().to(value))]

    exact_values = results(lambda x, z, w: oracle(x, z, sample_weight=w), torch.float64)
    for name, value, exact, same in zip(("loss", "dy"), found, exact_values, results(plain, dtype)):
        bench.close(name, value, exact, same, dtype, terms=width if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(5, 72), (37, 100), (1, 1500), (3, 4096)])
def test_cosine_loss(bench, device, dtype, rows, width) -> None:
    check(bench, device, dtype, rows, width)


def test_no_weights(bench, device) -> None:
    check(bench, device, torch.float32, 19, 40, weighted=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_projection(bench, device, dtype) -> None:
    """Chunks that do not divide the rows, a mask, and the gradient written over the projection."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator) for shape in ((11, 24), (40, 24), (40,), (11, 40))]
    *parameters, target = (value.to(device, dtype) for value in drawn)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1], dtype=torch.bool, device=device)
    for value in parameters:
        value.requires_grad_()
    for reduction in ("none", "mean"):
        loss = ops.projection_cosine_loss(*parameters, target, mask=mask, reduction=reduction, chunk=4)
        found = [loss, *torch.autograd.grad(loss.sum(), parameters)]

        def results(function, to):
            h, w, b = (value.detach().cpu().to(to).requires_grad_() for value in parameters)
            value = function(h, w, b, target.cpu().to(to))
            return [value, *torch.autograd.grad(value.sum(), (h, w, b))]

        def by_plain(h, w, b, z, reduction=reduction):
            rows = plain(F.linear(h, w, b), z, mask.cpu().to(z.dtype))
            return rows if reduction == "none" else rows.sum() / mask.cpu().sum()

        def by_reference(*tensors, reduction=reduction):
            return reference.projection_cosine_loss(*tensors, mask=mask.cpu(), reduction=reduction)

        names = ("loss", "dhidden", "dweight", "dbias")
        exact_values = results(by_reference, torch.float64)
        for name, value, exact, same in zip(names, found, exact_values, results(by_plain, dtype)):
            bench.close(name, value, exact, same, dtype, terms=11 if name in ("dweight", "dbias") else 2)


def test_zero_vectors_in_float16_beside_torch(device) -> None:
    """A zero prediction, a zero target, both: finite here, nan in F.cosine_similarity."""
    y = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype=torch.float16, device=device, requires_grad=True)
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float16, device=device)
    loss = ops.cosine_loss(y, z, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), y)
    assert loss.tolist() == [1, 1, 1]
    torch.testing.assert_close(
        grad.cpu().double(), torch.tensor([[-6e3, -8e3], [0, 0], [0, 0]]).double(), rtol=1e-3, atol=0
    )
    if device.type == "cpu":
        assert F.cosine_similarity(y, z).isnan().any()


@pytest.mark.parametrize("target_dtype", [torch.int8, torch.float32], ids=str)
def test_other_target_dtypes(bench, device, target_dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5, 100, generator=generator).to(device, torch.float16).requires_grad_()
    target = torch.randint(-127, 128, (5, 100), generator=generator).to(device, target_dtype)
    scale = (torch.rand(5, generator=generator) * 1e-5).to(device) if target_dtype == torch.int8 else None
    loss = ops.cosine_loss(y, target, target_scale=scale, reduction="none")
    x = y.detach().cpu().double().requires_grad_()
    exact = oracle(x, target.cpu(), target_scale=None if scale is None else scale.cpu().double())
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=0, atol=1e-6)
    grads = [torch.autograd.grad(rows.sum(), value)[0].cpu().double() for rows, value in ((loss, y), (exact, x))]
    torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-5)


def test_rows_and_views(bench, device) -> None:
    """A column slice, a transposed y (the one copy), unit targets taken as they are."""
    wide = torch.randn(7, 60, device=device, generator=torch.Generator(device).manual_seed(0))
    y, z = wide[:, 3:23], wide[:, 31:51]
    torch.testing.assert_close(ops.cosine_loss(y, z, reduction="none").cpu(), oracle(y.cpu(), z.cpu()))
    torch.testing.assert_close(
        ops.cosine_loss(y.t().contiguous().t(), z, reduction="none").cpu(), oracle(y.cpu(), z.cpu())
    )
    unit = F.normalize(z, dim=-1)
    found = ops.cosine_loss(y, 3 * unit, reduction="none", normalized=True)
    torch.testing.assert_close(1 - found.cpu(), 3 * (1 - oracle(y.cpu(), unit.cpu())))


def test_gradcheck(device) -> None:
    y, z = torch.randn(2, 4, 5, device=device, dtype=torch.float64)
    y.requires_grad_()
    weight = torch.tensor([1.0, 0.0, -0.5, 2.0], device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: ops.cosine_loss(y, z, sample_weight=weight, reduction="none"), y)
    matrix = torch.randn(5, 3, device=device, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 3, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w: ops.projection_cosine_loss(h, w, None, z, sample_weight=weight, chunk=3), (hidden, matrix)
    )


MUTANTS = {
    "weight ignored": ("w * (1.0 - inner / norms)", "(1.0 - inner / norms)"),
    "eps forgotten": ("tl.sum(y * y, axis=1) + EPS", "tl.sum(y * y, axis=1) + 1e-2"),
    "target not normalised": ("norms *= tl.sqrt", "norms *= 1 + 0 * tl.sqrt"),
    "no part along y": ("y * (inner / y_square)[:, None] - z", "0 * y - z"),
    "gradient without the weight": ("grad = (w / norms)", "grad = (1.0 / norms)"),
    "the next row's target": ("(TARGET_UNIT * (r * target_row))", "(TARGET_UNIT * ((r + 1) % rows * target_row))"),
    "last rows not written": ("(r < rows)[:, None] & (c", "(r < rows - 1)[:, None] & (c"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_tolerances_notice(bench, device, name, tmp_path: Path, monkeypatch) -> None:
    old, new = MUTANTS[name]
    text = Path(kernels.__file__).read_text()
    assert text.count(old) == 1, f"the mutant's passage is no longer there once: {old!r}"
    path = tmp_path / "mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("agrepa_fast.kernels.cosine_mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    check(bench, device, torch.float32, 7, 24)
    monkeypatch.setattr(kernels, "cosine_rows", mutant.cosine_rows)
    with pytest.raises(AssertionError):
        check(bench, device, torch.float32, 7, 24)
