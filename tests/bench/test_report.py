"""Docs say what the stored results say, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from agrepa_fast.bench import figures, report
from agrepa_fast.bench.cli import main
from agrepa_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_docs_match_the_stored_results() -> None:
    outdated = [str(path.relative_to(ROOT)) for path in report.write_report(ROOT, check=True)]
    assert not outdated, f"run `agrepa bench report`: {', '.join(outdated)}"


def test_there_are_stored_results() -> None:
    assert any(r["environment"]["device_type"] == "cpu" and r["complete"] for r in report.load(ROOT).values())


def _scaling(make: SimpleNamespace) -> list[dict]:
    return [
        make.problem(
            "scaling",
            {"axis": "layers", "size": size, "layers": size},
            0.02,
            make.row("ours", "ours", 10.0 * size**2) | {"peak_bytes": 1000 * size},
            make.row("SDPA loop", "rival", 20.0 * size**2, 2.0, "win"),
        )
        for size in (2, 4, 8)
    ]


@pytest.fixture
def checkout(tmp_path: Path, make: SimpleNamespace) -> Path:
    """A checkout with one result and two documents."""
    slow = make.problem(
        "foga",
        {"layers": 12, "scale": "compact"},
        0.02,
        make.row("ours", "ours", 100.0) | {"roofline_share": 0.5, "error": 1e-7},
        make.row("SDPA loop", "rival", 80.0, 0.8, "loss"),
        make.row("released loop", "published", 101.0, 1.01, "tie"),
    )
    stored = tmp_path / "bench" / "results" / "cpu-x.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(make.result(slow, *_scaling(make))), encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- bench:headline -->\nold\n<!-- /bench -->\nb\n", encoding="utf-8")
    for name in ("summary", "targets", "exponents", "case_foga"):
        page = f"<!-- bench:{name} -->\n<!-- /bench -->\n"
        (tmp_path / "docs" / f"{name}.md").write_text(page, encoding="utf-8")
    return tmp_path


def test_report_fills_tables_and_draws(checkout: Path) -> None:
    changed = report.write_report(checkout, check=True)
    assert len(changed) == 5 + 6
    assert "old" in (checkout / "README.md").read_text(encoding="utf-8")
    report.write_report(checkout)
    assert report.write_report(checkout, check=True) == []
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("a\n")
    assert readme.endswith("b\n")
    assert "0.80x loss against SDPA loop" in readme
    assert "1.01x tie against released loop" in readme
    assert "| FoG-A scores of all layers |  | GPU | not yet measured |  |" in readme
    docs = {p.stem: p.read_text(encoding="utf-8") for p in (checkout / "docs").glob("*.md")}
    assert "| cpu-x: foga | SDPA loop | 0 | 0 | 1 | 0.80x |" in docs["summary"]
    assert "| cpu-x: foga | released loop | 0 | 1 | 0 | 1.01x |" in docs["summary"]
    assert "| FoG-A at 12 layers, float32 | CPU | >= 1.85x an SDPA loop | 0.8 | not met |" in docs["targets"]
    assert "within 1e-5 of the loop, relative | 1e-07 | met |" in docs["targets"]
    assert docs["targets"].count("not yet measured") >= 14
    assert "| cpu-x: layers | 2 to 8 | ours | 40.0 µs to 640 µs | 2.00 | 0.0 MiB | 1.00 |" in docs["exponents"]
    assert "GPU: not yet measured." in docs["case_foga"]


def test_a_changed_result_makes_docs_and_figures_outdated(checkout: Path) -> None:
    report.write_report(checkout)
    path = checkout / "bench" / "results" / "cpu-x.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["problems"][0]["rows"][1] |= {"speedup": 0.7}
    path.write_text(json.dumps(content), encoding="utf-8")
    names = {p.name for p in report.write_report(checkout, check=True)}
    assert {"README.md", "summary.md", "bench-speedups-cpu-x.svg", "bench-speedups-cpu-x.png"} <= names


def test_a_figure_of_no_result_is_removed(checkout: Path) -> None:
    report.write_report(checkout)
    shutil.copy(checkout / "docs/figures/bench-roofline-cpu-x.svg", checkout / "docs/figures/bench-roofline-gone.svg")
    assert [p.name for p in report.write_report(checkout)] == ["bench-roofline-gone.svg"]
    assert not (checkout / "docs/figures/bench-roofline-gone.svg").exists()


def test_no_picture_of_what_was_not_measured(checkout: Path) -> None:
    [path] = (checkout / "bench" / "results").glob("*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    result["problems"] = [problem for problem in result["problems"] if problem["case"] != "scaling"]
    path.write_text(json.dumps(result), encoding="utf-8")
    report.write_report(checkout)
    drawn = {p.name for p in (checkout / "docs" / "figures").glob("*.png")}
    assert drawn == {"bench-speedups-cpu-x.png", "bench-roofline-cpu-x.png"}
    assert "Scaling of FoG-A" not in report.pictures(report.load(checkout))


def test_figures_carry_their_digest(checkout: Path) -> None:
    report.write_report(checkout)
    [stored] = report.load(checkout).values()
    for name in figures.DRAWINGS:
        for kind in ("png", "svg"):
            path = checkout / "docs" / "figures" / f"bench-{name}-cpu-x.{kind}"
            assert figures.stored_digest(path) == figures.digest(name, stored)
    svg = (checkout / "docs/figures/bench-scaling-cpu-x.svg").read_text(encoding="utf-8")
    assert "ours, p = 2.00" in svg
    bars = (checkout / "docs/figures/bench-speedups-cpu-x.svg").read_text(encoding="utf-8")
    assert "0.80x" in bars
    assert "1.01x" in bars


def test_markers_must_fit(checkout: Path) -> None:
    with pytest.raises(UserError, match=r"x\.md: no table 'nosuch'; expected one of machines"):
        report.fill("<!-- bench:nosuch -->\n<!-- /bench -->\n", report.tables({}), "x.md")
    with pytest.raises(UserError, match=r"x\.md: a <!-- bench:NAME --> without its"):
        report.fill("<!-- bench:summary -->\n", report.tables({}), "x.md")


def test_toy_results_are_refused(checkout: Path) -> None:
    path = checkout / "bench" / "results" / "cpu-x.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"scale": "toy"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"cpu-x\.json: toy sizes say nothing"):
        report.write_report(checkout)


def test_nothing_measured_is_said_in_those_words() -> None:
    blocks = report.tables({})
    assert "CPU: not yet measured." in blocks["summary"]
    assert "GPU: not yet measured." in blocks["summary"]
    assert "x " not in blocks["targets"].replace("x the", "").replace("x vector", "").split("measured (worst")[1][:10]


def test_command_line(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("agrepa_fast.bench.cli.checkout", lambda: checkout)
    assert main(["report", "--check"]) == 1
    assert "out of date: README.md" in capsys.readouterr().out
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0
    monkeypatch.setattr("agrepa_fast.bench.cli.checkout", lambda: None)
    assert main(["report"]) == 2
