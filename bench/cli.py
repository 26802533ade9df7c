"""`agrepa bench`: list, run, report, compare, tune. `main(argv)` is the whole of it."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agrepa_fast.errors import UserError

from . import results
from .case import Problem
from .cases import CASES, find
from .environment import checkout, conditions, environment
from .protocol import lane
from .roofline import measure_roofline
from .runner import run_problem
from .tables import compare_table, problem_table

QUICK_BUDGET = 170.0  # seconds: --quick ends within three minutes, even where other work shares the machine


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
    report = commands.add_parser("report", help="write tables and figures of README and docs from bench/results")
    report.add_argument("--check", action="store_true", help="change nothing; fail when something is out of date")
    compare = commands.add_parser("compare", help="two result files, row by row")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    tune = commands.add_parser("tune", help="measure launch configurations on this GPU and rewrite its table")
    tune.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"agrepa bench: {error}", file=sys.stderr)
        return 2


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: no {name} here ({torch.cuda.device_count()} CUDA devices); use cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _list(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    for name, case in CASES.items():
        print(f"{name}: {case.TITLE}")
        for problem in case.problems(arguments.scale, device):
            print(f"    {problem.key}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    if arguments.threads < 0:
        raise UserError(f"--threads: expected 1 or more, got {arguments.threads}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = {
        name: [problem for problem in case.problems(arguments.scale, device) if arguments.only in problem.key]
        for name, case in find(arguments.cases).items()
    }
    if not any(chosen.values()):
        raise UserError(f"--only: no problem of {', '.join(chosen)} has {arguments.only!r} in its key")
    stamp = datetime.datetime.now(datetime.UTC)
    out = arguments.out or Path("runs", "bench", f"{device.type}-{stamp:%Y%m%d-%H%M%S}.json")
    budget = arguments.budget
    if budget is None and arguments.scale == "quick":
        budget = QUICK_BUDGET
    result = run(chosen, device, arguments.scale, out, budget)
    refused = [problem for problem in result["problems"] if not problem["gate"]["passed"]]
    print(f"\n{len(result['problems'])} problems in {result['seconds']:.0f} s; {out}")
    if result["noise_floor"] is not None:
        print(f"noise floor {result['noise_floor']:.1%} (median over the problems; each has its own)")
    for problem in refused:
        print(f"REFUSED {problem['case']} {problem['key']}: {problem['gate']['reason']}")
    for item in result["skipped"]:
        print(f"skipped {item['case']} {item['key']}: {item['reason']}")
    return 1 if refused else 0


def run(
    chosen: Mapping[str, Sequence[Problem]],
    device: torch.device,
    scale: str,
    out: Path,
    budget: float | None = None,
) -> dict[str, Any]:
    """Measure the roofline, then every problem; the result file is rewritten after each one.

    An interrupt or an error leaves the file with what was done (`complete` false).
    """
    began = time.perf_counter()
    with lane(device):
        rates = measure_roofline(device, scale)
    result: dict[str, Any] = {
        "schema": 1,
        "complete": False,
        "scale": scale,
        "cases": list(chosen),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "environment": environment(device),
        "conditions": {"before": conditions(device), "after": None},
        "roofline": rates,
        "noise_floor": None,
        "problems": [],
        "skipped": [],
    }
    matmul = ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates["matmul_flops_per_s"].items())
    print(
        f"{result['environment']['device']}: copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul {matmul}",
        flush=True,
    )
    for case, problem in in_turn(chosen):
        spent = time.perf_counter() - began
        if budget is not None and spent > budget:
            reason = f"the budget of {budget:.0f} s was spent"
            result["skipped"].append({"case": case, "key": problem.key, "reason": reason})
            continue
        try:
            entry = run_problem(case, problem, device, scale, rates)
        except Exception as error:  # one problem must not cost the others
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            result["skipped"].append({"case": case, "key": problem.key, "reason": reason})
            print(f"\n{case} {problem.key}: {reason}", flush=True)
            continue
        result["problems"].append(entry)
        print("\n" + problem_table(entry), flush=True)
        _save(result, out, began, device)
    result["complete"] = not result["skipped"]
    _save(result, out, began, device)
    return result


def in_turn(chosen: Mapping[str, Sequence[Problem]]) -> Iterator[tuple[str, Problem]]:
    """The first problem of every case, then the second ones, and so on: a run cut short has seen every case."""
    for level in range(max(map(len, chosen.values()))):
        for case, problems in chosen.items():
            if level < len(problems):
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

    print(tune(device))
    return 0


_COMMANDS = {"list": _list, "run": _run, "report": _report, "compare": _compare, "tune": _tune}
