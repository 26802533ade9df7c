"""The gate refuses seeded wrong implementations, and then no speed-up is claimed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agrepa_fast.bench import cli
from agrepa_fast.bench.case import Problem, Provider, Setup, Unavailable
from agrepa_fast.bench.cases import residual
from agrepa_fast.bench.gate import check, relative_error
from agrepa_fast.bench.results import validate
from agrepa_fast.bench.runner import run_problem

CPU = torch.device("cpu")
ROOFLINE = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}}

Op = Callable[..., tuple[Tensor, Tensor]]


def _plain(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Any:
    x = x + gate.unsqueeze(1) * branch
    return x, _normed(x, eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _normed(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def _no_mean(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Any:
    x = x + gate.unsqueeze(1) * branch
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x, normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _wrong_row(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Any:
    return _plain(x, branch, gate, shift, scale.roll(1, 0), eps=eps)


def _gate_ignored(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Any:
    return _plain(x, branch, 1 + 0 * gate, shift, scale, eps=eps)


def _eps_wrong(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Any:
    return _plain(x, branch, gate, shift, scale, eps=1e-4)


def _not_written(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Any:
    x, h = _plain(x, branch, gate, shift, scale, eps=eps)
    return x, h.masked_fill(torch.arange(h.shape[-1]) == 3, torch.nan)


def _problem(mode: str) -> Problem:
    found = [p for p in residual.problems("toy", CPU) if p.params["mode"] == mode]
    return next(p for p in found if p.params["op"] == "gated_residual_norm")


def _without_compile(problem: Problem) -> Problem:
    """The problem without the compiled rival, to be quick."""

    def build(device: torch.device) -> Setup:
        setup = problem.build(device)
        kept = tuple(p for p in setup.providers if p.name in ("ours", "eager"))
        return Setup(kept, setup.reference, setup.bounds, setup.expression)

    return Problem(problem.params, problem.dtype, problem.bytes, problem.flops, build)


@pytest.mark.parametrize("wrong", [_no_mean, _wrong_row, _gate_ignored, _eps_wrong, _not_written])
@pytest.mark.parametrize("mode", ["forward", "both"])
def test_a_wrong_op_gets_no_speedup(wrong: Op, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agrepa_fast.ops.gated_residual_norm", wrong)
    entry = run_problem("residual", _without_compile(_problem(mode)), CPU, "toy", ROOFLINE)
    assert not entry["gate"]["passed"]
    rows = {row["provider"]: row for row in entry["rows"]}
    assert rows["ours"]["status"] == "wrong"
    assert rows["ours"]["median_us"] is None
    assert rows["eager"]["status"] == "ok"
    assert rows["eager"]["median_us"] > 0
    assert [row["speedup"] for row in entry["rows"]] == [None] * 4
    assert [row["verdict"] for row in entry["rows"]] == [None] * 4


def test_a_right_op_written_otherwise_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agrepa_fast.ops.gated_residual_norm", _plain)
    entry = run_problem("residual", _without_compile(_problem("both")), CPU, "toy", ROOFLINE)
    assert entry["gate"] == {"passed": True, "reason": None}
    assert next(row for row in entry["rows"] if row["provider"] == "eager")["speedup"] > 0


def test_the_command_line_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agrepa_fast.ops.layer_norm_modulate", lambda x, shift, scale, **_: x + shift.unsqueeze(1))
    only = "op=layer_norm_modulate mode=forward"
    arguments = ["run", "residual", "--toy", "--device", "cpu", "--only", only, "--out", str(tmp_path / "r.json")]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().out
    assert "REFUSED" in said
    assert "win" not in said
    assert "x tie" not in said


def _fake(providers: tuple[Provider, ...]) -> Problem:
    right = torch.arange(1.0, 5.0)
    return Problem({"n": 4}, "float32", 32, 4, lambda device: Setup(providers, lambda: (right.double(),), {"y": 1e-6}))


def test_rivals_may_be_wrong_broken_or_absent() -> None:
    right = torch.arange(1.0, 5.0)

    def absent() -> Any:
        raise Unavailable("nosuch is not installed")

    def broken() -> Any:
        raise RuntimeError("out of memory\nsecond line")

    problem = _fake(
        (
            Provider("ours", "ours", lambda: lambda: (right.clone(),)),
            Provider("wrong", "rival", lambda: lambda: (right * 1.01,)),
            Provider("absent", "rival", absent),
            Provider("broken", "rival", broken),
        )
    )
    entry = run_problem("fake", problem, CPU, "toy", ROOFLINE)
    rows = {row["provider"]: row for row in entry["rows"]}
    assert entry["gate"]["passed"]
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["speedup"] is None
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("unavailable", "nosuch is not installed")
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "RuntimeError: out of memory")
    assert rows["ours again"]["median_us"] > 0


def test_speedup_and_rates_follow_from_the_medians() -> None:
    right = torch.arange(1.0, 5.0)

    def lasting(n: int) -> Any:
        def run() -> tuple[Tensor]:
            for _ in range(n):
                torch.rand(20_000).sort()
            return (right.clone(),)

        return run

    providers = (
        Provider("ours", "ours", lambda: lasting(1)),
        Provider("slow", "rival", lambda: lasting(20)),
    )
    rows = {r["provider"]: r for r in run_problem("fake", _fake(providers), CPU, "toy", ROOFLINE)["rows"]}
    assert rows["slow"]["speedup"] == rows["slow"]["median_us"] / rows["ours"]["median_us"]
    assert rows["slow"]["speedup"] > 3
    seconds = rows["ours"]["median_us"] * 1e-6
    assert rows["ours"]["gb_per_s"] == pytest.approx(32 / seconds / 1e9)
    assert rows["ours"]["tflop_per_s"] == pytest.approx(4 / seconds / 1e12)
    # 32 B at 10 GB/s take longer than 4 operations at 100 GFLOP/s.
    assert rows["ours"]["bound_by"] == "copy"
    # The limit is the copy of the same bytes, timed beside, and not the rate of a large one.
    copied = rows["copy of the same bytes"]
    assert rows["ours"]["roofline_share"] == pytest.approx(copied["median_us"] / rows["ours"]["median_us"])
    assert copied["roofline_share"] == pytest.approx(1)
    assert copied["speedup"] is None


def test_check_holds_ours_to_twice_the_expressions_error() -> None:
    reference = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expression = reference + 1e-5 * noise
    wide = {"y": 1e-3}
    assert check((reference + 1.9e-5 * noise,), (reference,), wide, (expression,)).passed
    refused = check((reference + 2.1e-5 * noise,), (reference,), wide, (expression,))
    assert not refused.passed
    assert refused.reason is not None
    assert refused.reason.startswith("y: relative error")
    assert check((reference + 2.1e-5 * noise,), (reference,), wide).passed


def test_check_names_what_does_not_fit() -> None:
    y = torch.ones(3)
    assert check((y,), (y,), {"a": 1e-6, "b": 1e-6}).reason == "1 outputs, expected 2: a, b"
    assert check((torch.ones(2),), (y,), {"a": 1e-6}).reason == "a: shape [2], expected [3]"
    assert check((torch.tensor([1.0, 1.0, torch.inf]),), (y,), {"a": 1e-6}).reason == "a: not finite"
    assert check((y * 1.1,), (y,), {"a": 1e-6}).reason == "a: relative error 1.00e-01, allowed 1e-06"


def test_relative_error_of_a_zero_reference_is_absolute() -> None:
    assert relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 0.5
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)


def test_exactly_one_provider_is_ours() -> None:
    twice = tuple(Provider(name, "ours", lambda: lambda: (torch.ones(1),)) for name in ("a", "b"))
    with pytest.raises(ValueError, match="one with the role 'ours', got \\['a', 'b'\\]"):
        run_problem("fake", _fake(twice), CPU, "toy", ROOFLINE)


def test_validate_accepts_a_refused_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("agrepa_fast.ops.gated_residual_norm", _no_mean)
    result = cli.run({"residual": [_without_compile(_problem("forward"))]}, CPU, "toy", tmp_path / "r.json")
    validate(result)
    assert result["noise_floor"] is None
