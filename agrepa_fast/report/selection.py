"""The section "Selected layers": selection.json, and the probes that led to it."""

from __future__ import annotations

from html import escape

from . import html
from .folder import RunFolder
from .log import group

PROBES_SHOWN = 12


def section(run: RunFolder) -> str:
    log, selection = run.log, run.selection
    parts = [run.selection_problem]
    if selection is not None:
        rows = [[str(layer), f"{weight:.4f}"] for layer, weight in zip(selection.layers, selection.weights)]
        parts.append(html.table(["layer", "weight"], rows))
        parts.append(html.facts(selection.facts.items()))
    probes = [entry for entry in log if entry.get("event") == "probe"]
    if probes:
        rows = []
        for probe in probes[-PROBES_SHOWN:]:
            choice = group(probe, "selection")
            layers, weights = choice.get("layers"), choice.get("weights")
            rows.append(
                [
                    html.shown(probe.get("step")),
                    escape(", ".join(map(str, layers))) if isinstance(layers, list) else "",
                    escape(", ".join(html.shown(weight) for weight in weights)) if isinstance(weights, list) else "",
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
