"""Problems whose providers are in memory one at a time, out of memory, and the time limit on building rivals."""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import Any, ClassVar

import pytest
import torch

from agrepa_fast.bench import cli, deadline, protocol
from agrepa_fast.bench.case import Problem, Provider, Setup
from agrepa_fast.bench.headlines import HEADLINES, seconds_for
from agrepa_fast.bench.runner import run_problem

CPU = torch.device("cpu")
ROOFLINE = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}}
RIGHT = torch.arange(1.0, 5.0)


class Call:
    """A right answer that takes a while; the living ones are counted."""

    living: ClassVar[weakref.WeakSet[Call]] = weakref.WeakSet()

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        Call.living.add(self)

    def __call__(self) -> tuple[torch.Tensor]:
        time.sleep(self.seconds)
        return (RIGHT.clone(),)


def problem(*rivals: Provider, alone: bool = False, ours: Any = Call) -> Problem:
    setup = Setup((Provider("ours", "ours", ours), *rivals), lambda: (RIGHT.double(),), {"y": 1e-6})
    return Problem({"n": 4}, "float32", None, None, lambda device: setup, alone=alone)


def rows_of(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in entry["rows"]}


def test_alone_one_provider_is_in_memory_at_a_time_and_each_is_built_twice() -> None:
    built: list[tuple[str, int]] = []

    def make(name: str) -> Provider:
        def build() -> Call:
            built.append((name, len(Call.living)))
            return Call()

        return Provider(name, "ours" if name == "ours" else "rival", build)

    ours = make("ours")
    entry = run_problem("fake", problem(make("a"), make("b"), alone=True, ours=ours.make), CPU, "toy", ROOFLINE)
    assert [name for name, _ in built] == ["ours", "a", "b", "ours", "ours", "b", "a", "ours"]
    assert [living for _, living in built] == [0] * 8
    rows = rows_of(entry)
    assert entry["gate"]["passed"]
    assert rows["a"]["speedup"] is not None
    assert rows["a"]["samples"] == rows["ours"]["samples"] == 2


def test_alone_ours_and_ours_again_are_paired_whatever_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rounds fit is measured anew for each."""
    counts = iter([5, 4, 3, 2, 7, 6, 5, 4])

    def measure(variants: Any, *_: Any) -> dict[str, protocol.Timing]:
        return {name: protocol.Timing((1.0,) * next(counts), 1, "perf_counter") for name in variants}

    monkeypatch.setattr(protocol, "measure", measure)
    entry = run_problem("fake", problem(Provider("a", "rival", Call), alone=True), CPU, "toy", ROOFLINE)
    rows = rows_of(entry)
    assert rows["ours"]["samples"] == rows["ours again"]["samples"] == 2 * 2
    assert entry["noise_floor"] == 0.01


@pytest.mark.parametrize("alone", [False, True])
def test_out_of_memory_is_the_result_of_a_provider(alone: bool) -> None:
    def hungry() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 103 GiB.\nmore")

    rivals = (Provider("hungry", "rival", hungry), Provider("modest", "rival", Call))
    entry = run_problem("fake", problem(*rivals, alone=alone), CPU, "toy", ROOFLINE)
    rows = rows_of(entry)
    assert entry["gate"]["passed"]
    assert rows["hungry"]["status"] == "out of memory"
    assert rows["hungry"]["reason"] == "CUDA out of memory. Tried to allocate 103 GiB."
    assert rows["modest"]["speedup"] is not None


@pytest.mark.parametrize("alone", [False, True])
def test_a_rival_that_takes_too_long_to_build_is_given_up(alone: bool) -> None:
    """In the middle of its build; the ones behind it are not begun, and ours is built whatever it takes."""
    seen = []

    def endless() -> Any:
        seen.append("endless")
        try:
            time.sleep(60)
        except Exception:  # as a compiler would
            pytest.fail("the interruption is no Exception")

    def late() -> Call:
        seen.append("late")
        return Call()

    rivals = (Provider("endless", "rival", endless), Provider("late", "rival", late))
    began = time.monotonic()
    entry = run_problem("fake", problem(*rivals, alone=alone, ours=lambda: Call(0.15)), CPU, "toy", ROOFLINE, None, 5.0)
    assert time.monotonic() - began < 40
    rows = rows_of(entry)
    assert seen == ["endless"]
    assert entry["gate"]["passed"]
    for name in ("endless", "late"):
        assert rows[name]["status"] == "unavailable"
        assert rows[name]["reason"] == "not built in time: the 5 s of this problem were over"
        assert rows[name]["speedup"] is None


def test_a_capture_is_not_broken_off(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    with deadline.Deadline(0.05).enforced():
        recording = protocol.recorded("x", lambda: time.sleep(0.2), torch.device("cuda", 0))
    assert recording.output is None
    with pytest.raises(deadline.OutOfTime), deadline.Deadline(0.05).enforced():
        time.sleep(5)


def test_headlines_have_their_time_and_end_within_four_minutes() -> None:
    assert sum(headline.seconds for headline in HEADLINES) <= 225
    paper = {"scale": "paper", "batch": 4}
    assert seconds_for("foga", paper, "cuda") == HEADLINES[0].seconds
    assert seconds_for("foga", {"scale": "compact"}, "cuda") == 45
    assert seconds_for("foga", paper, "cpu") is None


def test_the_headlines_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def entry(case: str, given: Problem, *_: Any) -> dict[str, Any]:
        seen.append((case, given.key))
        raise RuntimeError("not here")

    monkeypatch.setattr(cli, "run_problem", entry)
    monkeypatch.setattr(cli, "pick_device", lambda name: CPU)
    monkeypatch.setattr(
        cli.CASES["foga"],
        "problems",
        lambda scale, device: [
            dataclasses.replace(problem(), params=p) for p in ({"scale": "compact"}, {"scale": "paper", "batch": 4})
        ],
    )
    assert cli.main(["run", "foga", "--headlines", "--out", str(tmp_path / "r.json"), "--toy"]) == 0
    assert seen == [("foga", "scale=paper batch=4")]
    assert "skipped foga scale=paper batch=4: RuntimeError: not here" in capsys.readouterr().out


def test_a_second_pass_is_left_out_when_half_the_time_is_over() -> None:
    built = []

    def rival() -> Call:
        built.append("rival")
        return Call(1.0)

    entry = run_problem("fake", problem(Provider("r", "rival", rival), alone=True), CPU, "toy", ROOFLINE, None, 6.0)
    assert built == ["rival"]
    assert entry["gate"]["passed"]
    assert rows_of(entry)["r"]["speedup"] > 1
