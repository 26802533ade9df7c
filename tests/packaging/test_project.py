"""One version, constraints that fit the extras, and what `make` and continuous integration do."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import agrepa_fast
from agrepa_fast.training.environment import USES

TORCH_FAMILY = {"torch", "torchaudio", "torchvision", "torchao", "xformers", "triton"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_the_version_is_written_once(root: Path, pyproject: dict[str, Any]) -> None:
    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    number = re.compile(rf"(?<![\w.]){re.escape(agrepa_fast.__version__)}(?![\w.])")
    files = [root / name for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile", ".ci/run")]
    for folder, pattern in (("agrepa_fast", "*.py"), ("kernels", "*.py"), ("docs", "*.md"), (".github", "*.yml")):
        files += (root / folder).rglob(pattern)
    holders = {str(file.relative_to(root)) for file in files if number.search(file.read_text(encoding="utf-8"))}
    assert holders == {"agrepa_fast/__init__.py"}


def test_the_version_can_be_read_without_importing_torch(root: Path) -> None:
    """setuptools reads it from the source; were it not a plain string, a build would have to import torch."""
    tree = ast.parse((root / "agrepa_fast" / "__init__.py").read_text(encoding="utf-8"))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and "__version__" in ast.unparse(node)]
    assert [ast.literal_eval(value) for value in values] == [agrepa_fast.__version__]


def test_the_changelog_starts_with_this_version(root: Path) -> None:
    headings = re.findall(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == agrepa_fast.__version__


def test_only_constraints_pin_and_they_satisfy_every_extra(root: Path, pyproject: dict[str, Any]) -> None:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = requirements([line for line in lines if line and not line.startswith("#")])
    versions = {name: re.fullmatch(r"==([\d.]+)", str(pin.specifier))[1] for name, pin in pins.items()}
    assert versions["torch"] == versions["torchaudio"]
    extras = pyproject["project"]["optional-dependencies"]
    for extra, needed in {"": pyproject["project"]["dependencies"], **extras}.items():
        for name, requirement in requirements(needed).items():
            assert "==" not in str(requirement.specifier), f"{extra}: {requirement} replaces what a user has installed"
            assert name not in versions or requirement.specifier.contains(versions[name]), f"{extra}: {requirement}"
            assert name not in TORCH_FAMILY or name in versions, f"constraints.txt: {name} has no line"


def test_doctor_knows_every_extra_for_users(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    for_users = extras.keys() - {"models", "docs", "lint", "dev"}
    assert {name: set(packages) for name, packages in USES.items()} == {
        name: set(requirements(extras[name])) for name in for_users
    }


def test_dev_holds_every_extra_and_what_a_build_needs(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    dev = requirements(extras["dev"])
    # Resemblyzer brings the old backport `typing`, which stands in front of Python's own under `python -S`.
    assert dev["agrepa-fast"].extras == set(extras) - {"dev", "speaker"}
    build = requirements(pyproject["build-system"]["requires"])
    assert dev["setuptools"].specifier == build["setuptools"].specifier


def dry_run(root: Path, *arguments: str) -> list[str]:
    """The commands `make` would run."""
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    out = subprocess.run(
        ["make", "-n", *arguments], cwd=root, env=environment, check=True, capture_output=True, text=True
    )
    return out.stdout.splitlines()


@pytest.fixture
def environment(root: Path, tmp_path: Path) -> Path:
    """A virtual environment as `make` sees one: everything was installed after the last change."""
    (tmp_path / "bin").mkdir()
    now = max((root / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt")) + 10
    for name in ("bin/python", ".installed-demo", ".installed-dev"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now, now))
    return tmp_path


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
@pytest.mark.parametrize("goal", ["demo", "lint"])
def test_make_installs_anew_only_after_a_change(root: Path, environment: Path, goal: str, changed: str) -> None:
    assert "pip install" not in " ".join(dry_run(root, goal, f"VENV={environment}"))
    assert "pip install" in " ".join(dry_run(root, goal, f"VENV={environment}", f"--what-if={changed}"))


@pytest.mark.parametrize(
    "printed, status, closing",
    [
        ("===== 3 passed in 1.00s =====", 0, "===== 3 passed in 1.00s ====="),
        ("== 1 failed, 2 passed in 61.00s (0:01:01) ==", 2, "== 1 failed, 2 passed in 61.00s (0:01:01) =="),
        ("would reformat x.py", 1, "pytest did not finish: see above"),
    ],
)
def test_ci_ends_with_the_closing_line_of_pytest(
    root: Path, tmp_path: Path, printed: str, status: int, closing: str
) -> None:
    """With a `make` that prints and fails as told; the real one ends with lines of its own."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "goal: $*"\necho "{printed}"\necho "make: Leaving directory"\nexit {status}\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([root / ".ci" / "run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1], done.returncode) == ("goal: test", closing, status)
