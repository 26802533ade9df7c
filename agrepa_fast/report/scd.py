"""The section "What layers store (LASP) and what they use (FoG-A)", from scd.json."""

from __future__ import annotations

import math
from html import escape

from ..attribution.scd import plot_scd, read_scd
from . import html
from .folder import RunFolder


def section(run: RunFolder) -> str:
    path = run.path / "scd.json"
    if not path.exists():
        return html.MISSING
    try:
        domains = read_scd(path)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f'<p class="missing">{escape(f"{path.name} cannot be shown: {error!r}")}</p>'
    if not domains:
        return html.MISSING
    rows = []
    for entry in domains:
        result = entry.result
        interval = f"{result.low:.2f} to {result.high:.2f}" if math.isfinite(result.low) else ""
        rows.append(
            [
                escape(entry.domain),
                escape(entry.teacher),
                f"{entry.scored} / {entry.fitted} / {entry.held_out}",
                ", ".join(map(str, result.most_used)),
                ", ".join(map(str, result.most_stored)),
                f"{result.overlap:.0%}",
                f"{result.spearman:.2f}" if math.isfinite(result.spearman) else "not defined",
                interval,
                f"{result.kendall:.2f}" if math.isfinite(result.kendall) else "not defined",
            ]
        )
    header = ["domain", "teacher", "clips", "most used", "most stored", "overlap"]
    header += ["Spearman", "95 % interval", "Kendall"]
    by_layer = [[str(layer)] for layer in domains[0].result.layers]
    columns = ["layer"]
    for entry in domains:
        columns += [escape(f"{entry.domain} {kind}".strip()) for kind in ("FoG-A", "LASP", "CKA")]
        for cells, values in zip(by_layer, zip(entry.result.foga, entry.result.stored, entry.cka), strict=True):
            cells += [html.significant(value) for value in values]
    return (
        '<p class="note">LASP: how well one frozen linear head, shared by all layers, reads the teacher out of the '
        "pooled state of clips that it was not fitted on; CKA: the same without a head. Clips: scored by FoG-A / the "
        "head fitted on / LASP measured on. The filled bars and points are the highest of each.</p>"
        + html.picture(run.path / "scd.png", plot_scd(domains), "FoG-A and LASP of every layer, by domain")
        + html.table(header, rows, text_columns=5)
        + f"<details><summary>By layer</summary>{html.table(columns, by_layer)}</details>"
    )
