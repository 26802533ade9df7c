"""Results made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agrepa_fast.bench import environment
from agrepa_fast.bench.roofline import measure_roofline

CPU = torch.device("cpu")


def row(provider: str, role: str, median: float | None, speedup: float | None = None, word: str | None = None) -> Any:
    names = "p20_us p80_us samples calls timer gb_per_s tflop_per_s roofline_share bound_by peak_bytes launches host_us"
    return {
        "provider": provider,
        "role": role,
        "status": "ok",
        "reason": None,
        "median_us": median,
        **dict.fromkeys([*names.split(), "joules", "watts", "error"]),
        "p20_us": median,
        "p80_us": median,
        "speedup": speedup,
        "verdict": word,
    }


def problem(case: str, params: dict[str, Any], floor: float, *rows: Any) -> dict[str, Any]:
    return {
        "case": case,
        "key": " ".join(f"{k}={v}" for k, v in params.items()),
        "params": params,
        "bytes": 1000,
        "flops": 2000,
        "dtype": "float32",
        "gate": {"passed": True, "reason": None},
        "noise_floor": floor,
        "seconds": 1.0,
        "rows": list(rows),
    }


def result(*problems: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "complete": True,
        "scale": "quick",
        "cases": ["foga", "scaling"],
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 3.0,
        "environment": environment.environment(CPU),
        "conditions": {"before": environment.conditions(CPU), "after": None},
        "roofline": measure_roofline(CPU, "toy"),
        "noise_floor": 0.02,
        "problems": list(problems),
        "skipped": [],
    }


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """`make.row`, `make.problem` and `make.result`."""
    return SimpleNamespace(row=row, problem=problem, result=result)
