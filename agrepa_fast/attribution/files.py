"""Read the CSV of scores that `LayerScores.to_csv` writes."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .scores import COLUMNS, LayerScores


def read_scores(path: str | Path) -> LayerScores:
    """Read a CSV that `LayerScores.to_csv` wrote. It does not contain the metric, so "rms" is assumed.

    Raises:
        UserError: a line does not fit; names the file and the line.
    """
    units: dict[tuple[tuple[int, ...], str], dict[int, float]] = defaultdict(dict)
    times: dict[int, Any] = {}
    domains: dict[int, Any] = {}
    clips: dict[int, Any] = {}
    noises: dict[int, Any] = {}
    names: dict[tuple[tuple[int, ...], str], str] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not set(COLUMNS) <= set(reader.fieldnames):
                raise UserError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
            for row in reader:
                try:
                    unit, sample, score, t = _parse(row)
                    if sample in units[unit]:
                        raise ValueError(f"a second score of sample {sample} for layer {row['layer']}{row['branch']}")
                    facts = (
                        (times, t),
                        (domains, row["domain"]),
                        (clips, int(row["clip"]) if row.get("clip") else None),
                        (noises, float(row["noise"]) if row.get("noise") else None),
                    )
                    if any(known.setdefault(sample, value) != value for known, value in facts):
                        raise ValueError(f"sample {sample} has another t, domain, clip or noise in an earlier line")
                    units[unit][sample] = score
                    if names.setdefault(unit, row.get("name") or "") != (row.get("name") or ""):
                        raise ValueError(f"layer {row['layer']}{row['branch']} has another name in an earlier line")
                except ValueError as error:
                    raise UserError(f"{path}:{reader.line_num}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    samples = sorted(times)
    if not units or any(sorted(scores) != samples for scores in units.values()):
        raise UserError(f"{path}: expected a score for each of the {len(samples)} samples of every layer")
    branches = tuple(branch for _, branch in units)
    if any(branches) != all(branches):
        raise UserError(f"{path}: expected a branch in every row or in none")
    known_times = [t for t in (times[n] for n in samples) if t is not None]
    return LayerScores(
        tuple(layers[0] for layers, _ in units),
        torch.tensor([[s[n] for n in samples] for s in units.values()], dtype=torch.float64),
        branches=branches if any(branches) else None,
        t=torch.tensor(known_times) if len(known_times) == len(samples) else None,
        domains=tuple(domains[n] for n in samples) if all(domains.values()) else None,
        clips=tuple(clips[n] for n in samples) if None not in clips.values() else None,
        noise_by_sample=(
            torch.tensor([noises[n] for n in samples], dtype=torch.float64) if None not in noises.values() else None
        ),
        names=tuple(names.values()) if all(names.values()) else (),
        sets=tuple(layers for layers, _ in units) if any(len(layers) > 1 for layers, _ in units) else None,
    )


def _parse(row: dict[str | Any, str | Any]) -> tuple[tuple[tuple[int, ...], str], int, float, float | None]:
    """Parse one line of the CSV into (layers, branch), sample, score and t. ValueError if a cell does not fit."""
    if None in row or None in row.values():  # a line longer or shorter than the header
        raise ValueError(f"expected {len(COLUMNS)} fields")
    layers, score = tuple(map(int, row["layer"].split("+"))), float(row["score"])
    if min(layers) < 0:
        raise ValueError(f"expected a 0-based layer, got {row['layer']}")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"expected a set of ascending layers, as 0+3, got {row['layer']}")
    if not math.isfinite(score):
        raise ValueError(f"the score is not finite: {row['score']}")
    return (layers, row["branch"]), int(row["sample"]), score, float(row["t"]) if row["t"] else None
