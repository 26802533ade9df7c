"""The tables of an evaluation as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text(result: Mapping[str, Any]) -> str:
    """All tables of an evaluation's JSON data, one below another."""
    return "\n\n".join(_table(metric) for metric in result["metrics"])


def _table(metric: Mapping[str, Any]) -> str:
    title = f"{metric['title']}: {metric['tool']}" if metric["tool"] else metric["title"]
    if metric["problem"]:
        return f"{title}\n  not measured: {metric['problem']}"
    columns = list(metric["columns"])
    head = ["", "domain", "clips", *(f"{name} ({better} is better)" for name, better in metric["columns"].items())]
    lines, notes = [head], []
    for row in metric["rows"]:
        count = f"{row['clips']}" if row["clips"] == row["of"] else f"{row['clips']} of {row['of']}"
        lines.append([row["name"], row["domain"], count, *(_cell(row["values"].get(name)) for name in columns)])
        notes.append(row["note"])
        if row["differences"]:
            differences = [_cell(row["differences"].get(name), sign=True) for name in columns]
            lines.append(["  less the first", "", "", *differences])
            notes.append("")
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    for i, note in enumerate(notes, start=1):
        if note:
            shown[i] += f"  [{note}]"
    return "\n".join([title, *shown])


def _cell(estimate: Mapping[str, Any] | None, sign: bool = False) -> str:
    if estimate is None:
        return "-"
    form = "+.4g" if sign else ".4g"
    interval = "" if estimate["low"] is None else f" ({estimate['low']:{form}} to {estimate['high']:{form}})"
    return f"{estimate['value']:{form}}{interval}"


def short(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
