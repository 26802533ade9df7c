"""The schema refuses what does not fit, naming the place; compare tells a change from noise; names and numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agrepa_fast.bench import cli, environment, results, tables
from agrepa_fast.bench.figures import exponent
from agrepa_fast.bench.roofline import bound, measure_roofline
from agrepa_fast.bench.targets import Target, over
from agrepa_fast.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def good(make: SimpleNamespace) -> dict[str, Any]:
    rows = (make.row("ours", "ours", 100.0), make.row("SDPA loop", "rival", 190.0, 1.9, "win"))
    return make.result(make.problem("foga", {"layers": 12}, 0.02, *rows))


def test_a_good_result_passes_and_comes_back(good: dict[str, Any], tmp_path: Path) -> None:
    results.write(tmp_path / "r.json", good)
    assert results.read(tmp_path / "r.json") == good
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("roofline"), "result: 'roofline' is missing"),
        (lambda r: r.update(schema=2), "result.schema: expected 1, got 2"),
        (lambda r: r.update(extra=1), "result: unknown key 'extra'"),
        (
            lambda r: r["problems"][0].update(flops=1.5),
            "result.problems\\[0\\].flops: expected integer or null, got 1.5",
        ),
        (lambda r: r["problems"][0].update(noise_floor=True), "noise_floor: expected number or null, got True"),
        (lambda r: r["problems"][0]["rows"][1].update(verdict="great"), "rows\\[1\\].verdict: expected one of"),
        (lambda r: r["problems"][0]["rows"][0].update(median_us=0), "rows\\[0\\].median_us: 0 is too small"),
        (lambda r: r["problems"][0]["rows"][0].update(median_us=float("nan")), "median_us: expected a finite number"),
        (lambda r: r["environment"]["git"].pop("dirty"), "result.environment.git: 'dirty' is missing"),
        (lambda r: r["environment"]["packages"].update(torch=2), "packages.torch: expected string or null, got 2"),
    ],
)
def test_the_schema_refuses(good: dict[str, Any], change: Any, message: str, tmp_path: Path) -> None:
    broken = copy.deepcopy(good)
    change(broken)
    with pytest.raises(UserError, match=message):
        results.validate(broken)
    (tmp_path / "r.json").write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(UserError, match=r"r\.json: "):
        results.read(tmp_path / "r.json")


def test_a_broken_result_is_not_written(good: dict[str, Any], tmp_path: Path) -> None:
    results.write(tmp_path / "r.json", good)
    with pytest.raises(UserError):
        results.write(tmp_path / "r.json", {**good, "schema": 0})
    assert results.read(tmp_path / "r.json") == good


def test_compare(
    good: dict[str, Any], make: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = copy.deepcopy(good)
    own, rival = after["problems"][0]["rows"]
    own["median_us"], rival["median_us"] = 50.0, 193.0
    after["environment"]["packages"]["torch"] = "9.9"
    after["problems"].append(make.problem("foga", {"layers": 24}, 0.02, make.row("ours", "ours", 1.0)))
    for name, content in (("a", good), ("b", after)):
        results.write(tmp_path / f"{name}.json", content)
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    said = capsys.readouterr().out
    assert "| foga layers=12 | ours | 100 µs | 50.0 µs | 2.00x | 2.0% | faster |" in said
    assert "| foga layers=12 | SDPA loop | 190 µs | 193 µs | 0.98x | 2.0% | same |" in said
    assert "packages differs: torch " in said
    assert "-> 9.9" in said
    assert "only after: foga layers=24" in said
    assert "1 faster, 0 slower, 1 same" in said


@pytest.mark.parametrize(("after", "word"), [(90.0, "faster"), (98.5, "same"), (101.5, "same"), (103.0, "slower")])
def test_change_is_told_from_noise(after: float, word: str) -> None:
    assert tables.change({"median_us": 100.0}, {"median_us": after}, 0.02) == word


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(1.234, "1.23 µs"), (12.34, "12.3 µs"), (123.4, "123 µs"), (4567.0, "4.57 ms"), (2e6, "2.00 s")],
)
def test_duration(microseconds: float, text: str) -> None:
    assert tables.duration(microseconds) == text


def test_refused_problem_shows_no_speedup(good: dict[str, Any]) -> None:
    refused = copy.deepcopy(good["problems"][0])
    refused["gate"] = {"passed": False, "reason": "h: relative error 1e-1, allowed 1e-6"}
    refused["noise_floor"] = None
    refused["rows"][0] |= {"status": "wrong", "reason": "h: relative error", "median_us": None}
    refused["rows"][1] |= {"speedup": None, "verdict": None}
    said = tables.problem_table(refused)
    assert "REFUSED, no speed-up is claimed: h: relative error 1e-1" in said
    assert "wrong: h: relative error" in said
    assert "x win" not in said


def test_replayed_rows_have_a_second_table_of_eager_calls(make: SimpleNamespace) -> None:
    own, rival = make.row("ours", "ours", 10.0), make.row("compiled", "rival", 20.0, 2.0, "win")
    copy_ = make.row("copy of the same bytes", "copy", 9.0)
    problem = make.problem("residual", {"n": 1}, 0.02, own, rival, copy_)
    assert "Launched eagerly" not in tables.problem_table(problem)
    for row, eager in ((own, 40.0), (rival, 50.0), (copy_, 12.0)):
        row |= {"timer": "graph", "eager_us": eager, "launches": 1, "host_us": 30.0}
    said = tables.problem_table(problem).partition("Launched eagerly:")[2].splitlines()
    assert [line.split() for line in said[2:]] == [
        ["ours", "40.0", "µs", "1", "30.0", "µs"],
        ["compiled", "50.0", "µs", "1.25x", "1", "30.0", "µs"],
        ["copy", "of", "the", "same", "bytes", "12.0", "µs", "1", "30.0", "µs"],
    ]
    results.validate(make.result(problem))


def test_exponent() -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert exponent([2, 8], [10, 20]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least two different ones"):
        exponent([4, 4], [1, 2])


def test_bound_is_the_slower_of_copy_and_matmul() -> None:
    limit = {"copy_bytes_per_s": 100.0, "matmul_flops_per_s": {"float32": 1000.0, "bfloat16": 4000.0}}
    assert bound(1000, 50, limit, "float32") == (1.0, "matmul")
    assert bound(1000, 50, limit, "bfloat16") == (0.5, "copy")
    assert bound(4000, 50, limit, "bfloat16") == (1.0, "matmul")


def test_roofline_is_plausible() -> None:
    limit = measure_roofline(CPU, "toy")
    rate = limit["matmul_flops_per_s"]["float32"]
    assert 1e7 < limit["copy_bytes_per_s"] < 1e13
    assert 1e7 < rate < 1e14
    assert limit["ridge_flops_per_byte"]["float32"] == pytest.approx(rate / limit["copy_bytes_per_s"])


def test_targets_take_the_worst_problem_and_only_their_device(good: dict[str, Any]) -> None:
    target = Target("cpu", "FoG-A", ">= 1.85x", "foga", 1.85, over("SDPA loop"), {"layers": 12})
    assert target.verdict([good]) == ("1.9", "met")
    worse = copy.deepcopy(good)
    worse["problems"][0]["rows"][1]["speedup"] = 1.5
    assert target.verdict([good, worse]) == ("1.5", "not met")
    refused = copy.deepcopy(worse)
    refused["problems"][0]["gate"]["passed"] = False
    assert target.verdict([refused]) == ("not yet measured", "")
    on_gpu = Target("cuda", "FoG-A", ">= 20x", "foga", 20, over("SDPA loop"))
    assert on_gpu.verdict([good]) == ("not yet measured", "")


def test_environment_says_what_runs() -> None:
    found = environment.environment(CPU)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or found["packages"]["torch"]
    assert found["packages"]["numpy"] is not None
    assert found["device_type"] == "cpu"
    assert str(torch.get_num_threads()) in found["device"]
    assert found["driver"] is None


def test_revision_of_no_repository(tmp_path: Path) -> None:
    assert environment.revision(tmp_path) == {"revision": None, "dirty": None}
    assert environment.revision(None) == {"revision": None, "dirty": None}
