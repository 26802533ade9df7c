"""The section "Skipped files"."""

from __future__ import annotations

from html import escape

from . import html
from .folder import RunFolder
from .log import last_entry

SKIPPED_SHOWN = 20


def section(run: RunFolder) -> str:
    skipped = run.skipped
    if not last_entry(run.whole_log, "start") and not skipped:
        return html.MISSING
    if not skipped:
        return "<p>No file was skipped.</p>"
    rows = [
        [
            escape(html.words(entry.get("path"))),
            escape(html.words(entry.get("source"))),
            escape(html.words(entry.get("reason"))),
        ]
        for entry in skipped[:SKIPPED_SHOWN]
    ]
    one = len(skipped) == 1
    shown = f"; the first {SKIPPED_SHOWN} are shown, all are in log.jsonl" if len(skipped) > SKIPPED_SHOWN else ""
    lead = f"<p>{html.count(len(skipped))} file{'' if one else 's'} could not be used{shown}.</p>"
    return lead + html.table(["file", "source", "reason"], rows, text_columns=3)
