"""The section "Flow loss": curves, and the first, last and lowest validation loss."""

from __future__ import annotations

from html import escape

from . import html
from .curves import plot_losses
from .folder import RunFolder
from .log import DOMAIN_LOSS, keys_under, process, series


def section(run: RunFolder) -> str:
    log = run.log
    keys = ["flow_loss", *keys_under(log, DOMAIN_LOSS)]
    if not any(len(series(log, event, key)[0]) for event in ("train", "valid") for key in keys):
        return html.MISSING
    rows = []
    for key in keys:
        steps, values = series(log, "valid", key)
        if len(values):
            best = int(values.argmin())
            rows.append(
                [
                    escape(key.removeprefix(DOMAIN_LOSS)) if key != "flow_loss" else "all domains",
                    html.significant(values[0]),
                    html.significant(values[-1]),
                    html.significant(values[-1] / values[0], 3) if values[0] else "",
                    f"{html.significant(values[best])} <span class='quiet'>at {html.count(steps[best])}</span>",
                ]
            )
    table = html.table(["valid flow loss", "first", "last", "last / first", "lowest"], rows) if rows else ""
    predicted, path = process(log)
    note = f'<p class="note">Mean squared error of the predicted {predicted} on the path {escape(path)}.</p>'
    return note + html.picture(run.path / "loss.png", plot_losses(log), "Flow loss over the training steps") + table
