"""What a run's folder holds, read once for all sections of the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from ..attribution.files import read_scores
from ..attribution.scores import LayerScores
from ..errors import UserError
from . import html
from .log import Log, current_timeline, read_log


@dataclass(frozen=True)
class Aligned:
    """The layers of one selection, their weights and, where these go by flow time, {t: weights}."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    by_time: dict[float, tuple[float, ...]]


@dataclass(frozen=True)
class Selection:
    """selection.json: one selection for all teachers (under an empty name) or one for each, and the other facts."""

    teachers: dict[str, Aligned]
    facts: dict[str, Any]

    def drawn(self) -> Aligned | dict[str, Aligned]:
        """As `plot_scores` takes it."""
        return self.teachers.get("", self.teachers)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
        log: the entries that still count; whole_log: all of them (a resume replaces those beyond its step).
        scores, selection: None where the run has none, or where the file is broken. Then scores_problem or
            selection_problem is a paragraph that says what is wrong.
        skipped: one log entry for each file that could not be used.
    """

    path: Path
    log: Log
    whole_log: Log
    scores: LayerScores | None
    scores_problem: str
    selection: Selection | None
    selection_problem: str
    skipped: Log


def read_folder(path: Path) -> RunFolder:
    """Read log.jsonl, foga.csv and selection.json of a run.

    Raises:
        UserError: no such folder, or a log that cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; give the folder that holds log.jsonl")
    log_path = path / "log.jsonl"
    whole_log = read_log(log_path) if log_path.exists() else []
    selection, selection_problem = _read_selection(path / "selection.json")
    scores, scores_problem = _read_scores(path / "foga.csv")
    if scores is not None and selection is not None and isinstance(selection.facts.get("metric"), str):
        scores = replace(scores, metric=selection.facts["metric"])  # the CSV does not hold the metric
    return RunFolder(
        path,
        current_timeline(whole_log),
        whole_log,
        scores,
        scores_problem,
        selection,
        selection_problem,
        _skipped(whole_log),
    )


def _read_scores(path: Path) -> tuple[LayerScores | None, str]:
    """The scores; or None, with a paragraph that says what is wrong with the file if there is one."""
    if not path.exists():
        return None, ""
    try:
        return read_scores(path), ""
    except (ValueError, OSError) as error:
        return None, f'<p class="missing">{escape(str(error))}</p>'


def _read_selection(path: Path) -> tuple[Selection | None, str]:
    if not path.exists():
        return None, ""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if "teachers" in facts:
            teachers = {str(name): _aligned(entry) for name, entry in facts.pop("teachers").items()}
        else:
            teachers = {"": _aligned(facts)}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        return None, f'<p class="missing">{escape(f"{path.name} cannot be shown: {reason}")}</p>'
    return Selection(teachers, facts), ""


def _aligned(entry: dict[str, Any]) -> Aligned:
    """One selection, taken out of the file's facts."""
    layers, weights = tuple(entry.pop("layers")), tuple(float(weight) for weight in entry.pop("weights"))
    if len(layers) != len(weights):
        raise ValueError(f"{len(layers)} layers but {len(weights)} weights")
    by_time = {}
    for t, scores in zip(entry.pop("t_grid", ()), zip(*entry.pop("scores", ()))):
        total = sum(scores) or 1.0
        by_time[float(t)] = tuple(score / total for score in scores)
    return Aligned(layers, weights, by_time)


def _skipped(log: Log) -> Log:
    """One entry for each skipped file; a resumed run names them again."""
    by_path: dict[str, dict[str, Any]] = {}
    for entry in log:
        if entry.get("event") == "skipped":
            by_path.setdefault(html.words(entry.get("path")), entry)
    return list(by_path.values())


def by_teacher(texts: dict[str, str]) -> str:
    """ "speech: 0, 4; audio: 0, 20"; the text alone for all teachers together."""
    return "; ".join(f"{name}: {text}" if name else text for name, text in texts.items())
