"""One version, pins that fit together, and commands that do what the project's files promise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import agrepa_fast

# Shipped together for one torch and CUDA: a pin of one is a pin of torch.
TORCH_FAMILY = ("torchaudio", "xformers")


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def pin(requirement: Requirement) -> str | None:
    """The version of `name==version`; None where a range or anything is allowed."""
    (specifier,) = requirement.specifier if len(requirement.specifier) == 1 else (None,)
    return specifier.version if specifier is not None and specifier.operator == "==" else None


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


def test_pins_agree_across_extras(pyproject: dict[str, Any]) -> None:
    extras = {name: requirements(lines) for name, lines in pyproject["project"]["optional-dependencies"].items()}
    pins = defaultdict(set)
    for name, extra in extras.items():
        for package in TORCH_FAMILY:
            if package in extra:
                assert "torch" in extra, f"{name} pins {package} and leaves torch open"
        for package in ("torch", *TORCH_FAMILY):
            if package in extra:
                pins[package].add(pin(extra[package]))
    assert {package: len(versions) for package, versions in pins.items()} == dict.fromkeys(("torch", *TORCH_FAMILY), 1)
    assert None not in set.union(*pins.values()), "a range where an exact version is needed"
    (torch_version,), (torchaudio_version,) = pins["torch"], pins["torchaudio"]
    assert torch_version == torchaudio_version
    base = requirements(pyproject["project"]["dependencies"])["torch"]
    assert base.specifier.contains(torch_version)


def test_dev_holds_every_extra_and_what_a_build_needs(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    dev = requirements(extras["dev"])
    assert dev["agrepa-fast"].extras == set(extras) - {"dev"}
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
    """A virtual environment as `make` sees one: everything installed after pyproject.toml changed."""
    (tmp_path / "bin").mkdir()
    now = (root / "pyproject.toml").stat().st_mtime + 10
    for name in ("bin/python", ".installed-demo", ".installed-dev"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now, now))
    return tmp_path


def test_make_test_runs_every_check_and_pytest_last(root: Path, environment: Path) -> None:
    *checks, tests = dry_run(root, "test", f"VENV={environment}")
    assert {command.split("bin/")[-1].split()[0] for command in checks} == {"ruff", "mypy", "mkdocs"}
    assert f"{environment}/bin/python -m pytest" in tests


def test_make_demo_runs_the_main_job_under_a_dated_name(root: Path, environment: Path) -> None:
    (command,) = dry_run(root, "demo", f"VENV={environment}")
    main, _, name = command.partition(" train.name=")
    assert main == f"{environment}/bin/agrepa train demo"
    dated = subprocess.run(["sh", "-c", f"echo {name}"], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"demo-\d{8}-\d{6}\n", dated.stdout)


@pytest.mark.parametrize("goal, extras", [("demo", "audio,train"), ("lint", "dev")])
def test_make_installs_anew_only_after_pyproject_changed(root: Path, environment: Path, goal: str, extras: str) -> None:
    install = f"{environment}/bin/python -m pip install -e '.[{extras}]'"
    assert install not in dry_run(root, goal, f"VENV={environment}")
    assert install in dry_run(root, goal, f"VENV={environment}", "--what-if=pyproject.toml")


def test_make_installs_f5_tts_without_its_trainer(root: Path, environment: Path) -> None:
    """The tests of other libraries' models fail without it, so a fresh clone must get it."""
    commands = dry_run(root, "lint", f"VENV={environment}", "--what-if=pyproject.toml")
    assert f"{environment}/bin/python -m pip install --no-deps f5-tts==1.1.22 voicebox-pytorch==0.5.0" in commands


def test_make_makes_a_missing_environment_first(root: Path, tmp_path: Path) -> None:
    commands = dry_run(root, "test", f"VENV={tmp_path / 'new'}", "PYTHON=some-python")
    made = commands.index(f"some-python -m venv {tmp_path / 'new'}")
    assert made < commands.index(f"{tmp_path / 'new'}/bin/python -m pip install -e '.[dev]'")


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


def test_the_workflow_and_pre_commit_call_the_same_commands(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    ran = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert sorted(ran) == [".ci/run", "make demo"]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint", "make test"]
