"""The section "Selected layers": selection.json, and the probes that led to it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from . import html
from .folder import RunFolder, by_teacher
from .log import group

PROBES_SHOWN = 12


def section(run: RunFolder) -> str:
    log, selection = run.log, run.selection
    parts = [run.selection_problem]
    if selection is not None:
        for name, aligned in selection.teachers.items():
            columns = [aligned.weights, *aligned.by_time.values()]
            rows = [[str(layer), *(f"{w:.4f}" for w in row)] for layer, *row in zip(aligned.layers, *columns)]
            title = f"<h3>{escape(name)}</h3>" if name else ""
            parts.append(title + html.table(["layer", "weight", *(f"at t {t:g}" for t in aligned.by_time)], rows))
        parts.append(html.facts(selection.facts.items()))
    probes = [entry for entry in log if entry.get("event") == "probe"]
    if probes:
        rows = []
        for probe in probes[-PROBES_SHOWN:]:
            choice = group(probe, "selection")
            teachers = group(choice, "teachers") or {"": choice}
            rows.append(
                [
                    html.shown(probe.get("step")),
                    escape(by_teacher({name: _listed(aligned, "layers", str) for name, aligned in teachers.items()})),
                    escape(
                        by_teacher(
                            {name: _listed(aligned, "weights", html.shown) for name, aligned in teachers.items()}
                        )
                    ),
                    html.shown(probe.get("seconds")),
                    html.shown(probe.get("block_evaluations")),
                ]
            )
        older = len(probes) - len(rows)
        parts.append(
            f"<h3>Probes</h3>{html.table(['step', 'layers', 'weights', 'seconds', 'block evaluations'], rows)}"
        )
        if older:
            parts.append(f'<p class="note">{html.count(older)} earlier probes are in log.jsonl.</p>')
    return "".join(parts) or html.MISSING


def _listed(entry: Any, key: str, shown: Callable[[Any], str]) -> str:
    """The list under `key` with commas; empty where there is none."""
    values = entry.get(key) if isinstance(entry, dict) else None
    return ", ".join(map(shown, values)) if isinstance(values, list) else ""
