"""`make gpu`: doctor, headline problems, tests and all other problems on a machine with a GPU, in under nine minutes.

`python -m agrepa_fast.bench.gpu [FOLDER]` leaves gpu-NAME.json and gpu-NAME.log in FOLDER (default: bench/results of
the checkout). The order is: doctor; the headline problems, within four minutes; the tests, those first that are
likeliest to fail; all other problems. Both files grow as results come, so a run that is cut short leaves what it
measured. The last lines of the log say how each step ended and why each failed part failed. It needs the checkout,
torch and triton; the tests also need pytest, and are left out without it.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from agrepa_fast.errors import UserError

from . import results
from .environment import checkout

# Seconds since the start.
HEADLINES_BY = 240.0
LIMIT = 520.0
# Seconds of a step.
DOCTOR, TESTS = 15.0, 150.0
HEADLINE_RESERVE = 15.0  # the last rival of the headlines is built so long before their end
RESERVE = 45.0  # no problem is started when less time is left
GRACE = 8.0  # between SIGINT and SIGKILL
CAUSES = 40  # lines of the summary about failed parts

# Tests that are likely to fail, or whose failure costs most, come first. Each group has a process of its own, because
# after a failure of the device every later call of the process fails.
TEST_ORDER = (("gpu/test_step.py",), ("kernels/values", "gpu/test_kernels.py"), ("gpu/test_attribution.py",))


@dataclass
class Step:
    """How a step ended. `failures` are the lines of its output that name what failed."""

    name: str
    code: int
    ended: str
    failures: list[str] = field(default_factory=list)


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
    steps: list[Step] = []
    with _signals(), open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        try:
            _run(root, folder / f"{name}.json", log, steps)
        finally:
            for line in summary(steps, folder / f"{name}.json"):
                _say(line, log)
    print(f"{folder / name}.json, {folder / name}.log")
    return 1 if any(step.code for step in steps if step.name != "doctor") else 0


def summary(steps: Sequence[Step], out: Path) -> list[str]:
    """Lines that say how each step ended, and the cause of each failed part in one line."""
    lines = ["", "how it ended", *(f"  {step.name:<22}{step.ended}" for step in steps)]
    causes = [failure for step in steps for failure in step.failures]
    try:
        result = results.read(out)
    except UserError as error:
        lines.append(f"  no figures: {error}")
    else:
        lines.append(f"  {len(result['problems'])} problems measured, {len(result['skipped'])} skipped")
        for problem in result["problems"]:
            where = f"{problem['case']} {problem['key']}"
            if not problem["gate"]["passed"]:
                causes.append(f"{where}: ours is not compared, {problem['gate']['reason']}")
            for row in problem["rows"]:
                if row["status"] not in ("ok", "unavailable"):
                    causes.append(f"{where}: {row['provider']} {row['status']}, {row['reason']}")
        left_out: dict[str, list[str]] = {}
        for item in result["skipped"]:
            left_out.setdefault(item["reason"], []).append(f"{item['case']} {item['key']}")
        for reason, places in left_out.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            causes.append(f"{places[0]}{more}: {reason}")
    causes = list(dict.fromkeys(causes))
    if causes:
        lines += ["what failed or was left out", *(f"  {cause}" for cause in causes[:CAUSES])]
    if len(causes) > CAUSES:
        lines.append(f"  and {len(causes) - CAUSES} more, see above")
    return lines


def _run(root: Path, out: Path, log: TextIO, steps: list[Step]) -> None:
    """Run all steps, and add how each ended to `steps`."""
    began = time.monotonic()

    def left(until: float) -> float:
        return until - (time.monotonic() - began)

    bench = ["agrepa_fast.bench", "run", "all", "--device", "cuda", "--out", str(out)]
    out.unlink(missing_ok=True)  # of an earlier run on the same day

    def run(name: str, module: list[str], seconds: float) -> None:
        steps.append(Step(name, 1, "did not end"))
        steps[-1] = run_step(name, module, seconds, root, log)

    run("doctor", ["agrepa_fast", "doctor"], DOCTOR)
    limit = left(HEADLINES_BY)
    run("headlines", [*bench, "--headlines", "--budget", f"{max(0.0, limit - HEADLINE_RESERVE):.0f}"], limit)
    options = ["-q", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    tests_end = TESTS + time.monotonic() - began
    if importlib.util.find_spec("pytest") is None:
        _say("\nthe tests are left out: pytest is not installed", log)
        steps.append(Step("tests", 0, "left out: pytest is not installed"))
    else:
        for number, group in enumerate(tests_of(root), 1):
            seconds = min(left(tests_end), left(LIMIT))
            if seconds < 1.0:
                steps.append(Step(f"tests, part {number}", 1, f"not begun, the time was over: {' '.join(group)}"))
            else:
                run(f"tests, part {number}", ["pytest", *options, *group], seconds)
    before, resume = _seconds(out), []
    if before is not None:
        resume = ["--resume", str(out)]
    # A resumed run counts the time of its first part.
    budget = max(0.0, left(LIMIT) - RESERVE) + (before or 0.0)
    run("other problems", [*bench, *resume, "--budget", f"{budget:.0f}"], left(LIMIT))


def _seconds(out: Path) -> float | None:
    """How long the run that left `out` took; None if it left nothing to resume."""
    try:
        return float(results.read(out)["seconds"])
    except (UserError, KeyError, TypeError, ValueError):  # no file, or one without a number of seconds
        return None


def tests_of(root: Path) -> list[list[str]]:
    """Paths of the tests that need a device, relative to the checkout, in groups; those likeliest to fail first."""
    tests = root / "tests"
    groups = [[tests / name for name in group] for group in TEST_ORDER]
    first = [path for group in groups for path in group]
    groups[-1] += [path for path in sorted((tests / "gpu").glob("test_*.py")) if path not in first]
    named = [[str(path.relative_to(root)) for path in group if path.exists()] for group in groups]
    return [group for group in named if group]


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


def run_step(name: str, module: list[str], seconds: float, root: Path, log: TextIO) -> Step:
    """Run `python -m MODULE ...` from the checkout, with its output on the screen and in the log.

    When its time is up it gets SIGINT, so that its traceback says where it is. It runs in a process group of its own,
    which is killed afterwards: a process that is left would disturb later timings.
    """
    _say(f"\n$ python -m {' '.join(module)}", log)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in a library leaves the Python lines that led to it
    }
    began, failures = time.monotonic(), []  # type: tuple[float, list[str]]
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
    reader = threading.Thread(target=_copy, args=(process.stdout, log, failures), daemon=True)
    reader.start()
    cut = False
    try:
        process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        cut = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        reader.join(GRACE)
    lasted = time.monotonic() - began
    if cut:
        ended = f"ended after {seconds:.0f} s; what it had written is kept"
        _say(ended, log)
    elif code < 0:
        ended = f"killed by {signal.Signals(-code).name} after {lasted:.0f} s"
    else:
        ended = f"{'passed' if code == 0 else f'failed (exit code {code})'} in {lasted:.0f} s"
    return Step(name, code, ended, failures)


def _copy(lines: Any, log: TextIO, failures: list[str]) -> None:
    """Show and keep the lines; collect those by which pytest names what failed, and the last one of a traceback."""
    trace = False
    for line in lines:
        line = line.rstrip("\n")
        _say(line, log)
        if re.match(r"(FAILED|ERROR) \S+", line):
            failures.append(line)
        elif trace and re.match(r"[A-Za-z_][\w.]*(: |$)", line):
            if not line.startswith("KeyboardInterrupt"):
                failures.append(line)
            trace = False
        trace = trace or line.startswith("Traceback (most recent call last)")


def _say(line: str, log: TextIO) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


if __name__ == "__main__":
    sys.exit(main())
