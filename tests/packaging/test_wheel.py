"""What a wheel holds and says about itself, and that it works away from the checkout."""

from __future__ import annotations

import configparser
import importlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement

import agrepa_fast


@pytest.fixture(scope="session")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: a build leaves files behind, and must not find those of an earlier one.

    bench/test_view is pytest's view of the benchmarks, for a checkout; it is not installed."""
    copy = tmp_path_factory.mktemp("source")
    for entry in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / entry, copy)
    for folder in ("agrepa_fast", "kernels", "bench", "tests", "docs"):
        if (root / folder).is_dir():
            shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "test_view"))
    return copy


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it but by the setuptools at hand, so without a download."""
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys, setuptools.build_meta as backend\nbackend.build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, f"the wheel needs setuptools>=77 here (extra dev):\n{built.stderr}"
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def information(unpacked: Path) -> Path:
    (folder,) = unpacked.glob("*.dist-info")
    return folder


@pytest.fixture(scope="session")
def about(information: Path) -> Message:
    return Parser().parsestr((information / "METADATA").read_text(encoding="utf-8"))


def test_every_module_of_the_tree_is_in_the_wheel(source: Path, unpacked: Path, pyproject: dict[str, Any]) -> None:
    """A new folder that pyproject's `packages` forgets works in a checkout and is missing here."""
    expected = set()
    for package, folder in pyproject["tool"]["setuptools"]["package-dir"].items():
        inside = PurePosixPath(*package.split("."))
        expected |= {inside / file.relative_to(source / folder).as_posix() for file in (source / folder).rglob("*.py")}
    assert PurePosixPath("agrepa_fast/kernels/__init__.py") in expected
    assert {PurePosixPath(file.relative_to(unpacked).as_posix()) for file in unpacked.rglob("*.py")} == expected


def test_every_package_has_an_init(source: Path, pyproject: dict[str, Any]) -> None:
    """Without one a folder is a namespace, which an installed and a checked-out copy would both fill."""
    for folder in pyproject["tool"]["setuptools"]["package-dir"].values():
        folders = {file.parent for file in (source / folder).rglob("*.py")}
        assert [str(path.relative_to(source)) for path in folders if not (path / "__init__.py").is_file()] == []


def test_nothing_else_is_at_the_top_of_the_wheel(unpacked: Path, information: Path) -> None:
    assert {entry.name for entry in unpacked.iterdir()} == {"agrepa_fast", information.name}
    assert (information / "top_level.txt").read_text().split() == ["agrepa_fast"]
    assert (unpacked / "agrepa_fast" / "py.typed").is_file()
    assert (information / "licenses" / "LICENSE").is_file()


def test_the_version_of_the_wheel_is_the_package_s(about: Message) -> None:
    assert about["Version"] == agrepa_fast.__version__


def test_the_base_needs_torch_and_numpy_alone(about: Message) -> None:
    requirements = [Requirement(line) for line in about.get_all("Requires-Dist")]
    base = {item.name: str(item.specifier) for item in requirements if item.marker is None}
    assert set(base) == {"torch", "numpy"}
    assert base["torch"] == ">=2.11"  # open to newer ones
    assert all("extra ==" in str(item.marker) for item in requirements if item.name not in base)


def test_the_command_exists(information: Path) -> None:
    scripts = configparser.ConfigParser()
    scripts.read(information / "entry_points.txt", encoding="utf-8")
    module, _, function = scripts["console_scripts"]["agrepa"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_wheel_works_away_from_the_checkout(
    unpacked: Path, run_python: Callable[..., str], dependency_folders: list[Path], tmp_path: Path
) -> None:
    code = """
import agrepa_fast, agrepa_fast.kernels
print(agrepa_fast.kernels.__file__)
print(*agrepa_fast.__path__)
"""
    out = run_python(code, cwd=tmp_path, flags=("-S",), path=[unpacked, *dependency_folders])
    # The path has one entry: what a checkout adds, to find its kernels, must not be added here.
    assert out.splitlines() == [
        str(unpacked / "agrepa_fast" / "kernels" / "__init__.py"),
        str(unpacked / "agrepa_fast"),
    ]
