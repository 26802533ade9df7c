"""The tolerances of the kernel tests notice: each mutant of a kernel file fails the check that the file passes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from agrepa_fast.kernels import pooling, residual

RESIDUAL = {
    "mean kept": ("x0 = tl.where(mask0, x0 - mean[:, None], 0.0)", "x0 = tl.where(mask0, x0, 0.0)"),
    "row 0 for every sequence": ("return tl.where(known, row, 0)", "return tl.where(known, row * 0, 0)"),
    "gate ignored": ("return tl.where(s != 0, s * gate, 0.0)", "return tl.where(s != 0, s + 0 * gate, 0.0)"),
    "stream scale ignored": ("return tl.where(s != 0, s * gate, 0.0)", "return gate"),
    "no 1 + scale": ("scale0 = 1.0 + tl.load", "scale0 = 0.0 + tl.load"),
    "eps forgotten": ("square / WIDTH + EPS", "square / WIDTH"),
    "unbiased variance": ("square / WIDTH + EPS", "square / (WIDTH - 1) + EPS"),
    "last rows not written": (
        "last = tl.minimum(first + tokens, frames)",
        "last = tl.minimum(first + tokens, frames - 1)",
    ),
    "mean of w left out": ("w0 -= (total / WIDTH)[:, None]", "w0 -= 0 * (total / WIDTH)[:, None]"),
    "inner product left out": ("dx0 += rstd[:, None] * (w0 - y0 *", "dx0 += rstd[:, None] * (w0 - 0 * y0 *"),
    "dx' left out": (
        "mask=mask0, other=0.0).to(ACC)\n        else:",
        "mask=mask0, other=0.0).to(ACC) * 0\n        else:",
    ),
    "dscale of x, not of y": ("scale_sum0 += dh0 * y0", "scale_sum0 += dh0 * x0"),
    "dgate without s": ("rows *= tl.load(stream_scale_ptr", "rows *= 0 * tl.load(stream_scale_ptr"),
    "only the first partial rows": ("start += BLOCK_P", "start += 100000"),
    "sums start with the branch twice": ("gate_sum0 += dx0 *", "gate_sum0 += 2 * dx0 *"),
}
POOLING = {
    "mask ignored": ("other=0) != 0", "other=0) >= 0"),
    "divided by all frames": ("tl.sum(total, axis=0) / tl.maximum(n, 1.0)", "tl.sum(total, axis=0) / frames"),
    "first tile only": (
        "count += valid.to(ACC)\n        start += BLOCK_T",
        "count += valid.to(ACC)\n        start += 100000",
    ),
    "gradient not divided": (".to(ACC) / n\n    grad_x", ".to(ACC)\n    grad_x"),
    "baseline not subtracted": ("other=0.0).to(ACC) - base\n", "other=0.0).to(ACC)\n"),
    "baseline's gradient without the streams": ("grad_base -= grad", "grad_base -= 0 * grad"),
}


def mutant(module, old, new, folder: Path):
    """A kernel file with one passage replaced, loaded beside the real one."""
    text = Path(module.__file__).read_text()
    assert text.count(old) >= 1, f"the mutant's passage is no longer in {module.__file__}: {old!r}"
    path = folder / "mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("agrepa_fast.kernels.mutant", path)
    changed = importlib.util.module_from_spec(spec)
    sys.modules.pop(spec.name, None)
    spec.loader.exec_module(changed)
    return changed


@pytest.mark.parametrize("name", [None, *RESIDUAL])
def test_residual(bench, device, name, tmp_path, monkeypatch) -> None:
    import agrepa_fast.kernels as package

    case = bench.make_case(device, 80, frames=11, sequences=3)
    # Small numbers in one sequence, so that eps counts.
    case.x[1], case.branch[1] = case.x[1] * 1e-3, case.branch[1] * 1e-3
    kernels = residual if name is None else mutant(residual, *RESIDUAL[name], tmp_path)
    monkeypatch.setattr(package, "residual", kernels)
    monkeypatch.setattr(kernels, "_SUM_ROWS", 4)  # several tiles of partial rows
    if name is None:
        bench.check(case, "gated_residual_norm")
        return
    with pytest.raises(AssertionError, match=r"output|dx|dbranch|dgate|dshift|dscale|dstream_scale"):
        bench.check(case, "gated_residual_norm")


@pytest.mark.parametrize("name", [None, *POOLING])
def test_pooling(bench, device, name, tmp_path, monkeypatch) -> None:
    import agrepa_fast.kernels as package
    from agrepa_fast import ops
    from agrepa_fast.reference import pooling as reference

    if name is not None:
        monkeypatch.setattr(package, "pooling", mutant(pooling, *POOLING[name], tmp_path))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 2, 40, 10, generator=generator).to(device).requires_grad_()
    mask = torch.rand(2, 40, generator=generator).to(device) < 0.6
    exact = v.detach().double().requires_grad_()

    def run(path, v):
        mean, (change, energy) = path.masked_mean(v[1], mask), path.velocity_delta(v, mask)
        loss = mean.sin().sum() + (change * change).sum() + energy.sum()
        return [mean, change, energy, torch.autograd.grad(loss, v)[0]]

    wrong = [
        i
        for i, (found, wanted) in enumerate(zip(run(ops, v), run(reference, exact)))
        if not torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6, equal_nan=False)
    ]
    assert bool(wrong) == (name is not None), wrong
