"""The section "Environment": versions, device, and sizes of model and data."""

from __future__ import annotations

from typing import Any

from . import html
from .folder import RunFolder
from .log import group, last_entry


def section(run: RunFolder) -> str:
    log = run.whole_log
    start = last_entry(log, "start")
    first = next((entry for entry in log if entry.get("event") == "start"), {})
    facts: list[tuple[str, Any]] = [("started", first.get("time")), ("device", start.get("device"))]
    for name, suffix in (("parameters", " parameters"), ("domains", " clips")):
        facts += [(f"{key}{suffix}", value) for key, value in group(start, name).items()]
    facts += [(key, value) for key, value in group(start, "versions").items()]
    return html.facts(pair for pair in facts if pair[1] is not None) or html.MISSING
