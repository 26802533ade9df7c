"""The section "Configuration": config.yaml as it is."""

from __future__ import annotations

from html import escape

from . import html
from .folder import RunFolder


def section(run: RunFolder) -> str:
    try:
        text = (run.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return html.MISSING
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
