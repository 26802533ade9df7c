"""Run `values/` under Triton's interpreter, in a process of its own (see conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_values_under_the_interpreter() -> None:
    folder = Path(__file__).with_name("values")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AGREPA_OPS": "auto"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parents[2])
    print(result.stdout, result.stderr)  # pytest shows it when this test fails, and with -rP
    assert result.returncode == 0, "\n".join(result.stdout.splitlines()[-25:])
    assert " skipped" not in result.stdout.splitlines()[-1], "the kernels must run here, not be skipped"
