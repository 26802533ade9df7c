"""The repository's root, its pyproject, and Python in a fresh process: what an import does shows only there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def dependency_folders() -> list[Path]:
    """Where torch and numpy lie: with `-S` they are put on the path by hand."""
    origins = [importlib.util.find_spec(name).origin for name in ("torch", "numpy")]
    return sorted({Path(origin).parent.parent for origin in origins})


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """run_python(code, cwd=..., flags=(), path=()) -> what it printed; `path` goes before PYTHONPATH's own."""

    def run(code: str, *, cwd: Path, flags: Sequence[str] = (), path: Sequence[Path] = ()) -> str:
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        entries = [str(entry) for entry in (*path, *inherited) if str(entry)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entries), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run
