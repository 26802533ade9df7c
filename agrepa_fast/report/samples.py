"""The section "Samples": generated audio of each prompt at a few steps."""

from __future__ import annotations

from html import escape
from typing import Any

from . import html
from .folder import RunFolder
from .log import number

PROMPTS_SHOWN = 12
STEPS_PER_PROMPT = 4


def section(run: RunFolder) -> str:
    prompts: dict[tuple[str, str, str], dict[Any, str]] = {}
    for entry in run.log:
        if entry.get("event") == "sample" and isinstance(entry.get("path"), str):
            prompt = (
                html.words(entry.get("text")),
                html.words(entry.get("domain")),
                html.words(entry.get("reference")),
            )
            step = number(entry.get("step"))
            prompts.setdefault(prompt, {})[step] = entry["path"]
    if not prompts:
        return html.MISSING
    cards = []
    for (text, domain, reference), by_step in list(prompts.items())[:PROMPTS_SHOWN]:
        # The first and the newest always, and evenly spaced ones between: progress can be heard.
        steps = sorted(by_step, key=lambda step: -1.0 if step is None else step)
        count = min(STEPS_PER_PROMPT, len(steps))
        picked = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count - 1)] + [steps[-1]]
        clips = [html.player(run.path, reference, "reference")] if reference else []
        clips += [
            html.player(run.path, by_step[step], f"step {html.count(step)}" if step is not None else "sample")
            for step in picked
        ]
        left = len(steps) - len(picked)
        note = f'<p class="note">{html.count(left)} more steps are in the run folder.</p>' if left else ""
        label = f'<span class="pill">{escape(domain)}</span>' if domain else ""
        words = escape(text) if text else '<span class="missing">no text</span>'
        cards.append(
            f'<div class="card"><p class="words">{label}{words}</p>'
            f'<div class="clips">{"".join(clips)}</div>{note}</div>'
        )
    left = len(prompts) - len(cards)
    if left:
        cards.append(f'<p class="note">Samples of {html.count(left)} more texts are in the run folder.</p>')
    return "".join(cards)
