"""The cases of `agrepa bench` under pytest-benchmark, for its comparison tables and history.

Gate first, as always; the interleaved protocol with its noise floor is `agrepa bench run`'s alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from agrepa_fast.bench import gate, protocol
from agrepa_fast.bench.case import Problem, Unavailable
from agrepa_fast.bench.cases import CASES
from agrepa_fast.bench.cli import pick_device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = pick_device(metafunc.config.getoption("--bench-device"))
    scale = metafunc.config.getoption("--scale")
    parameters = []
    for case, module in CASES.items():
        for problem in module.problems(scale, device):
            if problem.single:  # whole runs: agrepa bench times them
                continue
            torch.manual_seed(0)
            parameters += [
                pytest.param(device, problem, provider.name, id=f"{case}-{problem.key}-{provider.name}")
                for provider in problem.build(torch.device("cpu") if scale == "toy" else device).providers
            ]
    metafunc.parametrize(("device", "problem", "provider"), parameters)


def test_case(device: torch.device, problem: Problem, provider: str, benchmark: Any) -> None:
    torch.compiler.reset()
    with protocol.lane(device):
        torch.manual_seed(0)
        setup = problem.build(device)
        chosen = next(p for p in setup.providers if p.name == provider)
        try:
            call = chosen.make()
            outputs = call()
        except Unavailable as reason:
            pytest.skip(str(reason))
        checked = gate.check(outputs, setup.reference(), setup.bounds)
        assert checked.passed, checked.reason
        benchmark.group = problem.key
        benchmark(_synchronised(call, device))


def _synchronised(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
