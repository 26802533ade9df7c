"""`train.imports`: a run reaches teachers that the user's own modules register."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agrepa_fast.cli import main
from agrepa_fast.teachers import registry

from .conftest import TINY

DOCS = Path(__file__).parents[2] / "docs" / "teachers.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the module of the documentation's example."""
    example = DOCS.read_text().split("## Your own")[1].split("```python\n")[1].split("teacher = ag.teachers.build")[0]
    (tmp_path / "my_teachers.py").write_text(example)
    (tmp_path / "fails.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_teachers", None)


def test_a_run_with_a_teacher_of_its_own(folder, manifest, capsys, monkeypatch):
    teachers = "alignment.teachers={speech: {source: loudness, options: {bands: 8}}}"
    own = ["train.imports=[my_teachers]", teachers]
    changes = [*TINY, f"data.train=[{manifest}]", "train.out=runs", "train.name=own", "train.samples=0", *own]
    assert main(["train", "demo", *changes]) == 0
    assert "my_teachers" in (folder / "runs/own/config.yaml").read_text()
    # A fresh process knows no such teacher: nothing of the run is imported unless it is allowed.
    sys.modules.pop("my_teachers")
    monkeypatch.setattr(registry, "_FACTORIES", {"spectral": registry._FACTORIES["spectral"]})
    probe = ["probe", "runs/own", "--data", str(manifest), "--k", "1", "--lasp"]
    capsys.readouterr()
    assert main(probe) == 2
    assert "allow them with --imports my_teachers" in capsys.readouterr().err
    assert main(["probe", "runs/own", "--k", "1"]) == 0
    assert "my_teachers" not in sys.modules
    assert main([*probe, "--imports", "my_teachers"]) == 0


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module", "train.imports: No module named"),
        ("fails", "train.imports: SystemExit: 3"),
        ("broken", "train.imports: SyntaxError"),
        ("..", "train.imports: expected the dotted name"),
        ("a/b", "train.imports: expected the dotted name"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(folder, manifest, capsys, name, message):
    changes = [*TINY, f"data.train=[{manifest}]", "train.out=runs", "train.name=x", f"train.imports=['{name}']"]
    assert main(["train", "demo", *changes]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
