"""`make gpu`: everything a machine with a GPU can tell, in one command and under nine minutes.

`python -m agrepa_fast.bench.gpu [FOLDER]` runs doctor, tests/gpu and all cases (the roofline first), and leaves
gpu-NAME.json and gpu-NAME.log in FOLDER (default: bench/results of the checkout). Needs nothing but the checkout on
PYTHONPATH, torch and triton; what is missing is said and skipped. Cut short, it leaves what was measured.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from .environment import checkout

LIMIT = 520.0  # seconds for everything
DOCTOR, TESTS = 40.0, 150.0  # of which these may take
RESERVE = 45.0  # kept for the last problem: none is started when less is left


def main(argv: Sequence[str] | None = None) -> int:
    """0 when tests and gates passed; 1 when one did not; 2 without a GPU or a checkout."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    root = checkout()
    if root is None:
        print("make gpu: run it from a checkout (tests/gpu is not installed)", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    folder = Path(arguments[0]) if arguments else root / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    name = name_of(torch.cuda.get_device_name(), datetime.datetime.now(datetime.UTC))
    began = time.monotonic()

    def left() -> float:
        return LIMIT - (time.monotonic() - began)

    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        run_step(["agrepa_fast", "doctor"], min(DOCTOR, left()), root, log)  # it informs; tests and gates decide
        codes = []
        if (root / "tests" / "gpu").is_dir():
            codes.append(run_step(["pytest", "tests/gpu", "-m", "gpu", "-q"], min(TESTS, left()), root, log))
        budget = f"{max(0.0, left() - RESERVE):.0f}"
        bench = ["agrepa_fast.bench", "run", "all", "--device", "cuda", "--budget", budget, "--out"]
        codes.append(run_step([*bench, str((folder / f"{name}.json").resolve())], left(), root, log))
    print(f"{folder / name}.json, {folder / name}.log")
    return 1 if any(codes) else 0


def name_of(device: str, now: datetime.datetime) -> str:
    """ "NVIDIA H200" on a day -> "gpu-nvidia-h200-20260101"."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"gpu-{slug}-{now:%Y%m%d}"


def run_step(module: list[str], seconds: float, root: Path, log: TextIO) -> int:
    """Run `python -m MODULE ...` from the checkout, output on the screen and in the log; ended when time is up."""
    _say(f"\n$ python -m {' '.join(module)}", log)
    command = [sys.executable, "-m", *module]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ended = threading.Timer(max(seconds, 1.0), process.terminate)
    ended.start()
    assert process.stdout is not None
    for line in process.stdout:
        _say(line.rstrip("\n"), log)
    code = process.wait()
    timely = ended.is_alive()
    ended.cancel()
    if not timely:
        _say(f"ended after {seconds:.0f} s; what it had written is kept", log)
    return code


def _say(line: str, log: TextIO) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


if __name__ == "__main__":
    sys.exit(main())
