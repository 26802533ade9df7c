"""Who may import whom: kernels <- ops <- models <- attribution <- alignment <- training <- cli, and nobody upward."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT_PACKAGE = "agrepa_fast"  # as a room: the public names of agrepa_fast/__init__.py

OPS = {"kernels", "reference", "errors"}
NETWORK = {"ops", "reference", "errors", "buffers"}
SIDE = {"ops", "reference", "errors", "fields", "data"}
TRAINING = {
    ROOT_PACKAGE,
    "graphs",
    "alignment",
    "attribution",
    "data",
    "errors",
    "evaluation",
    "fields",
    "imports",
    "models",
    "ops",
    "teachers",
}

# Beside itself, a room may import these rooms.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "graphs": set(),
    "buffers": set(),
    "fields": {"errors"},
    "imports": {"errors"},
    "kernels": set(),
    "reference": set(),
    "ops": OPS,
    "models": NETWORK,
    "attribution": NETWORK | {"models", "graphs"},
    "alignment": NETWORK | {"models", "attribution"},
    "integrations": {"errors", "alignment", "attribution"},
    ROOT_PACKAGE: NETWORK | {"models", "attribution", "alignment"},
    "data": SIDE,
    "teachers": SIDE,
    "evaluation": SIDE,
    "training": TRAINING,
    "bench": TRAINING | {"training", "kernels", "reference"},
    "cli": TRAINING | {"training", "bench"},
    "__main__": {"cli"},
}
# Rooms that must run, or be read, without the rest of the world. Elsewhere any package is allowed.
OTHER_PACKAGES = {
    "kernels": {"torch", "triton"},
    "reference": {"torch"},
    "graphs": {"torch"},
    "buffers": {"torch"},
    "errors": set(),
    "fields": set(),
}


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: `from ..ops import cosine` in agrepa_fast.models.x is agrepa_fast.ops.cosine."""

    name: str
    line: int


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module of `package`, wherever in the file it stands."""

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module with this dotted name imports and must not, one line each."""
    room = room_of(module)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for item in imports(source, package):
        top = item.name.split(".")[0]
        if top == ROOT_PACKAGE:
            target = room_of(item.name)
            if target not in MAY_IMPORT[room] | {room}:
                found.append(f"{module}, line {item.line}: {room} must not import {target} ({item.name})")
        elif top not in sys.stdlib_module_names and top not in OTHER_PACKAGES.get(room, {top}):
            found.append(f"{module}, line {item.line}: {room} must not import the package {top}")
    return found


def room_of(name: str) -> str:
    """agrepa_fast.ops.cosine -> ops; a name that is no room belongs to the root: agrepa_fast.__version__."""
    _, second, *_ = *name.split("."), ""
    return second if second in MAY_IMPORT else ROOT_PACKAGE


def modules(root: Path, folders: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the package; `folders` is pyproject's package-dir."""
    for package, folder in folders.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), file


def test_every_import_follows_the_arrows(root: Path, pyproject: dict[str, Any]) -> None:
    found, seen = [], set()
    for module, file in modules(root, pyproject["tool"]["setuptools"]["package-dir"]):
        seen.add(room_of(module))
        found += violations(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    assert not found, "\n".join(found)
    assert seen >= {"kernels", "ops", "reference", "models", "attribution", "alignment", "training", "data", "cli"}


def test_every_room_has_a_rule(root: Path, pyproject: dict[str, Any]) -> None:
    folders = pyproject["tool"]["setuptools"]["package-dir"]
    rooms = {module.split(".")[1] for module, _ in modules(root, folders) if module != ROOT_PACKAGE}
    assert rooms <= set(MAY_IMPORT), f"say in MAY_IMPORT what {rooms - set(MAY_IMPORT)} may import"


@pytest.mark.parametrize(
    "module, source",
    [
        ("agrepa_fast.attribution.x", "from ..training import trainer"),
        ("agrepa_fast.attribution.x", "def f():\n    from agrepa_fast.training.trainer import Trainer"),
        ("agrepa_fast.attribution.x", "from ..alignment.policy import LayerSelection"),
        ("agrepa_fast.attribution.x", "from __future__ import annotations\nimport agrepa_fast.alignment.policy"),
        ("agrepa_fast.alignment.x", "from ..integrations import hf"),
        ("agrepa_fast.models.x", "if TYPE_CHECKING:\n    from ..attribution.scores import LayerScores"),
        ("agrepa_fast.models.x", "from .. import kernels"),
        ("agrepa_fast.ops.x", "from agrepa_fast import DiT"),
        ("agrepa_fast.ops.x", "import agrepa_fast"),
        ("agrepa_fast.data.x", "from ..models.dit import DiT"),
        ("agrepa_fast.teachers.x", "from ..alignment.loss import AlignmentLoss"),
        ("agrepa_fast.training.x", "from ..cli import main"),
        ("agrepa_fast.reference.x", "from ..ops import cosine"),
        ("agrepa_fast.reference.x", "import numpy as np"),
        ("agrepa_fast.kernels.x", "from ..errors import UserError"),
        ("agrepa_fast.kernels.x", "try:\n    import einops\nexcept ImportError:\n    pass"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("agrepa_fast.alignment.x", "from ..attribution.scores import LayerScores"),
        ("agrepa_fast.ops.x", "from ..kernels import residual\nfrom ..reference import residual as plain"),
        ("agrepa_fast.kernels.x", "import math\nimport triton.language as tl\nfrom .residual import kernel"),
        ("agrepa_fast.training.x", "from .. import __version__\nimport yaml"),
    ],
)
def test_a_right_arrow_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    source = "from .dit import DiT\nfrom ..training import trainer"
    assert [item.name for item in imports(source, "agrepa_fast.models")] == [
        "agrepa_fast.models.dit.DiT",
        "agrepa_fast.training.trainer",
    ]
    assert len(violations(source, "agrepa_fast.models", is_package=True)) == 1
