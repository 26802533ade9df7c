"""Options of the pytest-benchmark view: `pytest bench --benchmark-only [--scale quick] [--bench-device cuda]`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("agrepa bench")
    group.addoption("--scale", default="toy", choices=("toy", "quick", "full"), help="sizes of the cases")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")
