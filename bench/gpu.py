"""`make gpu`: doctor, headline problems, tests and all other problems on a machine with a GPU, in under nine minutes.

`python -m agrepa_fast.bench.gpu [FOLDER]` leaves gpu-NAME.json and gpu-NAME.log in FOLDER (default: bench/results of
the checkout). The order is: doctor; the headline problems, within four minutes; the tests, those first that are
likeliest to fail; all other problems. Both files grow as results come, so a run that is cut short leaves what it
measured. It needs the checkout, torch and triton; the tests also need pytest, and are left out without it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from . import results
from .environment import checkout

# Seconds since the start.
HEADLINES_BY = 240.0
LIMIT = 520.0
# Seconds of a step.
DOCTOR, TESTS = 15.0, 150.0
RESERVE = 45.0  # no problem is started when less time is left
GRACE = 8.0  # between SIGINT and SIGKILL

# Tests that are likely to fail, or whose failure costs most, come first.
TEST_ORDER = ("gpu/test_step.py", "kernels/values", "gpu/test_kernels.py", "gpu/test_attribution.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if tests and gates passed; 1 if one failed or was cut short; 2 without a GPU or a checkout."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    root = checkout()
    if root is None:
        print("make gpu: run it from a checkout (tests/gpu is not installed)", file=sys.stderr)
        return 2
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(f"make gpu: expected one folder for the results, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    folder = Path(arguments[0] if arguments else root / "bench" / "results").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"make gpu: {folder}: {error.strerror}; name a folder that can be written", file=sys.stderr)
        return 2
    name = name_of(torch.cuda.get_device_name(), datetime.datetime.now(datetime.UTC))
    with _signals(), open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        codes = _run(root, folder / f"{name}.json", log)
    print(f"{folder / name}.json, {folder / name}.log")
    return 1 if any(codes) else 0


def _run(root: Path, out: Path, log: TextIO) -> list[int]:
    """Run all steps. Returns the exit codes of those that decide: tests and gates, not doctor."""
    began = time.monotonic()

    def left(until: float) -> float:
        return until - (time.monotonic() - began)

    bench = ["agrepa_fast.bench", "run", "all", "--device", "cuda", "--out", str(out)]
    out.unlink(missing_ok=True)  # of an earlier run on the same day
    run_step(["agrepa_fast", "doctor"], DOCTOR, root, log)
    codes = [run_step([*bench, "--headlines"], left(HEADLINES_BY), root, log)]
    tests = tests_of(root)
    if importlib.util.find_spec("pytest") is None:
        _say("\nthe tests are left out: pytest is not installed", log)
    elif tests:
        options = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        codes.append(run_step(["pytest", *options, *tests], min(TESTS, left(LIMIT)), root, log))
    before, resume = _seconds(out), []
    if before is not None:
        resume = ["--resume", str(out)]
    # A resumed run counts the time of its first part.
    budget = max(0.0, left(LIMIT) - RESERVE) + (before or 0.0)
    codes.append(run_step([*bench, *resume, "--budget", f"{budget:.0f}"], left(LIMIT), root, log))
    return codes


def _seconds(out: Path) -> float | None:
    """How long the run that left `out` took; None if it left nothing to resume."""
    try:
        seconds: Any = results.read(out)["seconds"]
    except Exception:
        return None
    return float(seconds)


def tests_of(root: Path) -> list[str]:
    """Paths of the tests that need a device, relative to the checkout, those likeliest to fail first."""
    tests = root / "tests"
    first = [tests / name for name in TEST_ORDER]
    rest = [path for path in sorted((tests / "gpu").glob("test_*.py")) if path not in first]
    return [str(path.relative_to(root)) for path in [*first, *rest] if path.exists()]


def name_of(device: str, now: datetime.datetime) -> str:
    """ "NVIDIA H200" on a day gives "gpu-nvidia-h200-20260101"."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"gpu-{slug}-{now:%Y%m%d}"


@contextlib.contextmanager
def _signals() -> Any:
    """Let SIGTERM end the steps as SIGINT does.

    Both handlers are set, since a shell's background job ignores SIGINT, and its children would too.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_step(module: list[str], seconds: float, root: Path, log: TextIO) -> int:
    """Run `python -m MODULE ...` from the checkout, with its output on the screen and in the log.

    When its time is up it gets SIGINT, so that its traceback says where it is. It runs in a process group of its own,
    which is killed afterwards: a process that is left would disturb later timings.
    """
    _say(f"\n$ python -m {' '.join(module)}", log)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    reader.start()
    ended = ""
    try:
        process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        ended = f"ended after {seconds:.0f} s; what it had written is kept"
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        reader.join(GRACE)
    if ended:
        _say(ended, log)
    return code


def _copy(lines: Any, log: TextIO) -> None:
    for line in lines:
        _say(line.rstrip("\n"), log)


def _say(line: str, log: TextIO) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


if __name__ == "__main__":
    sys.exit(main())
