"""Every Python example of README and docs runs; every relative link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import agrepa_fast
from agrepa_fast import cli
from agrepa_fast.study.spec import read_study
from agrepa_fast.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# A block that cannot run by itself says so, and why, in a comment before it.
BLOCK = re.compile(r"(?<!-->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/|torchrun \S+ -m )?agrepa(?:_fast)? (.*)", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name == "f5-tts.md":
        f5_tts_without_its_trainer(monkeypatch)
    namespace: dict = {"__name__": "example"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, f"{name(page)} example", "exec"), namespace)


def test_examples_use_public_names():
    """What a page imports is in `ag`, or in its rooms `ag.data`, `ag.teachers` and `ag.ops`."""
    deep = {
        f"{name(page)}: {line.strip()}"
        for page in PAGES
        for line in "\n".join(BLOCK.findall(page.read_text())).splitlines()
        if re.match(r"\s*(from|import) agrepa_fast\.", line)
    }
    # A plan's sizes are for who plans by hand; everybody else gives `memory_budget`.
    assert deep == {"docs/attribution/on-paper.md: from agrepa_fast.attribution.plan import Sizes, split"}
    assert all(hasattr(agrepa_fast, public) for public in agrepa_fast.__all__)


def f5_tts_without_its_trainer(monkeypatch):
    """The package is installed without the dependencies of its trainer and app, which `f5_tts.model` imports."""
    spec = importlib.util.find_spec("f5_tts")
    assert spec is not None, "f5-tts is missing: make test installs it"
    package = types.ModuleType("f5_tts.model")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "model")]
    filters = types.ModuleType("librosa.filters")
    filters.mel = None
    stand_ins = {"f5_tts.model": package, "librosa": types.ModuleType("librosa"), "librosa.filters": filters}
    for module_name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, module_name, module)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), target


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCKS.findall(page.read_text()) if language in languages]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=name)
def test_configurations_are_read(page, tmp_path):
    for block in blocks(page, "yaml"):
        (tmp_path / "file.yaml").write_text(block, encoding="utf-8")
        read = read_study if page.name == "study.md" else load_config
        read(str(tmp_path / "file.yaml"), [])


@pytest.mark.parametrize("page", [p for p in PAGES if COMMAND.search(p.read_text())], ids=name)
def test_command_lines_fit_the_command_line(page):
    text = "\n".join(blocks(page, "bash", "text", "")).replace("\\\n", " ")
    for line in COMMAND.findall(text):
        words = shlex.split(line, comments=True)
        if words[0] == "bench":  # it has commands of its own
            continue
        arguments = cli._parse(words)
        if getattr(arguments, "config", None) in ("demo", "small", "base", "paper"):
            load_config(arguments.config, arguments.overrides)


def test_readme_commands_exist():
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert targets >= {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
