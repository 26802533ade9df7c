"""FoG-A pictures: the score of every layer, and the score of every layer at every flow time t.

They read `LayerScores` of U units (layers or branches) and N samples: by_sample [U, N], t [N], domains [N].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .scores import LayerScores

INK = "#24292f"  # every text and axis; the HTML report turns exactly this colour into the page's own
# Middle tones are legible on light and on dark pages.
PALETTE = ("#3b7dd8", "#e07b39", "#2f9e6e", "#8d6bd1", "#2b9aa8", "#a08a2c")
ACCENT = "#c9548a"  # what was selected, probed, aligned


class Selected(Protocol):
    """A selection that can be drawn: layers (0-based), and a weight for each."""

    @property
    def layers(self) -> Sequence[int | str]: ...
    @property
    def weights(self) -> Sequence[float]: ...


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches, independent of pyplot.

    Raises `UserError` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'agrepa-fast[train]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style_axes(axes: Axes, grid: str = "y") -> None:
    """Style axes for the report: no box, its text colour, and a faint grid along `grid` ("y", "x", "both" or "")."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=INK, alpha=0.35)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set(color=INK, fontsize=10)
    if grid:
        axes.grid(axis=grid, color=INK, alpha=0.12, linewidth=0.8)  # type: ignore[arg-type]
        axes.set_axisbelow(True)


def layer_t_map(scores: LayerScores, domain: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean score by layer and flow time: ([U, K] float64, the K distinct t in rising order).

    With `domain`, only that domain's samples count. Raises `ValueError` if the scores have no times, or no sample of
    that domain.
    """
    if domain is not None:
        scores = scores.domain(domain)
    if scores.t is None:
        raise ValueError("these scores carry no t: attribute with a t per sample to map layers against t")
    t_values, column = scores.t.unique(return_inverse=True)
    total = scores.by_sample.new_zeros(len(scores.names), t_values.numel())
    total.index_add_(1, column, scores.by_sample)
    return total / torch.bincount(column, minlength=t_values.numel()), t_values


def unit_weight(name: str, selection: Selected | None) -> float | None:
    """Weight of the selected layer that unit `name` ("3", "3.attn") belongs to; None if not selected."""
    if selection is None:
        return None
    layer = name.partition(".")[0]
    for selected, weight in zip(selection.layers, selection.weights, strict=True):
        if str(selected) in (name, layer):
            return float(weight)
    return None


def plot_scores(scores: LayerScores, selection: Selected | Mapping[str, Selected] | None = None) -> Figure:
    """Bars of the mean score of each unit with its standard error, domains side by side.

    `selection` marks its layers with a band and their weight; {teacher: selection} with a row of weights for each.
    """
    names, domains = scores.names, scores.by_domain()
    positions = torch.arange(len(names), dtype=torch.float64)
    figure = new_figure(10, 3.9)
    axes = figure.add_subplot()
    bar_style = {"ecolor": INK, "elinewidth": 0.9, "alpha": 0.6}
    if len(domains) > 1:
        width = 0.8 / len(domains)
        for number, (domain, part) in enumerate(domains.items()):
            offset = (number - (len(domains) - 1) / 2) * width
            axes.bar(
                (positions + offset).numpy(),
                part.mean.numpy(),
                width * 0.92,
                yerr=part.stderr.nan_to_num(0.0).numpy(),
                color=PALETTE[number % len(PALETTE)],
                label=domain,
                error_kw=bar_style,
            )
        every = axes.scatter(
            positions.numpy(), scores.mean.numpy(), s=90, marker="_", color=INK, linewidth=1.4, zorder=3
        )
        every.set_label("all samples")
    else:
        error = scores.stderr.nan_to_num(0.0).numpy()
        axes.bar(positions.numpy(), scores.mean.numpy(), 0.7, yerr=error, color=PALETTE[0], error_kw=bar_style)

    _mark_selection(axes, scores, selection)
    crowded = len(names) > 30 or max(map(len, names)) > 8
    axes.set_xticks(positions.numpy(), names, rotation=90 if crowded else 0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(bottom=min(0.0, float(scores.mean.nan_to_num(0.0).min())))
    axes.set_xlabel(_unit_label(scores))
    axes.set_ylabel(_score_label(scores))
    style_axes(axes)
    axes.tick_params(axis="x", length=0, labelsize=7.5 if crowded else 9)
    if len(domains) > 1:
        legend_beside(figure, axes)
    return figure


def plot_layer_t_map(scores: LayerScores) -> Figure:
    """Draw a heat map of the mean score by layer (down) and flow time (across), with a panel for each domain.

    All panels share a colour scale. Raises `ValueError` if the scores have no times.
    """
    panels: list[str | None] = [*scores.by_domain()] or [None]
    maps = [layer_t_map(scores, domain) for domain in panels]
    finite = torch.cat([values[values.isfinite()] for values, _ in maps])
    low = min(0.0, float(finite.min())) if finite.numel() else 0.0
    high = float(finite.max()) if finite.numel() else 1.0
    units = len(scores.names)
    figure = new_figure(10, min(7.0, 2.4 + 0.15 * units))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, domain, (values, t_values) in zip(grid, panels, maps, strict=True):
        # A constant map still needs a scale with some width.
        top = high if high > low else low + 1.0
        image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=top)
        columns = _every_few(t_values.numel(), limit=12 // len(panels) + 2)
        axes.set_xticks(columns, [f"{t_values[column]:.3g}" for column in columns])
        axes.set_xlabel("t (0 noise, 1 data)")
        if domain is not None:
            axes.set_title(domain, parse_math=False)
        style_axes(axes, grid="")
        axes.tick_params(left=axes is grid[0])
    rows = _every_few(units, limit=26)
    grid[0].set_yticks(rows, [scores.names[row] for row in rows])
    grid[0].set_ylabel(_unit_label(scores))
    bar = figure.colorbar(image, ax=list(grid), pad=0.015, fraction=0.04)
    bar.set_label(_score_label(scores), color=INK, fontsize=10)
    bar.ax.tick_params(colors=INK, labelsize=9, length=3)
    bar.outline.set_visible(False)
    return figure


def legend_beside(figure: Figure, axes: Axes) -> None:
    """Put the legend of `axes` to its right, where it covers no data. Names are not parsed as mathematics."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    legend = figure.legend(
        handles,
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        ncols=-(-len(labels) // 18),
        handlelength=1.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _unit_label(scores: LayerScores) -> str:
    if scores.branches is not None:
        return "branch"
    return "layer (0-based)" if scores.names == tuple(map(str, scores.layers)) else "block"


def _mark_selection(axes: Axes, scores: LayerScores, selection: Selected | Mapping[str, Selected] | None) -> None:
    """Draw a band over each selected layer, and a row of weights above the axes for each selection."""
    if selection is None:
        return
    by_label = selection if isinstance(selection, Mapping) else {"weight": selection}
    crowded = len(set(scores.layers)) > 30
    banded = set()
    for number, (label, selected) in enumerate(reversed([*by_label.items()])):
        height = 3 + number * (20 if crowded else 11)  # in points, above the row of the selection below
        for layer, weight in zip(selected.layers, selected.weights, strict=True):
            named = zip(scores.names, scores.layers)
            units = [i for i, (name, n) in enumerate(named) if str(layer) in (name, str(n))]
            if not units:
                continue
            if layer not in banded:
                axes.axvspan(units[0] - 0.48, units[-1] + 0.48, color=ACCENT, alpha=0.16, linewidth=0, zorder=0)
                banded.add(layer)
            axes.annotate(
                f"{float(weight):.2f}",
                ((units[0] + units[-1]) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, height),
                textcoords="offset points",
                ha="center",
                fontsize=7 if crowded else 8.5,
                fontweight="bold",
                color=ACCENT,
                rotation=90 if crowded else 0,
            )
        axes.annotate(
            label,
            (0.0, 1.0),
            xycoords="axes fraction",
            xytext=(-4, height),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=ACCENT,
            parse_math=False,
        )


def _score_label(scores: LayerScores) -> str:
    return f"FoG-A score ({scores.metric})"


def _every_few(count: int, limit: int) -> list[int]:
    """Evenly spaced indices 0, s, 2s, ... below `count`, at most `limit` of them."""
    return list(range(0, count, max(1, -(-count // limit))))
