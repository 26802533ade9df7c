"""Generated audio in a study: runs `agrepa evaluate` on each trained run, and keeps the numbers of its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..evaluation.bootstrap import nested_mean
from ..training.checkpoint import write_whole

EVALUATED = "evaluated.json"  # in a run's folder: the options of agrepa evaluate, and what it measured
RECORDINGS = ("reference", "resynthesised")  # rows of an evaluation beside the run's own


@dataclass(frozen=True)
class Number:
    """One number of a metric. of: reference, resynthesised, or run. better: lower or higher."""

    metric: str
    column: str
    domain: str
    of: str
    better: str
    clips: int
    value: float

    @property
    def name(self) -> str:
        return f"{self.metric}: {self.column} ({self.domain})"


def evaluate(folder: Path, options: Sequence[str], threads: int) -> None:
    """Run `agrepa evaluate` on a trained run, in a process of its own, and keep its numbers in the run's folder.

    Raises:
        UserError: it failed; says why.
    """
    command = [sys.executable, "-m", "agrepa_fast", "evaluate", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"agrepa evaluate: {lines[-1].removeprefix('agrepa: error: ')}")
    result = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    facts = {"options": list(options), "numbers": [vars(number) for number in _numbers(result)]}
    write_whole(folder / EVALUATED, json.dumps(facts, allow_nan=False) + "\n")


def _numbers(result: Mapping[str, Any]) -> list[Number]:
    """Every number of an evaluation of one run."""
    return [
        Number(
            metric["title"],
            column,
            row["domain"],
            row["kind"] if row["kind"] in RECORDINGS else "run",
            better,
            row["clips"],
            row["values"][column]["value"],
        )
        for metric in result["metrics"]
        for row in metric["rows"]
        for column, better in metric["columns"].items()
        if column in row["values"]
    ]


def is_evaluated(folder: Path, options: Sequence[str]) -> bool:
    """Whether a run has been evaluated with these options."""
    try:
        return bool(json.loads((folder / EVALUATED).read_text(encoding="utf-8"))["options"] == list(options))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def read_numbers(folder: Path) -> list[Number]:
    """The numbers that `evaluate` kept of a run.

    Raises:
        UserError: the file is not what `evaluate` writes."""
    file = folder / EVALUATED
    try:
        return [Number(**each) for each in json.loads(file.read_text(encoding="utf-8"))["numbers"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not what a study writes ({error!r}); delete it to evaluate the run again") from None


def summary(arms: Mapping[str, Mapping[int, Sequence[Sequence[Number]]]], resamples: int) -> list[dict[str, Any]]:
    """Each number of the evaluations: its mean over seeds for the recordings and each arm, and differences to none.

    Intervals are over seeds alone, as a distance between two sets of clips has no part for each clip.

    Args:
        arms: {arm: {seed: the numbers of each of its draws}}.
    """
    everything = [number for seeds in arms.values() for draws in seeds.values() for each in draws for number in each]
    kinds = {number.name: number for number in everything}
    return [
        {
            "metric": kind.metric,
            "column": kind.column,
            "domain": kind.domain,
            "better": kind.better,
            "clips": sorted({number.clips for number in everything if number.name == name and number.of == "run"}),
            "recordings": {of: _over_seeds(_of_seeds(arms, name, of), resamples) for of in RECORDINGS},
            "arms": _arms({arm: _by_seed(seeds, name, "run") for arm, seeds in arms.items()}, resamples),
        }
        for name, kind in kinds.items()
    ]


def _by_seed(seeds: Mapping[int, Sequence[Sequence[Number]]], name: str, of: str) -> dict[int, float]:
    """{seed: the mean over its draws}."""
    values = {
        seed: [number.value for each in draws for number in each if (number.name, number.of) == (name, of)]
        for seed, draws in seeds.items()
    }
    return {seed: sum(each) / len(each) for seed, each in values.items() if each}


def _of_seeds(arms: Mapping[str, Mapping[int, Sequence[Sequence[Number]]]], name: str, of: str) -> dict[int, float]:
    """{seed: a number of its recordings}, which are the same for all arms."""
    values: dict[int, float] = {}
    for seeds in arms.values():
        values = _by_seed(seeds, name, of) | values
    return values


def _over_seeds(values: Mapping[int, float], resamples: int) -> dict[str, Any] | None:
    if not values:
        return None
    groups = [torch.tensor([value], dtype=torch.float64) for value in values.values()]
    by_seed = {str(seed): value for seed, value in values.items()}
    return {**nested_mean(groups, resamples=resamples).as_dict(), "by_seed": by_seed, "seeds": len(values)}


def _arms(arms: Mapping[str, Mapping[int, float]], resamples: int) -> list[dict[str, Any]]:
    none = arms.get("none", {})
    rows = []
    for name, values in arms.items():
        less = {seed: value - none[seed] for seed, value in values.items() if seed in none and name != "none"}
        difference = _over_seeds(less, resamples)
        if difference is not None:
            difference["lower"] = sum(value < 0 for value in less.values())
        if values:
            rows.append({"arm": name, "mean": _over_seeds(values, resamples), "less_none": difference})
    return rows
