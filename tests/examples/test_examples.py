"""The programs in examples/: without their lines of alignment, with them, and as docs/integrations.md shows them."""

from __future__ import annotations

import importlib.util
import random
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Programs without alignment have tests and pages of their own.
OTHERS = {ROOT / "examples" / "skip_layers.py", ROOT / "examples" / "train_teacher.py"}
FILES = sorted(set((ROOT / "examples").glob("*.py")) - OTHERS)
# The first step whose loss the alignment of an earlier one can have changed: after the probe, an aligned step.
FIRST_CHANGE = dict.fromkeys(("f5_tts_cfm", "diffusers_sd3", "lora", "matcha_unet", "voicebox"), 4)
MARK = re.compile(r"  # align$")


def without_alignment(source: str) -> str:
    return "".join(line for line in source.splitlines(keepends=True) if not MARK.search(line.rstrip("\n")))


def side_by_side(source: str) -> str:
    """The program below its docstring as a diff against the one without alignment."""
    body = source[source.index('"""\n', 3) + 4 :].strip("\n")
    lines = [f"+{MARK.sub('', line)}" if MARK.search(line) else f" {line}".rstrip() for line in body.splitlines()]
    return "```diff\n" + "\n".join(lines) + "\n```\n"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """One thread; an empty folder; F5-TTS and Voicebox without what their trainers and codecs import."""
    from ..attribution.catalogue.packages import voicebox_stand_ins  # here: as a script this file has no parent

    monkeypatch.chdir(tmp_path)
    spec = importlib.util.find_spec("f5_tts")
    assert spec is not None, "f5-tts is missing: make test installs it"
    package = types.ModuleType("f5_tts.model")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "model")]
    for name, module in {"f5_tts.model": package, **voicebox_stand_ins()}.items():
        monkeypatch.setitem(sys.modules, name, module)


def run(source: str, folder: Path) -> tuple[list[float], dict]:
    random.seed(0)
    file = folder / "program.py"
    file.write_text(source, encoding="utf-8")
    program = runpy.run_path(str(file))
    return program["main"](), program


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_alignment_is_at_most_ten_lines_and_changes_nothing_before_it_starts(file, tmp_path):
    source = file.read_text(encoding="utf-8")
    assert 1 <= sum(bool(MARK.search(line)) for line in source.splitlines()) <= 10
    plain, _ = run(without_alignment(source), tmp_path)
    aligned, _ = run(source, tmp_path)
    assert len(plain) == len(aligned) == 8
    first = FIRST_CHANGE.get(file.stem, 3)
    assert aligned[:first] == plain[:first]
    assert aligned[first + 1 :] != plain[first + 1 :]
    assert all(map(torch.isfinite, map(torch.tensor, aligned)))


def test_the_page_shows_every_program():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    for file in FILES:
        assert f"<!-- examples/{file.name} -->\n{side_by_side(file.read_text(encoding='utf-8'))}" in page, file.name


if __name__ == "__main__":  # write the programs into the page
    page = ROOT / "docs" / "integrations.md"
    text = page.read_text(encoding="utf-8")
    for file in FILES:
        mark = f"<!-- examples/{file.name} -->\n"
        shown = mark + side_by_side(file.read_text(encoding="utf-8"))
        text = re.sub(mark + r"(```diff\n.*?^```\n)?", lambda _, s=shown: s, text, flags=re.M | re.S)
    page.write_text(text, encoding="utf-8")
