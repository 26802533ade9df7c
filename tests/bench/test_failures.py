"""What a run that fails midway leaves: a failing device, an interrupt, too little memory, missing packages."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agrepa_fast.bench import cli, deadline, gated, protocol, results, runner
from agrepa_fast.bench.case import Problem, Provider, Setup
from agrepa_fast.bench.protocol import CaptureFailed, DeviceFailed
from agrepa_fast.errors import UserError

CPU = torch.device("cpu")
ROOFLINE = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}}
RIGHT = torch.arange(1.0, 5.0)
ILLEGAL = "CUDA error: an illegal memory access was encountered"


def right() -> tuple[torch.Tensor]:
    return (RIGHT.clone(),)


def problem(key: int, *rivals: Provider, ours: Any = lambda: right, alone: bool = False) -> Problem:
    setup = Setup((Provider("ours", "ours", ours), *rivals), lambda: (RIGHT.double(),), {"y": 1e-6})
    return Problem({"n": key}, "float32", None, None, lambda device: setup, alone=alone)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device that works until `error` says why not."""
    state = SimpleNamespace(error=None)
    monkeypatch.setattr(protocol, "device_error", lambda device: state.error)
    monkeypatch.setattr(cli, "device_error", lambda device: state.error)
    return state


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch, device: SimpleNamespace) -> list[list[str]]:
    """The arguments of the processes that replace this one; their device works again."""
    started: list[list[str]] = []

    def execv(_: str, arguments: list[str]) -> None:
        started.append(arguments[3:])
        device.error = None
        raise SystemExit

    monkeypatch.setattr("os.execv", execv)
    return started


def to_the_end(command: list[str], restarts: list[list[str]]) -> int:
    """Run the command and its replacements."""
    while True:
        count = len(restarts)
        try:
            return cli.main(command)
        except SystemExit:
            assert len(restarts) == count + 1 <= 5
            command = restarts[-1]


def broken(device: SimpleNamespace) -> Callable[[], Any]:
    def make() -> Any:
        device.error = ILLEGAL
        raise RuntimeError(f"{ILLEGAL}\nsearch for cudaErrorIllegalAddress")

    return make


@pytest.mark.parametrize("name", ["rival", "ours"])
def test_a_provider_that_makes_the_device_fail_costs_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: SimpleNamespace, restarts: list[list[str]]
) -> None:
    """Every later call of its process would fail. It is not tried again, though its capture is not to blame."""
    made: list[str] = []

    def make(of: str, good: Callable[[], Any]) -> Callable[[], Any]:
        def build() -> Any:
            made.append(of)
            return broken(device)() if of == name else good()

        return build

    rivals = [Provider(of, "rival", make(of, lambda: right), capturable=True) for of in ("rival", "other")]
    ours = make("ours", lambda: right)
    monkeypatch.setattr(cli.CASES["demo"], "problems", lambda *_: [problem(1, *rivals, ours=ours), problem(2)])
    out = tmp_path / "r.json"
    code = to_the_end(["run", "demo", "--toy", "--device", "cpu", "--out", str(out)], restarts)
    assert code == (name == "ours")
    assert made.count(name) == 1
    first, second = results.read(out)["problems"]
    rows = {row["provider"]: row for row in first["rows"]}
    assert second["gate"]["passed"]
    assert rows["other"]["median_us"] is not None
    assert rows[name]["status"] == "failed"
    assert f"{name} has made the device fail: {ILLEGAL}" in rows[name]["reason"]
    assert first["gate"]["passed"] == (name == "rival")


def test_a_problem_that_makes_the_device_fail_before_any_provider_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: SimpleNamespace, restarts: list[list[str]]
) -> None:
    bad = Problem({"n": 1}, "float32", None, None, lambda _: broken(device)())
    monkeypatch.setattr(cli.CASES["demo"], "problems", lambda *_: [bad, problem(2)])
    out = tmp_path / "r.json"
    assert to_the_end(["run", "demo", "--toy", "--device", "cpu", "--out", str(out)], restarts) == 0
    assert len(restarts) == 1
    result = results.read(out)
    assert [entry["key"] for entry in result["problems"]] == ["n=2"]
    assert result["skipped"] == [{"case": "demo", "key": "n=1", "reason": f"RuntimeError: {ILLEGAL}"}]


def test_a_failure_of_the_device_while_timing_names_the_provider(device: SimpleNamespace) -> None:
    def run() -> list[float]:
        raise RuntimeError(ILLEGAL)

    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        protocol._blaming("rival", run, CPU)()  # the device works: the problem fails, and not the process
    device.error = ILLEGAL
    with pytest.raises(DeviceFailed, match=r"^rival has made the device fail: CUDA error") as caught:
        protocol._blaming("rival", run, CPU)()
    assert caught.value.name == "rival"


def test_events_that_cannot_be_read_bar_the_capture_alone(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, device: SimpleNamespace
) -> None:
    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            raise RuntimeError("invalid resource handle")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(cuda.default, "synchronize", lambda: None, raising=False)
    monkeypatch.setattr(protocol.ColdCache, "__init__", lambda self, device: setattr(self, "device", device))
    monkeypatch.setattr(protocol.ColdCache, "__call__", lambda self: None)
    with pytest.raises(CaptureFailed, match="the events of its replay cannot be read: invalid resource handle"):
        protocol._graph("ours", right, protocol.ColdCache(torch.device("cuda", 0)))


@pytest.mark.parametrize("alone", [False, True])
def test_an_interrupt_leaves_what_was_measured(
    alone: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file and on the screen, in a line; the problem is run again by a later process."""

    def stop() -> Any:
        raise KeyboardInterrupt

    providers = (Provider("quick", "rival", lambda: right), Provider("late", "rival", stop))
    problems = [problem(1), problem(2, *providers, alone=alone)]
    out = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        cli.run({"demo": problems}, CPU, "toy", out)
    result = results.read(out)
    assert [entry["key"] for entry in result["problems"]] == ["n=1"]
    [item] = result["skipped"]
    assert item["key"] == "n=2"
    measured = r"ours [\d.]+ µs, quick [\d.]+ µs" if alone else "nothing"
    assert re.fullmatch(rf"cut short after \d s; measured until then: {measured}", item["reason"])
    assert f"demo n=2: {item['reason']}" in capsys.readouterr().out
    again = cli.run({"demo": [problem(1), problem(2)]}, CPU, "toy", out, resumed=result)
    assert [entry["key"] for entry in again["problems"]] == ["n=1", "n=2"]
    assert again["skipped"] == []


def test_the_file_has_each_problem_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    out, seen = tmp_path / "r.json", []

    def looks(key: int) -> Problem:
        def make() -> Any:
            seen.append([entry["key"] for entry in results.read(out)["problems"]])
            return right

        return problem(key, Provider("looks", "rival", make))

    cli.run({"demo": [looks(1), looks(2), looks(3)]}, CPU, "toy", out)
    assert seen == [[], ["n=1"], ["n=1", "n=2"]]


def test_memory_that_runs_out_while_a_provider_is_timed_is_its_result() -> None:
    """Its first call, in the gate, has fitted; the others are compared all the same."""

    def make() -> Callable[[], Any]:
        calls = []

        def call() -> Any:
            calls.append(1)
            if len(calls) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
            return right()

        return call

    rivals = (Provider("hungry", "rival", make), Provider("modest", "rival", lambda: right))
    entry = runner.run_problem("demo", problem(1, *rivals, alone=True), CPU, "toy", ROOFLINE)
    rows = {row["provider"]: row for row in entry["rows"]}
    assert rows["hungry"]["status"] == "out of memory"
    assert rows["hungry"]["reason"] == "CUDA out of memory. Tried to allocate 9 GiB."
    assert rows["hungry"]["median_us"] is None
    assert rows["modest"]["speedup"] is not None


def test_launches_are_counted_when_all_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's profiler stays attached to CUDA, and what is timed after it takes longer."""
    order: list[str] = []
    monkeypatch.setattr(protocol, "launches", lambda call, device: order.append("profiled") or len(call()))
    failing = Provider("fails", "rival", lambda: (_ for _ in ()).throw(ValueError("no")))
    given = problem(1, Provider("rival", "rival", lambda: right), failing, alone=True)
    entry = runner.run_problem("demo", given, CPU, "toy", ROOFLINE)
    assert order == []
    runner.count_launches(entry, given, CPU)
    rows = {row["provider"]: row["launches"] for row in entry["rows"]}
    assert rows == {"ours": 1, "rival": 1, "fails": None, gated.AGAIN: None}
    runner.count_launches(entry, given, CPU)
    assert order == ["profiled"] * 2  # what is counted already is not counted again


def test_a_limit_that_a_build_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a destructor is only printed, and the build would go on without a limit."""
    monkeypatch.setattr(deadline, "RING_AGAIN", 0.1)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    class Swallows:
        def __del__(self) -> None:
            time.sleep(5)

    def build() -> None:
        Swallows()
        time.sleep(5)

    began = time.monotonic()
    with deadline.Deadline(0.1).enforced(), pytest.raises(deadline.OutOfTime):
        build()
    assert time.monotonic() - began < 4


def test_what_is_left_of_the_budget_limits_the_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the last problem that is begun would run past the end, and lose its rows."""
    given: list[float | None] = []
    entry = runner.run_problem("demo", problem(1), CPU, "toy", ROOFLINE)

    def measured(case: str, of: Problem, *rest: Any) -> dict[str, Any]:
        given.append(rest[-1])
        return entry | {"key": of.key}

    monkeypatch.setattr(cli, "run_problem", measured)
    monkeypatch.setattr(cli, "seconds_for", lambda *_: 45.0)
    cli.run({"demo": [problem(1)]}, CPU, "toy", tmp_path / "r.json", budget=10.0)
    cli.run({"demo": [problem(1)]}, CPU, "toy", tmp_path / "r.json", budget=100.0)
    cli.run({"demo": [problem(1)]}, CPU, "toy", tmp_path / "r.json")
    assert given[0] is not None
    assert 1.0 <= given[0] <= 10.0
    assert given[1:] == [45.0, 45.0]


def test_a_case_whose_package_is_missing_is_left_out_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> Any:
        raise UserError("PyYAML is not installed: pip install it")

    kept = {"demo": SimpleNamespace(TITLE="A demo", problems=lambda *_: [problem(1)])}
    kept["trainer"] = SimpleNamespace(TITLE="The trainer", problems=missing)
    for module in (cli, sys.modules["agrepa_fast.bench.cases"]):
        monkeypatch.setattr(module, "CASES", kept)
    out = tmp_path / "r.json"
    assert cli.main(["run", "all", "--toy", "--device", "cpu", "--out", str(out)]) == 0
    result = results.read(out)
    assert [entry["key"] for entry in result["problems"]] == ["n=1"]
    assert [item["reason"] for item in result["skipped"]] == ["PyYAML is not installed: pip install it"]
    assert cli.main(["list", "--device", "cpu"]) == 0
    assert "trainer: PyYAML is not installed: pip install it" in capsys.readouterr().out
    assert cli.main(["run", "trainer", "--toy", "--device", "cpu", "--out", str(out)]) == 2
