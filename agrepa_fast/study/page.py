"""report.html of a study: every arm's numbers, pictures and layers, in one file that needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..report import html, write_page
from . import tables
from .pictures import plot_curves, plot_differences, plot_losses


def write_study_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write report.html and its pictures into a study's folder. Returns its path.

    Raises:
        UserError: something cannot be written, or matplotlib is not installed.
    """
    head = f'<p class="status">{escape(tables.status(result))}</p>'
    body = "".join(f'<p class="note">{escape(note)}</p>' for note in tables.notes(result))
    body = f"<section>{body}</section>"
    for number, setting in enumerate(result["settings"]):
        body += f"<section><h2>{escape(tables.title(setting))}</h2>{_setting(folder, number, setting)}</section>"
    if result["runs"]["failed"]:
        body += f"<section><h2>Failed runs</h2>{html.facts(result['runs']['failed'].items())}</section>"
    body += (
        "<section><h2>How it was made</h2>"
        f"{html.facts([('command', ' '.join(result['command'])), ('devices', ', '.join(result['devices']))])}"
        f"{html.facts(result['versions'].items())}"
        f"<details><summary>Study file</summary><pre>{escape(result['file'])}</pre></details></section>"
    )
    return write_page(folder / "report.html", "Study", result["study"], head, body)


def _setting(folder: Path, number: int, setting: Mapping[str, Any]) -> str:
    parts = []
    if setting["comparisons"]:
        parts.append(f"<h3>Asked first</h3>{_table(*tables.comparisons_table(setting))}<h3>Every arm</h3>")
    parts.append(_table(*tables.table(setting)))
    parts.append(f"<h3>Speed</h3>{_table(*tables.speed_table(setting))}")
    for kind, plot, label in (
        ("differences", plot_differences, "Difference of the final loss of every arm, with intervals"),
        ("losses", plot_losses, "Validation loss of every arm over the steps, means over seeds"),
        ("curves", plot_curves, "Validation loss of every arm less that of none; bands: lowest to highest seed"),
    ):
        figure = plot(setting)
        if figure is not None:
            parts.append(f"<h3>{escape(label)}</h3>")
            parts.append(html.picture(folder / f"{kind}-{number}.png", figure, f"{label}, {setting['setting']}"))
    if setting["generated"]:
        parts.append(f'<h3>Generated audio</h3><p class="note">{escape(tables.GENERATED)}</p>')
        parts.append(_table(*tables.generated_table(setting)))
    parts.append(f"<h3>Aligned layers (0-based)</h3>{_table(*tables.layers_table(setting))}")
    return "".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    cells = [[re.sub(r"\*\*(.*?)\*\*", r"<strong>\1</strong>", escape(cell)) for cell in row] for row in rows]
    for row in cells:
        row[0] = f'<span style="white-space:nowrap">{row[0]}</span>'  # a wide table would break an arm's name
    return html.table([escape(cell) for cell in header], cells)
