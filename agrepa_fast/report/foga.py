"""The section "Layer contribution (FoG-A)": scores of the last probe."""

from __future__ import annotations

import math
from html import escape

from ..attribution.pictures import plot_layer_t_map, plot_scores, unit_weight
from ..attribution.scores import LayerScores
from . import html
from .folder import RunFolder, Selection
from .log import scored


def section(run: RunFolder) -> str:
    scores, selection = run.scores, run.selection
    if scores is None:
        return run.scores_problem or html.MISSING
    output = scored(run.log)
    parts = [
        f'<p class="note">Change of the predicted {output} when one layer is switched off, relative to the '
        f"{output}; {html.count(scores.by_sample.shape[1])} samples, metric {escape(scores.metric)}, layers "
        f"counted from 0. Whiskers and &plusmn; are one standard error.{_noise_note(scores)}</p>",
        html.picture(
            run.path / "foga.png",
            plot_scores(scores, selection.drawn() if selection else None),
            "FoG-A score of every layer",
        ),
    ]
    if scores.t is None:
        parts.append('<p class="missing">score by layer and t: not recorded in this run</p>')
    else:
        picture = plot_layer_t_map(scores)
        parts.append(html.picture(run.path / "foga_map.png", picture, "FoG-A score by layer and flow time"))
    return "".join(parts) + _foga_table(scores, selection)


def _noise_note(scores: LayerScores) -> str:
    """What rounding alone scores, and which layers do not stand above it."""
    if scores.noise_by_sample is None:
        return ""
    low = [name for name, above in zip(scores.names, scores.above_floor.tolist()) if not above]
    note = f" A layer without effect would score {html.significant(scores.noise_floor, 2)} (measured)"
    return f"{note}; not above it: {escape(', '.join(low))}." if low else f"{note}; all are above it."


def _foga_table(scores: LayerScores, selection: Selection | None) -> str:
    domains = scores.by_domain() if len(scores.by_domain()) > 1 else {}
    columns = [(part.mean, part.stderr) for part in (scores, *domains.values())]
    means = scores.mean.nan_to_num(float("-inf"))
    selected = selection.teachers if selection else {"": None}
    rows, chosen = [], []
    for unit, name in enumerate(scores.names):
        weights = [unit_weight(name, aligned) for aligned in selected.values()]
        cells = [escape(name), html.count(1 + int((means > means[unit]).sum()))]
        for mean, stderr in columns:
            spread = float(stderr[unit])
            error = (
                f" <span class='quiet'>&plusmn; {html.significant(spread, 2)}</span>" if math.isfinite(spread) else ""
            )
            cells.append(html.significant(float(mean[unit])) + error)
        rows.append([*cells, *("" if weight is None else f"{weight:.3f}" for weight in weights)])
        chosen.append(any(weight is not None for weight in weights))
    unit_title = "branch" if any("." in name for name in scores.names) else "layer"
    header = [unit_title, "rank", "score", *map(escape, domains)]
    header += [escape(f"weight {name}".strip()) for name in selected]
    return html.table(header, rows, chosen)
