"""The tolerances of the kernel tests notice: each mutant of a kernel file fails the check that the file passes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from agrepa_fast.kernels import pooling, residual_backward  # noqa: F401 (they are loaded again by name)

RESIDUAL = {
    "mean kept": ("x = tl.where(mask, x - mean[:, None], 0.0)", "x = tl.where(mask, x, 0.0)"),
    "row 0 for every sequence": ("return tl.where(known, row, 0)", "return tl.where(known, row * 0, 0)"),
    "gate ignored": ("return tl.where(s != 0, s * gate, 0.0)", "return tl.where(s != 0, s + 0 * gate, 0.0)"),
    "stream scale ignored": ("return tl.where(s != 0, s * gate, 0.0)", "return gate"),
    "no 1 + scale": (" = 1.0 + _row(", " = 0.0 + _row("),
    "eps forgotten": ("square / WIDTH + EPS", "square / WIDTH"),
    "unbiased variance": ("square / WIDTH + EPS", "square / (WIDTH - 1) + EPS"),
    "last rows not written": (
        "last = tl.minimum(first + tokens, frames)",
        "last = tl.minimum(first + tokens, frames - 1)",
    ),
    "mean of w left out": ("w -= (total / WIDTH)[:, None]", "w -= 0 * (total / WIDTH)[:, None]"),
    "inner product left out": ("dx += rstd[:, None] * (w - y *", "dx += rstd[:, None] * (w - 0 * y *"),
    "dx' left out": (
        "dx = _rows(inputs.grad_x_new, strides.grad_x_new, sequence, t, c, mask, UNIT).to(ACC)",
        "dx = _rows(inputs.grad_x_new, strides.grad_x_new, sequence, t, c, mask, UNIT).to(ACC) * 0",
    ),
    "dscale of x, not of y": ("vy_sum += v * y", "vy_sum += v * x"),
    "dgate without s": ("rows *= tl.load(stream_scale_ptr", "rows *= 0 * tl.load(stream_scale_ptr"),
    "only the first partial rows": ("start += BLOCK_P", "start += 100000"),
    "sums start with the branch twice": ("gate_sum += dgate", "gate_sum += 2 * dgate"),
}
# Of what is per token, and of the norm's weight and bias; the first word is what they are checked on.
PER_TOKEN = {
    "token: no 1 + scale": ("scale = 1.0 + _rows(", "scale = 0.0 + _rows("),
    "token: no 1 + scale in the gradient": ("v = dh * (1.0 + _rows(", "v = dh * (0.0 + _rows("),
    "token: the first token's shift": (
        "_rows(inputs.shift, strides.shift, sample, t,",
        "_rows(inputs.shift, strides.shift, sample, t * 0,",
    ),
    "token: the sequence's scale, not the sample's": (
        "_rows(inputs.scale, strides.scale, sample, t,",
        "_rows(inputs.scale, strides.scale, sequence * 0, t,",
    ),
    "token: dgate without s": ("_times(s, dgate)", "dgate"),
    "token: ds without the gate": ("dgate *= raw_gate.to(ACC)", "dgate *= 1"),
    "token: dscale without the weight": ("dscale *= weight[None, :]", "dscale *= 1"),
    "token: dscale without the bias": ("dscale += dh * bias[None, :]", "dscale += 0"),
    "sample: weight ignored": ("y *= weight\n", "y *= 1\n"),
    "sample: bias ignored": ("y += bias\n", "y += 0\n"),
    "sample: dx without the weight": ("factor *= weight", "factor *= 1"),
    "token: dx without the weight": ("w = v * weight[None, :]", "w = v"),
    "sample: dweight without 1 + scale": ("vy_total *= scale", "vy_total *= 1"),
    "sample: dbias without 1 + scale": ("v_total *= scale", "v_total *= 1"),
    "sample: dscale without the weight": (
        "dscale_total = vy_total * tl.load(",
        "dscale_total = vy_total + 0 * tl.load(",
    ),
    "sample: dscale without the bias": ("dscale_total += v_total * tl.load(", "dscale_total += 0 * tl.load("),
    "sample: weight and bias of the first program alone": ("per_sequence=programs)", "per_sequence=1)"),
    "shared: only the first sequence of a sample": (
        "per_sequence=1, **samples_of",
        'per_sequence=1, **samples_of | {"sequences": 1}',
    ),
}
JOIN = {
    "rows of x, not of join": ("tl.where(joins, inputs.join, inputs.x)", "tl.where(joins, inputs.x, inputs.x)"),
    "the first joining sequence for all": (
        "tl.where(joins, sequence - own, sequence)",
        "tl.where(joins, 0, sequence)",
    ),
    "x's distance between rows": (
        "tl.where(joins, strides.join[1], strides.x[1])",
        "tl.where(joins, strides.x[1], strides.x[1])",
    ),
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


def mutant(monkeypatch, folder: Path, names, old: str = "", new: str = ""):
    """Load the kernel files of an op again, in the order of their imports, with one passage replaced in all of them."""
    import agrepa_fast.kernels as package

    texts = {name: Path(getattr(package, name).__file__).read_text() for name in names}
    assert not old or any(old in text for text in texts.values()), f"the passage is no longer in {names}: {old!r}"
    monkeypatch.setattr("agrepa_fast.ops.residual._calls", {})
    loaded = {}
    for name, text in texts.items():
        path = folder / f"{name}.py"
        path.write_text(text.replace(old, new) if old else text)
        spec = importlib.util.spec_from_file_location(f"agrepa_fast.kernels.{name}", path)
        loaded[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded[name])
        monkeypatch.setattr(package, name, loaded[name])
        spec.loader.exec_module(loaded[name])
    return loaded


FILES = ("residual", "residual_sums", "residual_backward")


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


FAILS = r"output|dx|dbranch|dgate|dshift|dscale|dstream_scale|dweight|dbias"


@pytest.mark.parametrize("op, name", RUNS)
def test_residual(bench, device, op, name, tmp_path, monkeypatch) -> None:
    case = bench.make_case(device, 80, frames=11, sequences=3)
    # Small numbers in one sequence, so that eps counts.
    case.x[1], case.branch[1] = case.x[1] * 1e-3, case.branch[1] * 1e-3
    kernels = mutant(monkeypatch, tmp_path, FILES, *RESIDUAL.get(name, ()))
    monkeypatch.setattr(kernels["residual_sums"], "ROWS", 4)  # several tiles of partial rows
    if name is None:
        bench.check(case, op)
        return
    with pytest.raises(AssertionError, match=FAILS):
        bench.check(case, op)


@pytest.mark.parametrize("name", [None, *PER_TOKEN])
def test_per_token_and_affine(bench, device, name, tmp_path, monkeypatch) -> None:
    """Mutants that begin with "sample" are of modulation per sample, "shared" of samples with several sequences."""
    cases = {
        "token": bench.make_case(device, frames=11, per_token="gate, shift, scale", affine=True, samples=None),
        "sample": bench.make_case(device, frames=11, affine=True),
        "shared": bench.make_case(device, frames=11, per_token="gate, shift, scale", samples=2),
    }
    mutant(monkeypatch, tmp_path, FILES, *PER_TOKEN.get(name, ()))
    for kind, case in cases.items():
        if name is None:
            bench.check(case, "gated_residual_norm")
        elif name.startswith(kind):
            with pytest.raises(AssertionError, match=FAILS):
                bench.check(case, "gated_residual_norm")


@pytest.mark.parametrize("op", ["gated_residual_norm", "gated_residual"])
@pytest.mark.parametrize("name", [None, *JOIN])
def test_join(bench, device, op, name, tmp_path, monkeypatch) -> None:
    case = bench.make_case(device, sequences=4, frames=11, active=2)
    wide = torch.randn(2, 22, 24, device=device)
    wide[:, ::2] = case.x[2:]
    if name is None:
        bench.check_join(case, op, 2, wide[:, ::2])
        return
    mutant(monkeypatch, tmp_path, FILES, *JOIN[name])
    with pytest.raises(AssertionError, match="output 0"):
        bench.check_join(case, op, 2, wide[:, ::2])


@pytest.mark.parametrize("name", [None, *POOLING])
def test_pooling(bench, device, name, tmp_path, monkeypatch) -> None:
    """Each mutant fails the check of the op that it is in, and only that one."""
    from agrepa_fast import ops

    if name is not None:
        mutant(monkeypatch, tmp_path, ("pooling",), *POOLING[name])
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 2, 40, 10, generator=generator).to(device) + 0.5
    mask = torch.rand(2, 40, generator=generator).to(device) < 0.6
    for op, x in ((ops.masked_mean, v[1]), (ops.velocity_delta, v)):
        if name is not None and op.__name__ in BREAKS[name]:
            with pytest.raises(AssertionError, match=r"value \d"):
                bench.check_pooling(op, x, mask)
        else:
            bench.check_pooling(op, x, mask)
