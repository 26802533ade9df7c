"""Who may import whom: kernels <- ops <- models <- attribution <- alignment <- training <- cli, and nobody upward.

Inside a room no files import each other in a circle.
"""

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
    "report",
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
    "integrations": {"errors", "alignment"},
    ROOT_PACKAGE: NETWORK | {"models", "attribution", "alignment"},
    "data": SIDE,
    "teachers": SIDE,
    "evaluation": SIDE | {"teachers", "imports"},
    "report": {"attribution", "errors"},  # it reads what a run's folder holds, and nothing of the training
    "training": TRAINING,
    "study": TRAINING | {"training"},
    "bench": TRAINING | {"training", "kernels", "reference"},
    "cli": TRAINING | {"training", "bench", "study"},
    "__main__": {"cli"},
}
# These, only for annotations: under `if TYPE_CHECKING:`.
MAY_ANNOTATE = {ROOT_PACKAGE: {"data", "integrations", "teachers"}}
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
    annotation: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module of `package`, wherever in the file it stands."""

    def visit(node: ast.AST, annotation: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, annotation)
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno, annotation)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, annotation)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, annotation)

    yield from visit(ast.parse(source), False)


def package_of(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def circles(sources: dict[str, tuple[str, str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle while they run; `sources`: {module: (package, source)}.

    Imports inside functions count, annotations (under TYPE_CHECKING) do not. Only circles inside one room: between
    rooms the arrows forbid them.
    """
    targets: dict[str, set[str]] = {}
    for module, (package, source) in sources.items():
        names = (item.name for item in imports(source, package) if not item.annotation)
        imported = {name if name in sources else name.rpartition(".")[0] for name in names} & sources.keys()
        targets[module] = {name for name in imported - {module} if room_of(name) == room_of(module)}
    reachable = {module: set(names) for module, names in targets.items()}
    changed = True
    while changed:
        grown = {m: names.union(*(reachable[name] for name in names)) for m, names in reachable.items()}
        changed, reachable = grown != reachable, grown
    groups = {tuple(sorted(n for n in names if m in reachable[n])) for m, names in reachable.items() if m in names}
    return sorted(map(list, groups))


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module with this dotted name imports and must not, one line each."""
    room = room_of(module)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for item in imports(source, package):
        top = item.name.split(".")[0]
        if top == ROOT_PACKAGE:
            target = room_of(item.name)
            allowed = MAY_IMPORT[room] | {room} | (MAY_ANNOTATE.get(room, set()) if item.annotation else set())
            if target not in allowed:
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


def test_no_files_of_a_room_import_each_other_in_a_circle(root: Path, pyproject: dict[str, Any]) -> None:
    files = dict(modules(root, pyproject["tool"]["setuptools"]["package-dir"]))
    assert circles({m: (package_of(m, file), file.read_text(encoding="utf-8")) for m, file in files.items()}) == []


def test_circles_are_found() -> None:
    sources = {
        "agrepa_fast.ops": ("agrepa_fast.ops", "from .a import f"),
        "agrepa_fast.ops.a": ("agrepa_fast.ops", "from . import b"),
        "agrepa_fast.ops.b": ("agrepa_fast.ops", "def f():\n    from agrepa_fast.ops.c import g"),
        "agrepa_fast.ops.c": ("agrepa_fast.ops", "import agrepa_fast.ops.a"),
        "agrepa_fast.ops.d": ("agrepa_fast.ops", "from .a import f\nif TYPE_CHECKING:\n    from .e import E"),
        "agrepa_fast.ops.e": ("agrepa_fast.ops", "from .d import D"),
        "agrepa_fast.data.x": ("agrepa_fast.data", "from ..ops import a"),
        "agrepa_fast.training.config": ("agrepa_fast.training.config", "from .run import RunConfig"),
        "agrepa_fast.training.config.run": ("agrepa_fast.training.config", "from . import RunConfig"),
    }
    assert circles(sources) == [
        ["agrepa_fast.ops.a", "agrepa_fast.ops.b", "agrepa_fast.ops.c"],
        ["agrepa_fast.training.config", "agrepa_fast.training.config.run"],
    ]


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
        ("agrepa_fast", "if not TYPE_CHECKING:\n    from . import data"),
        ("agrepa_fast", "if TYPE_CHECKING:\n    pass\nelse:\n    from . import data"),
        ("agrepa_fast.models.x", "if TYPE_CHECKING:\n    from ..attribution.scores import LayerScores"),
        ("agrepa_fast.models.x", "from .. import kernels"),
        ("agrepa_fast.ops.x", "from agrepa_fast import DiT"),
        ("agrepa_fast.ops.x", "import agrepa_fast"),
        ("agrepa_fast.data.x", "from ..models.dit import DiT"),
        ("agrepa_fast.teachers.x", "from ..alignment.loss import AlignmentLoss"),
        ("agrepa_fast.training.x", "from ..cli import main"),
        ("agrepa_fast.report.x", "def f():\n    from ..training.log import RunLog"),
        ("agrepa_fast.reference.x", "from ..ops import cosine"),
        ("agrepa_fast.reference.x", "import numpy as np"),
        ("agrepa_fast.kernels.x", "from ..errors import UserError"),
        ("agrepa_fast.kernels.x", "try:\n    import einops\nexcept ImportError:\n    pass"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert len(violations(source, module, is_package=module == ROOT_PACKAGE)) == 1


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
