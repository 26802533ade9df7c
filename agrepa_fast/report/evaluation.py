"""The section "Evaluation", from evaluation.json: a table for each metric."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from . import html
from .folder import RunFolder
from .log import number

FILE = "evaluation.json"


def section(run: RunFolder) -> str:
    file = run.path / "evaluation" / FILE
    return tables(file) if file.exists() else html.MISSING


def tables(file: Path) -> str:
    """The tables of an evaluation's JSON file; a paragraph that says so where the file is broken."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        return _facts(result) + "".join(_table(metric) for metric in result["metrics"])
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        return f'<p class="missing">{escape(f"{file.name} cannot be shown: {error!r}")}</p>'


def _facts(result: dict[str, Any]) -> str:
    lines = []
    for target in result["targets"]:
        words = f"{target['path']}"
        if target["kind"] == "run":
            sampler = ", ".join(f"{name} {value}" for name, value in target["sampler"].items())
            words += f": step {target['step']}, {target['weights']} weights, {sampler}"
        lines.append(words)
    method = result["method"]
    note = (
        f"Intervals hold the true value with {method['confidence']:.0%} confidence as far as clips are concerned "
        f"(bootstrap over clips, {method['resamples']} resamples, seed {method['seed']}). A difference is taken on the "
        "clips that both have."
    )
    paragraphs = [note, *lines, *result["notes"]]
    return "".join(f'<p class="note">{escape(html.words(line))}</p>' for line in paragraphs)


def _table(metric: dict[str, Any]) -> str:
    title = f"<h3>{escape(metric['title'])}</h3>"
    if metric["problem"]:
        return f'{title}<p class="missing">{escape("not measured: " + metric["problem"])}</p>'
    note = escape(f"{metric['tool']}. {metric['note']}")
    columns = metric["columns"]
    rows, chosen = [], []
    for row in metric["rows"]:
        count = f"{row['clips']}" if row["clips"] == row["of"] else f"{row['clips']} of {row['of']}"
        cells = [_cell(row["values"].get(name)) for name in columns]
        rows.append([escape(row["name"]), escape(row["domain"]), escape(row["note"]), count, *cells])
        chosen.append(row["kind"] in ("run", "folder"))
        if row["differences"]:
            cells = [_cell(row["differences"].get(name), "+") for name in columns]
            rows.append(['<span class="quiet">less the first</span>', escape(row["domain"]), "", "", *cells])
            chosen.append(False)
    titles = [f'{escape(name)} <span class="quiet">({escape(better)})</span>' for name, better in columns.items()]
    header = ["", "domain", "note", "clips", *titles]
    return f'{title}<p class="note">{note}</p>{html.table(header, rows, chosen, text_columns=3)}'


def _cell(estimate: dict[str, Any] | None, sign: str = "") -> str:
    if estimate is None or (value := number(estimate["value"])) is None:
        return "&ndash;"
    low, high = number(estimate["low"]), number(estimate["high"])
    interval = ""
    if low is not None and high is not None:
        interval = f' <span class="quiet">{low:{sign}.3g} to {high:{sign}.3g}</span>'
    return f"{value:{sign}.4g}{interval}"
