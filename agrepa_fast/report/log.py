"""The log of a run as the report reads it: log.jsonl, whose entries are dicts with an "event".

A number that is missing or not finite is left out; it is never an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Log = list[dict[str, Any]]

COSINE = "cosine/"
SIMILARITIES = (COSINE, "relation/", "cka/")  # prefixes of the metric that each alignment.objective logs
DOMAIN_LOSS = "flow_loss/"


def read_log(path: Path) -> Log:
    """The entries of a log.jsonl, in order.

    A last line that a crash cut short is dropped. Any other line that is not a JSON object comes back as
    `{"event": "unreadable", "line": n}`, n counted from 1, so that one bad line does not cost the report.
    Raises `UserError` where the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the log ({error.strerror}); give a run's log.jsonl") from error
    log: Log = []
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            log.append(entry)
        elif count < len(lines):  # every complete line ends with a newline, so the last piece is a torn one
            log.append({"event": "unreadable", "line": count})
    return log


def number(value: Any) -> float | None:
    """`value` as a float, or None where it is no finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:  # an integer beyond 1e308
        return None
    return converted if math.isfinite(converted) else None


def current_timeline(log: Log) -> Log:
    """The entries that still count: a resume at step s replaces whatever was logged before it beyond s."""
    kept: Log = []
    for entry in log:
        resumed_at = number(entry.get("step")) if entry.get("event") == "resume" else None
        if resumed_at is not None:
            kept = [old for old in kept if (number(old.get("step")) or 0.0) <= resumed_at]
        kept.append(entry)
    return kept


def series(log: Log, event: str, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps [n] and values [n], float64, of `key` in the entries of `event` with a finite number there."""
    points = [
        (step, value)
        for entry in log
        if entry.get("event") == event
        and (step := number(entry.get("step"))) is not None
        and (value := number(entry.get(key))) is not None
    ]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def keys_under(log: Log, prefix: str, events: tuple[str, ...] = ("train", "valid")) -> list[str]:
    """The keys that start with `prefix` in entries of `events`; numbers in them sort as numbers."""
    keys = {key for entry in log if entry.get("event") in events for key in entry}
    return sorted((key for key in keys if key.startswith(prefix) and key != prefix), key=_natural)


def last_entry(log: Log, event: str) -> dict[str, Any]:
    return next((entry for entry in reversed(log) if entry.get("event") == event), {})


def group(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """The dict under `key`; empty where the entry has none."""
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


PREDICTED = {"velocity": "velocity", "v": "v", "eps": "noise", "x0": "data"}


def process(log: Log) -> tuple[str, str]:
    """(what the network predicts, name of the path). Logs that name neither are of a velocity on the rectified path."""
    facts = group(last_entry(log, "start"), "process")
    return PREDICTED.get(str(facts.get("parametrisation")), "velocity"), str(facts.get("path", "rectified"))


def scored(log: Log) -> str:
    """The quantity whose change FoG-A measured: the velocity, or the network's own output."""
    facts = group(last_entry(log, "start"), "process")
    return "velocity" if facts.get("scored") == "velocity" else process(log)[0]


def last_step(log: Log) -> float | None:
    return next((step for entry in reversed(log) if (step := number(entry.get("step"))) is not None), None)


def similarity_keys(log: Log) -> list[str]:
    """The keys of all metrics of alignment: of the raw cosine, or of what another objective has in its place."""
    return [key for prefix in SIMILARITIES for key in keys_under(log, prefix)]


def similarity_name(keys: Sequence[str]) -> str:
    """What to call them together."""
    others = {prefix.rstrip("/") for prefix in SIMILARITIES[1:] for key in keys if key.startswith(prefix)}
    return f"similarity ({', '.join(sorted(others))})" if others else "raw cosine"


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "speech/2" before "speech/10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in key.split("/")]
