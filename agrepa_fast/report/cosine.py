"""The section "Alignment": similarity of each aligned layer with each teacher."""

from __future__ import annotations

from html import escape

from . import html
from .curves import plot_cosines
from .folder import RunFolder
from .log import COSINE, series, similarity_keys, similarity_name


def section(run: RunFolder) -> str:
    log = run.log
    rows = []
    keys = similarity_keys(log)
    for key in keys:
        teacher, _, layer = key.removeprefix(COSINE).rpartition("/")
        event = "valid" if len(series(log, "valid", key)[1]) else "train"
        values = series(log, event, key)[1]
        if len(values):
            rows.append([escape(teacher), escape(layer), event, f"{values[0]:.4f}", f"{values[-1]:.4f}"])
    if not rows:
        return html.MISSING
    name = similarity_name(keys)
    first_and_last = ["first cosine", "last cosine"] if name == "raw cosine" else ["first", "last"]
    table = html.table(["teacher", "layer", "measured in", *first_and_last], rows, text_columns=3)
    title = f"{name.capitalize()} by teacher and layer"
    return html.picture(run.path / "cosine.png", plot_cosines(log), title) + table
