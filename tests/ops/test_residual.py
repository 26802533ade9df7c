"""The residual-stream ops against a loop over sequences and frames in float64, and against wrong variants of it.

x [R, T, D]; branch [R' <= R, T, D]; gate, shift, scale [B, D] or [B, T, D]; weight, bias [D]; stream_scale,
sample_index [R].
"""

from __future__ import annotations

import itertools
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from agrepa_fast import ops
from agrepa_fast.errors import UserError
from agrepa_fast.reference import residual as reference

ROWS, BATCH, FRAMES, WIDTH = 5, 2, 3, 8
EPS = 1e-6
# Mistakes in the reference, (text, what stands there instead); each must show in the comparison with the loop.
MUTANTS = {
    "row 0": ("index_select(0, sample_index)", "index_select(0, 0 * sample_index)"),
    "no gate": ("branch.to(dtype), _rows(gate, sample_index, dtype)", "branch.to(dtype), torch.ones_like(x[:, :1])"),
    "no stream scale": ("return x + s * torch.where(out", "return x + torch.where(out"),
    "no one": (".add(1.0)", ""),
    "shift as scale": ("_rows(shift, sample_index, dtype)", "_rows(scale, sample_index, dtype)"),
    "no mean": ("F.layer_norm(x, width, weight, bias, eps)", "F.rms_norm(x, width, weight, eps)"),
    "no eps": ("width, weight, bias, eps)", "width, weight, bias, 0.0)"),
    "branch of other sequences": ("torch.where(out, 0.0, branch)", "torch.where(out, 0.0, branch.flip(0))"),
}


def by_loop(case, norm="layer", eps=EPS):
    """x' and h one frame at a time, from the formula."""
    x, branch, gate, shift, scale = (case[k].double().numpy() for k in ("x", "branch", "gate", "shift", "scale"))
    weight, bias = (case[k].double().numpy() if k in case else other for k, other in (("weight", 1.0), ("bias", 0.0)))
    streams = case.get("stream_scale")
    index = case.get("sample_index")
    x_new, h = np.empty_like(x), np.empty_like(x)
    for r, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
        row = r if index is None else int(index[r])
        g, add, times = (m[row] if m.ndim == 2 else m[row, t] for m in (gate, shift, scale))
        s = 1.0 if streams is None else float(streams[r])
        v = x[r, t].copy()
        if r < len(branch) and s != 0:
            v += s * branch[r, t] * g
        centred = v - (v.mean() if norm == "layer" else 0.0)
        normed = centred / np.sqrt((centred**2).mean() + eps)
        x_new[r, t] = v
        h[r, t] = (normed * weight + bias) * (times + 1.0) + add
    return x_new, h


def make_case(dtype=torch.float64, active=ROWS, streams=True, index=True, per_token=(), affine=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = BATCH if index else ROWS

    def modulation(name):
        return randn(rows, FRAMES, WIDTH) if name in per_token else randn(rows, WIDTH)

    case = {
        # An offset, so that the mean matters.
        "x": randn(ROWS, FRAMES, WIDTH) + 1.5,
        "branch": randn(active, FRAMES, WIDTH),
        "gate": modulation("gate"),
        "shift": modulation("shift"),
        "scale": modulation("scale"),
    }
    if affine:
        case |= {"weight": randn(WIDTH), "bias": randn(WIDTH)}
    if streams:
        case["stream_scale"] = torch.tensor([1.0, 0.5, -2.0, 1.0, 0.3], dtype=torch.float64)
    case = {name: value.to(dtype) for name, value in case.items()}
    if index:
        case["sample_index"] = torch.tensor([1, 0, 0, 1, 1])
    return case


def options(case, *names):
    return {name: case[name] for name in names if name in case}


def fused(case, **changes):
    keys = ("x", "branch", "gate", "shift", "scale", "weight", "bias", "stream_scale", "sample_index")
    return ops.gated_residual_norm(**options(case, *keys), **changes)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("active", [ROWS, 2, 0])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_all_three_ops_equal_the_loop(norm, active, streams, index):
    case = make_case(active=active, streams=streams, index=index)
    x_expected, h_expected = by_loop(case, norm)
    x_new, h = fused(case, norm=norm)
    np.testing.assert_allclose(x_new.numpy(), x_expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(h.numpy(), h_expected, rtol=0, atol=1e-12)

    closed = ops.gated_residual(**options(case, "x", "branch", "gate", "stream_scale", "sample_index"))
    np.testing.assert_allclose(closed.numpy(), x_expected, rtol=0, atol=1e-12)
    opened = ops.layer_norm_modulate(x_new, **options(case, "shift", "scale", "sample_index"), norm=norm)
    np.testing.assert_allclose(opened.numpy(), h_expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [(), ("gate",), ("shift",), ("scale", "gate"), ("gate", "shift", "scale")])
@pytest.mark.parametrize("index", [False, True])
def test_modulation_per_token_and_an_affine_norm_equal_the_loop(norm, per_token, index):
    case = make_case(active=3, index=index, per_token=per_token, affine=True)
    x_expected, h_expected = by_loop(case, norm)
    x_new, h = fused(case, norm=norm)
    np.testing.assert_allclose(x_new.numpy(), x_expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(h.numpy(), h_expected, rtol=0, atol=1e-12)
    opened = ops.layer_norm_modulate(
        x_new, **options(case, "shift", "scale", "weight", "bias", "sample_index"), norm=norm
    )
    np.testing.assert_allclose(opened.numpy(), h_expected, rtol=0, atol=1e-12)
    closed = ops.gated_residual(**options(case, "x", "branch", "gate", "stream_scale", "sample_index"))
    np.testing.assert_allclose(closed.numpy(), x_expected, rtol=0, atol=1e-12)
    for name in ("weight", "bias"):  # each alone
        alone = {key: value for key, value in case.items() if key != name}
        np.testing.assert_allclose(fused(alone, norm=norm)[1].numpy(), by_loop(alone, norm)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mistakes_in_the_reference_are_told_apart(mutant):
    source, (right, wrong) = Path(reference.__file__).read_text(encoding="utf-8"), MUTANTS[mutant]
    assert source.count(right) == 1
    case = make_case()
    for text in (source, source.replace(right, wrong)):
        module = types.ModuleType("mutant")
        exec(compile(text, mutant, "exec"), vars(module))
        found = np.concatenate(module.gated_residual_norm(**case, eps=EPS))
        assert np.allclose(found, np.concatenate(by_loop(case)), rtol=0, atol=1e-12) == (text is source)


def test_eps_is_added_to_the_variance():
    case = make_case()
    _, h = fused(case, eps=0.7)
    np.testing.assert_allclose(h.numpy(), by_loop(case, eps=0.7)[1], rtol=0, atol=1e-12)


def opened(x_new, case):
    """h of a given x', in float64."""
    return reference.layer_norm_modulate(x_new.double(), case["shift"].double(), case["scale"].double(), eps=EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    """x' is the float64 truth rounded once; h is that of this x', rounded once. Neither is worse than the expression in
    the dtype itself."""
    case = make_case(dtype, streams=False, index=False, seed=1)
    x_true, h_true = (torch.from_numpy(value) for value in by_loop(case))
    x_new, h = fused(case)
    assert x_new.dtype == h.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2 * 1.001
    assert ((x_new.double() - x_true).abs() <= half_ulp * x_true.abs() + 1e-5).all()
    h_of_x_new = opened(x_new, case)
    assert ((h.double() - h_of_x_new).abs() <= half_ulp * h_of_x_new.abs() + 1e-5).all()

    plain = case["x"] + case["gate"].unsqueeze(1) * case["branch"]
    plain_h = F.layer_norm(plain, (WIDTH,), eps=EPS) * (1 + case["scale"].unsqueeze(1)) + case["shift"].unsqueeze(1)
    assert (x_new.double() - x_true).abs().max() <= 2 * (plain.double() - x_true).abs().max()
    assert (h.double() - h_true).abs().max() <= 2 * (plain_h.double() - h_true).abs().max()


def test_float32_modulation_of_a_bfloat16_stream_is_not_rounded():
    case = make_case(torch.bfloat16, index=False)
    generator = torch.Generator().manual_seed(3)
    for name in ("gate", "shift", "scale"):
        case[name] = torch.randn(ROWS, WIDTH, generator=generator)
    x_new, h = fused(case)
    for got, expected in ((x_new, torch.from_numpy(by_loop(case)[0])), (h, opened(x_new, case))):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - expected).abs() <= 2**-8 * 1.001 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("active, per_token", [(ROWS, ()), (3, ("gate", "shift"))])
def test_gradients(norm, active, per_token):
    case = make_case(active=active, per_token=per_token, affine=True)
    names = ("x", "branch", "gate", "shift", "scale", "weight", "bias", "stream_scale")
    leaves = [case[name].requires_grad_() for name in names]

    def call(*values):
        return fused({**dict(zip(names, values)), "sample_index": case["sample_index"]}, norm=norm)

    assert torch.autograd.gradcheck(call, leaves)


def test_gradients_of_the_two_ends():
    case = make_case(active=3)
    names = ("x", "branch", "gate", "stream_scale")
    index = case["sample_index"]
    assert torch.autograd.gradcheck(
        lambda x, branch, gate, s: ops.gated_residual(x, branch, gate, stream_scale=s, sample_index=index),
        [case[name].requires_grad_() for name in names],
    )
    assert torch.autograd.gradcheck(
        lambda x, shift, scale: ops.layer_norm_modulate(x, shift, scale, sample_index=index),
        [case[name].requires_grad_() for name in ("x", "shift", "scale")],
    )


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_stream_switched_off_does_not_see_its_branch(junk, dtype):
    """A diverged branch, or gate, under scale 0 changes neither outputs nor any gradient."""

    def run(filling):
        case = make_case(dtype, index=False)
        case["gate"][1] = filling
        case["stream_scale"] = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0], dtype=dtype)
        case["branch"][1] = filling
        case["branch"][3, 1, 2] = filling
        leaves = {name: value.requires_grad_() for name, value in case.items() if value.is_floating_point()}
        x_new, h = fused(case)
        (x_new.sum() + (h * torch.arange(WIDTH)).sum()).backward()
        return [x_new, h, *(leaf.grad for leaf in leaves.values())]

    for got, expected in zip(run(junk), run(0.0)):
        assert got.isfinite().all()
        assert torch.equal(got, expected)


def test_sequences_past_the_branch_keep_their_bits():
    case = make_case(torch.float32, active=2)
    x_new, _ = fused(case)
    assert torch.equal(x_new[2:], case["x"][2:])
    assert not torch.equal(x_new[:2], case["x"][:2])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("active", [3, 1, 0])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_joining_sequences_come_after_those_of_x(norm, active, streams, index):
    """The last two of five sequences as a tensor of their own: the loop's results of all five."""
    case = make_case(active=active, streams=streams, index=index)
    x_expected, h_expected = by_loop(case, norm)
    join, case["x"] = case["x"][3:], case["x"][:3]
    x_new, h = fused(case, norm=norm, join=join)
    np.testing.assert_allclose(x_new.numpy(), x_expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(h.numpy(), h_expected, rtol=0, atol=1e-12)
    assert torch.equal(x_new[3:], join)
    names = ("x", "branch", "gate", "stream_scale", "sample_index")
    closed = ops.gated_residual(**options(case, *names), join=join)
    np.testing.assert_allclose(closed.numpy(), x_expected, rtol=0, atol=1e-12)


def test_joining_sequences_have_no_gradient():
    """Refused in words where a gradient would be asked for, and only there."""
    case = make_case(active=3)
    join, case["x"] = case["x"][3:], case["x"][:3]
    names = ("x", "branch", "gate", "stream_scale", "sample_index")
    expected = fused(case, join=join)
    for name in ("x", "branch", "gate", "shift", "scale", "stream_scale", "join"):
        change = {**case, "join": join}
        change[name] = change[name].clone().requires_grad_()
        with pytest.raises(ValueError, match=r"join: it has no gradient.*torch\.no_grad"):
            fused(change, join=change["join"])
        if name not in ("shift", "scale"):
            with pytest.raises(ValueError, match=r"join: it has no gradient"):
                ops.gated_residual(**options(change, *names, "join"))
        with torch.no_grad():
            for got, want in zip(fused(change, join=change["join"]), expected):
                assert torch.equal(got, want)


def test_int32_sample_index_is_accepted():
    case = make_case()
    expected = fused(case)
    case["sample_index"] = case["sample_index"].int()
    for got, want in zip(fused(case), expected):
        assert torch.equal(got, want)


def test_arguments_are_checked_once_per_signature(monkeypatch):
    """Shapes, dtypes and devices that passed are not looked at again; others are, also after a call that passed."""
    from agrepa_fast.ops import residual

    checked = []
    check = residual._check
    monkeypatch.setattr(residual, "_check", lambda x, *rest: (checked.append(x), check(x, *rest)))
    monkeypatch.setattr(residual, "_calls", {})
    case = make_case(torch.float32)
    for _ in range(3):
        fused(case)
    assert len(checked) == 1
    ops.layer_norm_modulate(*(case[name] for name in ("x", "shift", "scale")), sample_index=case["sample_index"])
    assert len(checked) == 2
    for name, value in (("gate", case["gate"].long()), ("branch", case["branch"][:, :2]), ("shift", case["shift"][:1])):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
                fused({**case, name: value})
    with pytest.raises(ValueError, match="norm: expected"):
        fused(case, norm="batch")
    assert len(checked) == 9
    monkeypatch.setattr(residual.dispatch, "MODE", "triton")
    with pytest.raises(UserError, match="AGREPA_OPS=triton: the kernels need CUDA"):
        fused(case)


zeros = torch.zeros
BAD = [
    ({"x": zeros(3, 8)}, ValueError, r"x: expected a non-empty \[sequences, time, width\], got \[3, 8\]"),
    ({"x": zeros(5, 0, 8)}, ValueError, r"x: .*non-empty.* got \[5, 0, 8\]"),
    (
        {"x": zeros(5, 3, 8, dtype=torch.int64)},
        TypeError,
        "x: expected a floating dtype of 16 bits or more, got torch.int64",
    ),
    ({"norm": "batch"}, ValueError, 'norm: expected "layer" or "rms", got \'batch\''),
    (
        {"branch": zeros(6, 3, 8)},
        ValueError,
        r"branch: expected \[at most 5, 3, 8\] beside x \[5, 3, 8\], got \[6, 3, 8\]",
    ),
    ({"branch": zeros(5, 3, 7)}, ValueError, r"branch: .* got \[5, 3, 7\]"),
    ({"branch": zeros(5, 3, 8, device="meta")}, ValueError, "branch: expected on x's device cpu, got meta"),
    ({"gate": zeros(2, 7)}, ValueError, r"gate: expected \[2, 8\] or, per token, .*, got \[2, 7\]"),
    ({"shift": zeros(3, 8)}, ValueError, r"shift: expected \[2, 8\] or, per token, .*, got \[3, 8\]"),
    ({"scale": zeros(2, 1, 8)}, ValueError, r"scale: expected \[2, 8\] or, per token, \[2, 3, 8\], got \[2, 1, 8\]"),
    ({"scale": zeros(2, 8, device="meta")}, ValueError, "scale: expected on x's device cpu, got meta"),
    ({"gate": zeros(2, 4, 8)}, ValueError, r"gate: expected \[2, 8\] or, per token, \[2, 3, 8\], got \[2, 4, 8\]"),
    ({"shift": zeros(3, 3, 8)}, ValueError, r"shift: expected .*, got \[3, 3, 8\]"),
    ({"scale": None}, TypeError, "scale: expected a tensor, got NoneType"),
    ({"x": np.zeros((5, 3, 8))}, TypeError, "x: expected a tensor, got ndarray"),
    ({"gate": [1.0]}, TypeError, "gate: expected a tensor, got list"),
    ({"weight": zeros(7)}, ValueError, r"weight: expected \[8\], got \[7\]"),
    ({"bias": zeros(1, 8)}, ValueError, r"bias: expected \[8\], got \[1, 8\]"),
    ({"weight": zeros(8).long()}, TypeError, "weight: expected a floating dtype of 16 bits or more, got torch.int64"),
    ({"bias": zeros(8, device="meta")}, ValueError, "bias: expected on x's device cpu, got meta"),
    ({"sample_index": None}, ValueError, "modulation has 2 rows for 5 sequences: give sample_index"),
    (
        {"sample_index": zeros(4, dtype=torch.int64)},
        ValueError,
        r"sample_index: expected int64 \[5\], got torch.int64 \[4\]",
    ),
    ({"sample_index": zeros(5)}, ValueError, r"sample_index: expected int64 \[5\], got torch.float32 \[5\]"),
    ({"stream_scale": zeros(5, 1)}, ValueError, r"stream_scale: expected \[5\], got \[5, 1\]"),
    (
        {"join": zeros(2, 3, 7)},
        ValueError,
        r"join: expected torch.float32 \[at least 1, 3, 8\] beside x \[5, 3, 8\], got torch.float32 \[2, 3, 7\]",
    ),
    ({"join": zeros(0, 3, 8)}, ValueError, r"join: .* got torch.float32 \[0, 3, 8\]"),
    ({"join": zeros(3, 8)}, ValueError, r"join: .* got torch.float32 \[3, 8\]"),
    ({"join": zeros(2, 3, 8).double()}, ValueError, r"join: expected torch.float32 .* got torch.float64 \[2, 3, 8\]"),
    ({"join": zeros(2, 3, 8).long()}, TypeError, "join: expected a floating dtype of 16 bits or more, got torch.int64"),
    ({"join": zeros(2, 3, 8, device="meta")}, ValueError, "join: expected on x's device cpu, got meta"),
    ({"join": zeros(2, 3, 8)}, ValueError, r"sample_index: expected int64 \[7\], got torch.int64 \[5\]"),
    (
        {"join": zeros(2, 3, 8), "sample_index": zeros(7, dtype=torch.int64)},
        ValueError,
        r"stream_scale: expected \[7\], got \[5\]",
    ),
    ({"branch": zeros(6, 3, 8), "join": zeros(2, 3, 8)}, ValueError, r"branch: expected \[at most 5, 3, 8\]"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input_is_named(change, error, message):
    case = {**make_case(torch.float32), **change}
    with pytest.raises(error, match=message):
        ops.gated_residual_norm(**case)


def test_bad_input_of_the_two_ends_is_named():
    with pytest.raises(ValueError, match=r"scale: expected \[2, 8\] or, per token, .*, got \[2, 4\]"):
        ops.layer_norm_modulate(zeros(2, 3, 8), zeros(2, 8), zeros(2, 4))
    with pytest.raises(ValueError, match=r"gate: expected \[2, 8\] or, per token, .*, got \[2, 4\]"):
        ops.gated_residual(zeros(2, 3, 8), zeros(2, 3, 8), zeros(2, 4))
