"""The tolerances of the kernel tests notice: each mutant of a kernel file fails the check that the file passes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from agrepa_fast.kernels import pooling, residual

RESIDUAL = {
    "mean kept": ("x = tl.where(mask, x - mean[:, None], 0.0)", "x = tl.where(mask, x, 0.0)"),
    "row 0 for every sequence": ("return tl.where(known, row, 0)", "return tl.where(known, row * 0, 0)"),
    "gate ignored": ("return tl.where(s != 0, s * gate, 0.0)", "return tl.where(s != 0, s + 0 * gate, 0.0)"),
    "stream scale ignored": ("return tl.where(s != 0, s * gate, 0.0)", "return gate"),
    "no 1 + scale": ("scale = 1.0 + tl.load", "scale = 0.0 + tl.load"),
    "eps forgotten": ("square / WIDTH + EPS", "square / WIDTH"),
    "unbiased variance": ("square / WIDTH + EPS", "square / (WIDTH - 1) + EPS"),
    "last rows not written": (
        "last = tl.minimum(first + tokens, frames)",
        "last = tl.minimum(first + tokens, frames - 1)",
    ),
    "mean of w left out": ("w -= (total / WIDTH)[:, None]", "w -= 0 * (total / WIDTH)[:, None]"),
    "inner product left out": ("dx += rstd[:, None] * (w - y *", "dx += rstd[:, None] * (w - 0 * y *"),
    "dx' left out": (
        "mask=mask, other=0.0).to(ACC)\n        else:",
        "mask=mask, other=0.0).to(ACC) * 0\n        else:",
    ),
    "dscale of x, not of y": ("scale_sum += dh * y", "scale_sum += dh * x"),
    "dgate without s": ("rows *= tl.load(stream_scale_ptr", "rows *= 0 * tl.load(stream_scale_ptr"),
    "only the first partial rows": ("start += BLOCK_P", "start += 100000"),
    "sums start with the branch twice": ("gate_sum += dx *", "gate_sum += 2 * dx *"),
}
JOIN = {
    "rows of x, not of join": ("tl.where(joins, join_ptr, x_ptr)", "tl.where(joins, x_ptr, x_ptr)"),
    "the first joining sequence for all": ("tl.where(joins, sequence - own, sequence)", "tl.where(joins, 0, sequence)"),
    "x's distance between rows": ("tl.where(joins, join_row, x_row)", "tl.where(joins, x_row, x_row)"),
}
POOLING = {
    "mask ignored": ("other=0) != 0", "other=0) >= 0"),
    "divided by all frames": ("tl.sum(total, axis=0) / tl.maximum(n, 1.0)", "tl.sum(total, axis=0) / frames"),
    "first tile only": (
        "count += valid.to(ACC)\n        start += BLOCK_T",
        "count += valid.to(ACC)\n        start += 100000",
    ),
    "gradient not divided": (".to(ACC) / n\n    grad_x", ".to(ACC)\n    grad_x"),
    "energy left out": ("tl.where(s == 0, tl.sum(base * base), 0.0)", "tl.where(s == 0, tl.sum(base), 0.0)"),
    "baseline not subtracted": ("other=0.0).to(ACC) - base\n", "other=0.0).to(ACC)\n"),
    "baseline's gradient without the streams": ("grad_base -= grad", "grad_base -= 0 * grad"),
}
BREAKS = dict.fromkeys(("divided by all frames", "gradient not divided", "first tile only"), ("masked_mean",))
BREAKS |= dict.fromkeys(("baseline not subtracted", "baseline's gradient without the streams"), ("velocity_delta",))
BREAKS |= {"mask ignored": ("masked_mean", "velocity_delta"), "energy left out": ("velocity_delta",)}


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


# The two ends of the chain are the same kernels with a part left out; what they keep must be noticed there too.
ENDS = {
    "layer_norm_modulate": (
        "mean kept",
        "row 0 for every sequence",
        "no 1 + scale",
        "eps forgotten",
        "last rows not written",
        "mean of w left out",
        "inner product left out",
        "dscale of x, not of y",
        "only the first partial rows",
    ),
    "gated_residual": (
        "row 0 for every sequence",
        "gate ignored",
        "stream scale ignored",
        "last rows not written",
        "dx' left out",
        "dgate without s",
        "sums start with the branch twice",
        "only the first partial rows",
    ),
}
RUNS = [("gated_residual_norm", name) for name in (None, *RESIDUAL)]
RUNS += [(op, name) for op, names in ENDS.items() for name in (None, *names)]


@pytest.mark.parametrize("op, name", RUNS)
def test_residual(bench, device, op, name, tmp_path, monkeypatch) -> None:
    import agrepa_fast.kernels as package

    case = bench.make_case(device, 80, frames=11, sequences=3)
    # Small numbers in one sequence, so that eps counts.
    case.x[1], case.branch[1] = case.x[1] * 1e-3, case.branch[1] * 1e-3
    kernels = residual if name is None else mutant(residual, *RESIDUAL[name], tmp_path)
    monkeypatch.setattr(package, "residual", kernels)
    monkeypatch.setattr(kernels, "_SUM_ROWS", 4)  # several tiles of partial rows
    if name is None:
        bench.check(case, op)
        return
    with pytest.raises(AssertionError, match=r"output|dx|dbranch|dgate|dshift|dscale|dstream_scale"):
        bench.check(case, op)


@pytest.mark.parametrize("op", ["gated_residual_norm", "gated_residual"])
@pytest.mark.parametrize("name", [None, *JOIN])
def test_join(bench, device, op, name, tmp_path, monkeypatch) -> None:
    import agrepa_fast.kernels as package

    case = bench.make_case(device, sequences=4, frames=11, active=2)
    wide = torch.randn(2, 22, 24, device=device)
    wide[:, ::2] = case.x[2:]
    if name is None:
        bench.check_join(case, op, 2, wide[:, ::2])
        return
    monkeypatch.setattr(package, "residual", mutant(residual, *JOIN[name], tmp_path))
    with pytest.raises(AssertionError, match="output 0"):
        bench.check_join(case, op, 2, wide[:, ::2])


@pytest.mark.parametrize("name", [None, *POOLING])
def test_pooling(bench, device, name, tmp_path, monkeypatch) -> None:
    """Each mutant fails the check of the op that it is in, and only that one."""
    import agrepa_fast.kernels as package
    from agrepa_fast import ops

    if name is not None:
        monkeypatch.setattr(package, "pooling", mutant(pooling, *POOLING[name], tmp_path))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 2, 40, 10, generator=generator).to(device) + 0.5
    mask = torch.rand(2, 40, generator=generator).to(device) < 0.6
    for op, x in ((ops.masked_mean, v[1]), (ops.velocity_delta, v)):
        if name is not None and op.__name__ in BREAKS[name]:
            with pytest.raises(AssertionError, match=r"value \d"):
                bench.check_pooling(op, x, mask)
        else:
            bench.check_pooling(op, x, mask)
