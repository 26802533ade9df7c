"""`agrepa bench`: list, run, report, compare, tune."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agrepa_fast.errors import UserError
from agrepa_fast.training import environment as devices

from . import results
from .broken import Broken, device_error, one_line
from .case import Problem
from .cases import CASES, find
from .environment import checkout, conditions, environment
from .headlines import HEADLINES, is_headline, seconds_for
from .protocol import lane
from .roofline import measure_roofline
from .runner import CutShort, count_launches, run_problem
from .tables import compare_table, problem_table

_RAN: list[str] = []  # arguments of this run, for a restart
QUICK_BUDGET = 170.0  # seconds; --quick ends within three minutes, also on a busy machine
LAUNCH_SECONDS = 20.0  # for counting launches, when all problems are timed or the budget is spent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 1 when a gate refused, 2 on a user's mistake."""
    parser = argparse.ArgumentParser(prog="agrepa bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the cases and their problems")
    run = commands.add_parser("run", help="measure; results go to one JSON file")
    for command in (listing, run):
        command.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1")
        size = command.add_mutually_exclusive_group()
        size.add_argument("--quick", action="store_const", const="quick", dest="scale", help="minutes on two cores")
        size.add_argument(
            "--toy", action="store_const", const="toy", dest="scale", help="smoke test: sizes mean nothing"
        )
        command.set_defaults(scale="full")
    run.add_argument("cases", nargs="+", metavar="CASE", help=f"all, or some of {', '.join(CASES)}")
    run.add_argument("--only", default="", metavar="TEXT", help="only problems with TEXT in their key (see list)")
    run.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's choice")
    run.add_argument("--out", type=Path, help="default: runs/bench/DEVICE-TIME.json")
    run.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="start no problem after so long, list it as skipped (--quick: 170)",
    )
    # A restart passes these two; users do not.
    run.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    run.add_argument("--barred", nargs=4, action="append", default=[], help=argparse.SUPPRESS)
    run.add_argument("--headlines", action="store_true", help="only the problems that README's first table shows")
    report = commands.add_parser("report", help="write tables and figures of README and docs from bench/results")
    report.add_argument("--check", action="store_true", help="change nothing; fail when something is out of date")
    compare = commands.add_parser("compare", help="two result files, row by row")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    tune = commands.add_parser("tune", help="measure launch configurations on this GPU and rewrite its table")
    tune.add_argument("--device", default="cuda")
    tune.add_argument("--out", type=Path, help="write the table here instead, anew after each kernel")
    arguments = parser.parse_args(argv)
    _RAN[:] = sys.argv[1:] if argv is None else argv
    try:
        return _COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"agrepa bench: {error}", file=sys.stderr)
        return 2


def pick_device(name: str) -> torch.device:
    """The device of that name. A GPU gets its number, as tensors on it have.

    Raises:
        UserError: no such device here.
    """
    device = devices.pick_device(name, "--device")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _list(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    listed, without = _problems(["all"], arguments.scale, device)
    for name, problems in listed.items():
        print(f"{name}: {CASES[name].TITLE}")
        for problem in problems:
            print(f"    {problem.key}")
    for item in without:
        print(f"{item['case']}: {item['reason']}")
    return 0


def _problems(
    names: list[str], scale: str, device: torch.device
) -> tuple[dict[str, list[Problem]], list[dict[str, str]]]:
    """{case: its problems}, and the cases that cannot be run here, as in `skipped` of a result.

    Raises:
        UserError: a case that was asked for by name cannot be run.
    """
    listed: dict[str, list[Problem]] = {}
    without = []
    for name, case in find(names).items():
        try:
            listed[name] = case.problems(scale, device)
        except UserError as error:  # a package is missing
            if "all" not in names:
                raise
            without.append({"case": name, "key": "all problems", "reason": str(error)})
    return listed, without


def _run(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    if arguments.threads < 0:
        raise UserError(f"--threads: expected 1 or more, got {arguments.threads}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    listed, without = _problems(arguments.cases, arguments.scale, device)
    chosen = {name: [p for p in problems if arguments.only in p.key] for name, problems in listed.items()}
    if arguments.headlines:
        chosen = {name: [p for p in problems if is_headline(name, p.params)] for name, problems in chosen.items()}
    if not any(chosen.values()):
        raise UserError(f"--only: no problem of {', '.join(chosen)} has {arguments.only!r} in its key")
    stamp = datetime.datetime.now(datetime.UTC)
    out = arguments.out or Path("runs", "bench", f"{device.type}-{stamp:%Y%m%d-%H%M%S}.json")
    budget = arguments.budget
    if budget is None and arguments.scale == "quick":
        budget = QUICK_BUDGET
    resumed = results.read(arguments.resume) if arguments.resume else None
    barred = tuple(arguments.barred)
    result = run(chosen, device, arguments.scale, out, budget, resumed, barred, restart, without)
    if device.type == "cuda" and not arguments.headlines:
        end = time.monotonic() + LAUNCH_SECONDS
        for entry in result["problems"]:
            problem = next((p for p in chosen.get(entry["case"], ()) if p.key == entry["key"]), None)
            if problem is not None and time.monotonic() < end:
                with contextlib.suppress(Exception):  # the counts are left out, and nothing comes after them
                    count_launches(entry, problem, device)
                results.write(out, result)
    refused = [problem for problem in result["problems"] if not problem["gate"]["passed"]]
    print(f"\n{len(result['problems'])} problems in {result['seconds']:.0f} s; {out}")
    if result["noise_floor"] is not None:
        print(f"noise floor {result['noise_floor']:.1%} (median over the problems; each has its own)")
    for problem in refused:
        print(f"REFUSED {problem['case']} {problem['key']}: {problem['gate']['reason']}")
    for item in result["skipped"]:
        print(f"skipped {item['case']} {item['key']}: {item['reason']}")
    return 1 if refused else 0


Restart = Callable[[Path, Sequence[tuple[str, str, str, str]]], None]
Barred = tuple[str, str, str, str]  # case, key, provider or ALL, how it broke a process
ALL = "all"  # in the place of a provider: the problem itself broke a process


def run(
    chosen: Mapping[str, Sequence[Problem]],
    device: torch.device,
    scale: str,
    out: Path,
    budget: float | None = None,
    resumed: dict[str, Any] | None = None,
    barred: Sequence[Sequence[str]] = (),
    restart: Restart | None = None,
    without: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Measure the roofline, then every problem, headline problems first. The result file is rewritten after each one.

    An interrupt or an error leaves the file with what was measured (`complete` is false).

    Args:
        resumed: the result of an earlier process to go on with; its problems are not run again.
        budget: no problem is started after so many seconds; on a GPU no rival is built either.
        barred: (case, key, provider, reason) of what broke an earlier process.
        restart: called with the file and all that is barred when a provider has left CUDA unusable, to go on in a new
            process. None skips the rest of the run.
        without: cases that cannot be run here, to be listed among the skipped problems.

    Raises:
        KeyboardInterrupt: as it came, when the file says what was cut short.
    """
    began = time.perf_counter() - (0.0 if resumed is None else resumed["seconds"])
    result = _begin(chosen, device, scale) if resumed is None else {**resumed, "skipped": []}
    result["skipped"] += map(dict, without)
    done = {(problem["case"], problem["key"]) for problem in result["problems"]}
    spoiled = ""
    _save(result, out, began, device)  # so that there is a valid file from now on
    for case, problem in in_turn(chosen):
        if (case, problem.key) in done:
            continue
        spent = time.perf_counter() - began
        if spoiled or (budget is not None and spent > budget):
            reason = spoiled or f"the budget of {budget:.0f} s was spent"
            result["skipped"].append({"case": case, "key": problem.key, "reason": reason})
            continue
        reasons = {name: reason for of_case, key, name, reason in barred if (of_case, key) == (case, problem.key)}
        if ALL in reasons:
            result["skipped"].append({"case": case, "key": problem.key, "reason": reasons[ALL]})
            continue
        try:
            seconds = seconds_for(case, problem.params, device.type)
            if seconds is not None and budget is not None:
                seconds = min(seconds, max(1.0, budget - spent))
            entry = run_problem(case, problem, device, scale, result["roofline"], reasons, seconds)
        except CutShort as stop:
            print(f"\n{case} {problem.key}: {stop}", flush=True)
            result["skipped"].append({"case": case, "key": problem.key, "reason": str(stop)})
            _save(result, out, began, device)
            raise
        except Broken as error:
            print(f"\n{case} {problem.key}: {error}", flush=True)
            if restart is not None and error.name not in reasons:
                _save(result, out, began, device)
                restart(out, [*(tuple(item) for item in barred), (case, problem.key, error.name, str(error))])  # type: ignore[list-item]
            spoiled = f"nothing more can be trusted in this process ({error})"[:300]
            result["skipped"].append({"case": case, "key": problem.key, "reason": spoiled})
            continue
        except Exception as error:  # a problem that fails must not end the run
            reason = f"{type(error).__name__}: {one_line(error)}"
            print(f"\n{case} {problem.key}: {reason}", flush=True)
            dead = device_error(device)
            if dead is not None and restart is not None:
                _save(result, out, began, device)
                restart(out, [*(tuple(item) for item in barred), (case, problem.key, ALL, reason)])  # type: ignore[list-item]
            spoiled = "" if dead is None else f"the device has failed in this process ({dead})"[:300]
            result["skipped"].append({"case": case, "key": problem.key, "reason": reason})
            _save(result, out, began, device)
            continue
        result["problems"].append(entry)
        print("\n" + problem_table(entry), flush=True)
        _save(result, out, began, device)
    result["complete"] = not result["skipped"]
    _save(result, out, began, device)
    return result


def _begin(chosen: Mapping[str, Sequence[Problem]], device: torch.device, scale: str) -> dict[str, Any]:
    """A result without problems: the machine and its roofline."""
    with lane(device):
        rates = measure_roofline(device, scale)
    described = environment(device)
    matmul = ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates["matmul_flops_per_s"].items())
    print(
        f"{described['device']}: copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul {matmul}",
        flush=True,
    )
    return {
        "schema": 1,
        "complete": False,
        "scale": scale,
        "cases": list(chosen),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "environment": described,
        "conditions": {"before": conditions(device), "after": None},
        "roofline": rates,
        "noise_floor": None,
        "problems": [],
        "skipped": [],
    }


def restart(out: Path, barred: Sequence[Barred]) -> None:
    """Replace this process by a new one that goes on with `out`, since it can no longer use CUDA."""
    arguments = [item for item in _RAN if item != "--resume"]
    for flag, values in (("--resume", 1), ("--barred", 4), ("--out", 1)):
        while flag in arguments:
            place = arguments.index(flag)
            del arguments[place : place + 1 + values]
    arguments += ["--out", str(out), "--resume", str(out)]
    for item in barred:
        arguments += ["--barred", *item]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "agrepa_fast.bench", *arguments])


def in_turn(chosen: Mapping[str, Sequence[Problem]]) -> Iterator[tuple[str, Problem]]:
    """Problems in the order in which they run: the headlines, then the first problem of every case, the second ones,
    ...

    So a run that is cut short has measured the headlines and something of every case.
    """
    first = []
    for match in HEADLINES:
        for case, problems in chosen.items():
            first += [(case, problem) for problem in problems if match.fits(case, problem.params)]
    yield from first
    early = {(case, problem.key) for case, problem in first}
    for level in range(max(map(len, chosen.values()))):
        for case, problems in chosen.items():
            if level < len(problems) and (case, problems[level].key) not in early:
                yield case, problems[level]


def _save(result: dict[str, Any], out: Path, began: float, device: torch.device) -> None:
    floors = sorted(p["noise_floor"] for p in result["problems"] if p["noise_floor"] is not None)
    result["noise_floor"] = floors[len(floors) // 2] if floors else None
    result["seconds"] = round(time.perf_counter() - began, 1)
    result["conditions"]["after"] = conditions(device)
    results.write(out, result)


def _report(arguments: argparse.Namespace) -> int:
    from .report import write_report

    root = checkout()
    if root is None:
        raise UserError(
            "report: rewrites README, docs and figures of a checkout; this package is installed without one"
        )
    changed = write_report(root, check=arguments.check)
    for path in changed:
        print(f"{'out of date' if arguments.check else 'written'}: {path.relative_to(root)}")
    return 1 if arguments.check and changed else 0


def _compare(arguments: argparse.Namespace) -> int:
    print(compare_table(results.read(arguments.before), results.read(arguments.after)))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    if device.type != "cuda":
        raise UserError(f"--device: tuning needs a CUDA device, got {device}")
    from agrepa_fast.kernels.tune import tune

    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print(tune(device, arguments.out))
    return 0


_COMMANDS = {"list": _list, "run": _run, "report": _report, "compare": _compare, "tune": _tune}
