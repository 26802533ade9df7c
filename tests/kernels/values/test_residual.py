"""The residual kernels against float64: outputs and every gradient, through the public ops."""

from __future__ import annotations

import dataclasses
import mmap

import pytest
import torch

from agrepa_fast import ops
from agrepa_fast.kernels import residual as kernels
from agrepa_fast.reference import residual as reference

OPS = ("gated_residual_norm", "layer_norm_modulate", "gated_residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(bench, device, op, dtype) -> None:
    bench.check(bench.make_case(device, dtype=dtype), op)


@pytest.mark.parametrize("op", OPS[:2])
def test_rms(bench, device, op) -> None:
    bench.check(bench.make_case(device, norm="rms"), op)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_stream_under_float_modulation(bench, device, dtype) -> None:
    bench.check(bench.make_case(device, dtype=dtype, modulation=torch.float32), "gated_residual_norm")


@pytest.mark.parametrize("width", [1, 72, 384, 760, 1152, 1500])
def test_odd_widths(bench, device, width) -> None:
    case = bench.make_case(device, width, sequences=2, frames=3, samples=None, streams=False)
    if width == 1:
        # The normalised value of a single number is 0 and its gradient cancels; rms is the norm to test.
        case = dataclasses.replace(case, norm="rms")
    bench.check(case, "gated_residual_norm")


@pytest.mark.parametrize("op", OPS)
def test_many_tiles(bench, device, op, small_launches) -> None:
    """Two programs of several tiles per sequence, the last one ragged; a tail tile (190 of 192 = 128 + 64)."""
    bench.check(bench.make_case(device, 190, sequences=3, frames=11), op)


@pytest.mark.parametrize("active", [0, 1, 2])
@pytest.mark.parametrize("op", [OPS[0], OPS[2]])
def test_sequences_without_a_branch(bench, device, op, active) -> None:
    bench.check(bench.make_case(device, active=active, streams=False), op)


@pytest.mark.parametrize("op", [OPS[0], OPS[2]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joining_sequences(bench, device, op, dtype) -> None:
    bench.check_join(bench.make_case(device, active=2, sequences=4, dtype=dtype), op, own=2)


@pytest.mark.parametrize("active", [0, 1])
def test_joining_sequences_beside_others_without_a_branch(bench, device, active) -> None:
    case = bench.make_case(device, sequences=4, active=active, streams=False, norm="rms")
    bench.check_join(case, OPS[0], own=2)
    bench.check_join(bench.make_case(device, sequences=4, active=active, samples=None), OPS[0], own=3)


@pytest.mark.parametrize("op", [OPS[0], OPS[2]])
def test_joining_sequences_in_many_tiles_and_strides_of_their_own(bench, device, op, small_launches) -> None:
    case = bench.make_case(device, 190, sequences=4, frames=11, active=2)
    rows = case.x[2:].transpose(0, 1).contiguous().transpose(0, 1)
    assert rows.stride() != case.x.stride()
    bench.check_join(case, op, 2, rows)
    bench.check_join(case, op, 2, case.x[2:].repeat_interleave(2, dim=2)[:, :, ::2])


def test_rows_of_x_may_join(bench, device) -> None:
    """What attribution does: the baseline's rows of x enter as a new stream, and stay as they are in x."""
    case = bench.make_case(device, 16, sequences=5, active=3, streams=False)
    case.x[3:] = case.x[1:3]
    before = case.x.clone()
    found = bench.fused(dataclasses.replace(case, x=case.x[:3]), OPS[0], case.x[1:3])
    for one, other in zip(found, bench.fused(case, OPS[0])):
        assert torch.equal(one, other)
    assert torch.equal(case.x, before)
    storage = case.x.untyped_storage().data_ptr()
    assert all(value.is_contiguous() and value.untyped_storage().data_ptr() != storage for value in found)


def test_joining_sequences_have_no_gradient(bench, device) -> None:
    case = bench.make_case(device, sequences=4, active=2)
    join, case.x = case.x[2:], case.x[:2].clone().requires_grad_()
    for op in (OPS[0], OPS[2]):
        with pytest.raises(ValueError, match=r"join: it has no gradient.*torch\.no_grad"):
            bench.fused(case, op, join)
        with torch.no_grad():
            assert torch.equal(bench.fused(case, op, join)[0][2:], join)


def test_a_staircase_of_kernels_is_the_loop(device) -> None:
    """The staircase, whose streams join in the op, against a forward for each unit; whole blocks and branches apart."""
    from agrepa_fast import AblationPlan, DiT, DiTConfig
    from agrepa_fast.attribution import native

    torch.manual_seed(0)
    model = DiT(DiTConfig(2, 16, 2, 3, 0, 2, 0.0, 8)).to(device, torch.float64).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_t, t = (torch.randn(2, 5, 3), torch.rand(2))
    inputs = {"x_t": x_t.to(device, torch.float64), "t": t.to(device, torch.float64)}
    for branches in (None, ("attn", "ff")):
        plan = AblationPlan.build(2, branches=branches)
        with torch.no_grad():
            found, wanted = (native.measure(model, plan, inputs, engine) for engine in ("prefix", "loop"))
        assert wanted[:-1].min() > 1e-4
        torch.testing.assert_close(found[:-1], wanted[:-1], rtol=1e-10, atol=0)


def test_one_row(bench, device) -> None:
    bench.check(bench.make_case(device, sequences=1, frames=1, samples=None, streams=False), "gated_residual_norm")


def test_a_sample_without_sequences_has_zero_gradients(bench, device) -> None:
    case = bench.make_case(device, samples=4)
    case = dataclasses.replace(case, sample_index=torch.tensor([3, 1, 3], device=device))
    bench.check(case, "gated_residual_norm")


def test_int32_sample_index(bench, device) -> None:
    case = bench.make_case(device)
    bench.check(dataclasses.replace(case, sample_index=case.sample_index.int()), "gated_residual_norm")


def test_strided_inputs(bench, device) -> None:
    """Rows out of a wider tensor, a transposed batch, an expanded modulation, a last dimension with a stride."""
    case = bench.make_case(device, sequences=3, frames=5)
    wide = torch.randn(5, 3, 40, device=device)
    case.x = wide[:, :, 8:32].transpose(0, 1)
    case.branch = torch.randn(3, 5, 48, device=device)[:, :, ::2]
    case.shift = torch.randn(1, 24, device=device).expand(2, 24)
    case.stream_scale = torch.tensor([0.5, 9.0, -2.0, 9.0, 1.0], device=device)[::2]
    case.sample_index = torch.tensor([1, 9, 0, 9, 1], device=device)[::2]
    bench.check(case, "gated_residual_norm")


def test_expanded_gradients(bench, device) -> None:
    """The gradient of a sum has strides of 0, in the last dimension too."""
    case = bench.make_case(device)
    for name in bench.used(case, OPS[0]):
        getattr(case, name).requires_grad_()
    expected = case.to(torch.float64)
    sum(o.sum() for o in bench.fused(case, OPS[0])).backward()
    sum(o.sum() for o in bench.oracle(expected, OPS[0])).backward()
    for name in bench.used(case, OPS[0]):
        grad = getattr(case, name).grad.cpu().double()
        torch.testing.assert_close(grad, getattr(expected, name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output(bench, device, output) -> None:
    """The other output's gradient does not exist, and is not read as zeros from nowhere."""
    case = bench.make_case(device)
    names = bench.used(case, OPS[0])
    for name in names:
        getattr(case, name).requires_grad_()
    expected = case.to(torch.float64)
    weight = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(3)).to(device)
    grads, exact = (
        torch.autograd.grad(
            (run(c, OPS[0])[output] * weight.to(c.x)).sum(),
            [getattr(c, name) for name in names],
            allow_unused=True,
        )
        for run, c in ((bench.fused, case), (bench.oracle, expected))
    )
    for name, grad, wanted in zip(names, grads, exact):
        assert (grad is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(grad.cpu().double(), wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_switched_off_is_not_read(bench, device) -> None:
    """nan in the branch and inf in the gate of a stream that sits the branch out change neither outputs nor
    gradients, its own included: they are 0."""
    case = bench.make_case(device, samples=None)
    clean = dataclasses.replace(case, branch=case.branch.clone(), gate=case.gate.clone())
    assert case.stream_scale[1] == 0
    case.branch[1], case.gate = float("nan"), case.gate.clone()
    case.gate[1] = float("inf")
    grads = [torch.randn_like(case.x), torch.randn_like(case.x)]
    for op in (OPS[0], OPS[2]):
        for c in (case, clean):
            for name in bench.used(c, op):
                setattr(c, name, getattr(c, name).detach().requires_grad_())
        found, wanted = (bench.results(c, op, bench.fused, grads) for c in (case, clean))
        for name in found:
            assert found[name].isfinite().all(), name
            assert torch.equal(found[name], wanted[name]), name
        for name in ("dbranch", "dgate", "dstream_scale"):
            assert not found[name][1].any(), name
            assert found[name][0].any(), name
    assert torch.equal(bench.fused(case, OPS[2])[0][1], case.x[1])


def test_offsets_beyond_32_bits(device) -> None:
    """Sequences 2^31 elements and more apart, in memory of which only a few pages are ever touched."""
    far, width = 2**31 + 512, 16
    memory = mmap.mmap(-1, 2 * (far + width))
    x = torch.frombuffer(memory, dtype=torch.float16).as_strided((2, 2, width), (far - width, width, 1))
    x.copy_(torch.randn(2, 2, width))
    m = torch.randn(2, width)
    torch.testing.assert_close(
        kernels.forward(x, x, m, m, m, *[None] * 5, 1e-6, "layer")[0],
        kernels.forward(x.clone(), x.clone(), m, m, m, *[None] * 5, 1e-6, "layer")[0],
        rtol=0,
        atol=0,
    )
    assert x[1].abs().max() > 0.5


@pytest.mark.parametrize("width", [64, 24, 1])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "dtype, mean, deviation",
    [
        (torch.float16, 3, 0.01),
        (torch.float16, 10, 0.003),
        (torch.float16, 100, 1.0),
        (torch.bfloat16, 3, 0.01),
        (torch.bfloat16, 100, 1.0),
    ],
)
def test_rows_whose_mean_is_large(bench, device, width, norm, dtype, mean, deviation) -> None:
    """The statistics are those of the x' that is stored: gradients err at most twice as much as plain PyTorch's.

    With statistics of the unrounded x' the gradient of x was off by up to a hundredfold."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, width)] * 2 + [(2, width)] * 3
    x, branch, gate, shift, scale = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = [mean + deviation * x, deviation * branch, 0.37 + 0 * gate, shift, scale]
    inputs = [value.to(device, dtype) for value in inputs]
    upstream = [torch.randn(2, 5, width, generator=generator).to(device, dtype) for _ in range(2)]

    def plain(*leaves):
        return bench.plain(bench.Case(*leaves, norm=norm), OPS[0])

    def oracle(*leaves):
        return bench.oracle(bench.Case(*leaves, norm=norm), OPS[0])

    def results(function, dtype):
        leaves = [value.to(dtype).requires_grad_() for value in inputs]
        outputs = function(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [value.to(dtype) for value in upstream])]

    exact = results(oracle, torch.float64)
    ours = results(lambda *leaves: ops.gated_residual_norm(*leaves, eps=bench.EPS, norm=norm), dtype)
    # The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
    allowed = 4 if bench.INTERPRETED and dtype == torch.bfloat16 else 2
    for mine, its, value in zip(ours, results(plain, dtype), exact, strict=True):
        error, other = ((result.double() - value).norm() for result in (mine, its))
        assert error <= allowed * other + 4 * torch.finfo(dtype).eps * value.norm() + 1e-9


@pytest.mark.parametrize("row", [-1, 2, 10**12])
def test_a_modulation_row_that_does_not_exist_gives_nan(bench, device, row, monkeypatch) -> None:
    """On a GPU. On the CPU the op raises before the kernel runs (tests/ops), so its check is taken out here."""
    monkeypatch.setattr("agrepa_fast.ops.residual._check_rows", lambda sample_index, rows: None)
    case = bench.make_case(device)
    case.sample_index = torch.tensor([0, row, 1], device=device)
    case.stream_scale = None
    x_new, h = bench.fused(case, OPS[0])
    for value in (x_new, h, *bench.fused(case, OPS[1]), *bench.fused(case, OPS[2])):
        assert value[1].isnan().all()
        assert value[[0, 2]].isfinite().all()


def test_inputs_are_left_alone_and_outputs_are_fresh(bench, device) -> None:
    case = bench.make_case(device)
    before = {name: value.clone() for name, value in case.floating().items()}
    outputs = [*bench.fused(case, OPS[0]), *bench.fused(case, OPS[1]), *bench.fused(case, OPS[2])]
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name
    inputs = {value.untyped_storage().data_ptr() for value in case.floating().values()}
    assert inputs.isdisjoint(value.untyped_storage().data_ptr() for value in outputs)
    assert all(value.is_contiguous() for value in outputs)


def test_the_same_bits_every_time(bench, device, small_launches) -> None:
    case = bench.make_case(device, 24, frames=11, dtype=torch.bfloat16)
    for name in bench.used(case, OPS[0]):
        getattr(case, name).requires_grad_()
    grads = [torch.randn_like(case.x), torch.randn_like(case.x)]
    first, second = (bench.results(case, OPS[0], bench.fused, grads) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("per_token", ["", "gate, scale"])
def test_gradcheck(bench, device, per_token) -> None:
    """Finite differences in float64, all gradients of all ops at once; streams between 0 and 1 and below 0."""
    case = bench.make_case(
        device,
        5,
        sequences=2,
        frames=2,
        samples=1,
        streams=False,
        dtype=torch.float64,
        per_token=per_token,
        affine=True,
    )
    s = torch.tensor([0.7, -1.3], device=device, dtype=torch.float64)

    names = ("x", "branch", "gate", "shift", "scale", "weight", "bias", "stream_scale")

    def chain(*values):
        c = dataclasses.replace(case, **dict(zip(names, values)))
        x_new, c.x = bench.fused(c, OPS[0])
        c.norm = "rms"
        c.branch = bench.fused(c, OPS[1])[0]
        c.x, c.branch = bench.fused(c, OPS[0])
        return x_new, bench.fused(c, OPS[2])[0]

    case.stream_scale = s
    inputs = [getattr(case, name).clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(chain, inputs, fast_mode=True)


def test_a_second_gradient_is_refused(bench, device) -> None:
    case = bench.make_case(device)
    case.x.requires_grad_()
    value = bench.fused(case, OPS[1])[0].square().sum()
    with pytest.raises(RuntimeError, match="gradient of their gradient"):
        torch.autograd.grad(value, case.x, create_graph=True)


def test_wider_than_the_tables_falls_back(bench, device) -> None:
    """No kernel for such rows: `auto` takes the reference, the kernel itself refuses."""
    x = torch.randn(1, 1, 8193, device=device)
    m = torch.randn(1, 8193, device=device)
    torch.testing.assert_close(ops.layer_norm_modulate(x, m, m), reference.layer_norm_modulate(x, m, m))
    with pytest.raises(ValueError, match="8193"):
        kernels.forward(x, None, None, m, m, *[None] * 5, 1e-6, "layer")
