"""Two processes under DistributedDataParallel: `ranks.py`, whose functions say what they check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")
SCENARIOS = [
    line[4:].partition("(")[0] for line in SCRIPT.read_text().splitlines() if line.endswith("(rank: int) -> None:")
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the two ranks print: one start of processes for all scenarios."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(store)], env=environment, stdout=-1, stderr=-2, text=True)
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks(outputs: list[str], scenario: str):
    for output in outputs:
        assert f"passed {scenario}\n" in output, output
