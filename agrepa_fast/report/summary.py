"""The tiles at the top of the report, and the line that says how the run stands."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from statistics import median

from . import html
from .folder import RunFolder, by_teacher
from .log import SIMILARITIES, Log, group, last_entry, last_step, number, series, similarity_keys, similarity_name


def remark(run_dir: Path) -> str:
    """A warning that a run on the built-in corpus does not show a gain; empty for a run on other clips."""
    if not (run_dir / "corpus" / "corpus.json").exists():
        return ""
    return (
        "a run on the built-in corpus shows how training goes, not what alignment gains; "
        "docs/evidence.md says what was measured"
    )


def status(run: RunFolder) -> str:
    """One line: finished, interrupted or neither, at which step; resumes; lines of the log that cannot be read."""
    log, whole_log = run.log, run.whole_log
    state = next(
        (entry for entry in reversed(log) if entry.get("event") in ("start", "resume", "interrupted", "end")),
        {},
    )
    step = last_step(log)
    where = f" at step {html.count(step)}" if step is not None else ""
    if state.get("event") == "end":
        words = f"Finished{where}"
    elif state.get("event") == "interrupted":
        words = f"Interrupted{where}; it can be resumed"
    elif log:
        words = f"No end recorded; last entry{where}" if where else "No end recorded"
    else:
        words = "No log recorded"
    resumes = sum(entry.get("event") == "resume" for entry in whole_log)
    if resumes:
        words += f", resumed {'once' if resumes == 1 else f'{resumes} times'}"
    unreadable = [entry.get("line") for entry in whole_log if entry.get("event") == "unreadable"]
    if unreadable:
        lines = ", ".join(str(line) for line in unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        words += f". Unreadable in log.jsonl, left out: line{'s' if len(unreadable) > 1 else ''} {lines}"
    return escape(words)


def section(run: RunFolder) -> str:
    """Six tiles."""
    log, selection, skipped = run.log, run.selection, len(run.skipped)
    start = last_entry(log, "start")
    clips = group(start, "clips")
    tiles = []

    event, steps, values = _first_recorded(log, "flow_loss")
    title = "Valid flow loss" if event == "valid" else "Train flow loss" if event else "Flow loss"
    note = ""
    if len(values) > 1:
        ratio = f"last / first {html.significant(values[-1] / values[0], 3)}" if values[0] else "first is zero"
        note = f"{ratio}, step {html.count(steps[0])} to {html.count(steps[-1])}"
    elif values:
        note = f"step {html.count(steps[0])}"
    tiles.append(html.tile(title, html.span(values), note))

    first, last, shared, event = _mean_cosines(log)
    note = f"{event}, mean over {shared} teacher/layer pair{'s' if shared != 1 else ''}" if shared else ""
    name = similarity_name(similarity_keys(log)).capitalize()
    tiles.append(html.tile(name, f"{first:.4f} &rarr; {last:.4f}" if shared else "", note))

    chosen = selection.teachers if selection else {}
    layers = by_teacher({name: ", ".join(map(str, aligned.layers)) for name, aligned in chosen.items()})
    weights = by_teacher({name: ", ".join(f"{w:.2f}" for w in aligned.weights) for name, aligned in chosen.items()})
    tiles.append(html.tile("Selected layers", escape(layers), f"weights {escape(weights)}" if weights else ""))

    train, valid = number(clips.get("train")), number(clips.get("valid"))
    counts = [f"{html.count(valid)} valid"] if valid is not None else []
    if counts or skipped:
        counts.append(f"{html.count(skipped)} skipped")
    tiles.append(html.tile("Training clips", html.count(train) if train is not None else "", ", ".join(counts)))

    seconds = number(last_entry(log, "end").get("seconds"))
    step = last_step(log)
    tiles.append(
        html.tile(
            "Time",
            html.duration(seconds) if seconds is not None else "",
            f"{html.count(step)} steps" if step is not None else "",
        )
    )

    speed, frames = (
        series(log, "train", "samples_per_second")[1],
        series(log, "train", "frames_per_second")[1],
    )
    note = "median"
    if len(frames):
        note += f", {html.count(median(frames))} frames/s"
    tiles.append(
        html.tile(
            "Samples per second", html.significant(median(speed)) if len(speed) else "", note if len(speed) else ""
        )
    )
    return "".join(tiles)


def _first_recorded(log: Log, key: str) -> tuple[str, list[float], list[float]]:
    """Event, steps and values of `key`: from the validation where it was run, else from training."""
    for event in ("valid", "train"):
        steps, values = series(log, event, key)
        if len(values):
            return event, steps.tolist(), values.tolist()
    return "", [], []


def _mean_cosines(log: Log) -> tuple[float, float, int, str]:
    """First and last mean cosine over the pairs that both entries hold, how many pairs, and in which event.

    Layers may change while training: a mean over different pairs would not be comparable.
    """
    for event in ("valid", "train"):
        entries = [
            {key: value for key in entry if key.startswith(SIMILARITIES) and (value := number(entry[key])) is not None}
            for entry in log
            if entry.get("event") == event
        ]
        entries = [entry for entry in entries if entry]
        if entries:
            shared = sorted(entries[0].keys() & entries[-1].keys())
            if shared:
                first, last = (sum(entry[key] for key in shared) / len(shared) for entry in (entries[0], entries[-1]))
                return first, last, len(shared), event
    return math.nan, math.nan, 0, ""
