"""Curves of a training run, drawn from the entries of its log.jsonl. A number that is missing leaves a gap."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..attribution.pictures import ACCENT, INK, PALETTE, legend_beside, new_figure, style_axes
from .log import (
    COSINE,
    DOMAIN_LOSS,
    Log,
    current_timeline,
    keys_under,
    number,
    series,
    similarity_keys,
    similarity_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN = "#8a93a3"  # grey: the palette's colours stand for domains and teachers in every picture
MANY_POINTS = 4000  # beyond this a noisy line is drawn as pixels, so that a long run keeps a small report


def moving_mean(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Mean over a centred window of `window` values (odd), [n] to [n]; shorter at the ends."""
    reach = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def plot_losses(log: Log) -> Figure:
    """Train flow loss (faint, and its moving mean), valid flow loss overall and by domain, over the steps.

    Vertical lines mark the first probe and where the alignment starts and stops; ticks at the bottom mark
    every probe.
    """
    log = current_timeline(log)
    figure = new_figure(10, 4.2)
    axes = figure.add_subplot()
    steps, values = series(log, "train", "flow_loss")
    tops: list[float] = []
    if len(values):
        window = _window(len(values))
        mean = moving_mean(values, window)
        raw_style: dict[str, Any] = {"color": TRAIN, "linewidth": 0.8, "alpha": 0.4}
        if window > 1:
            axes.plot(steps, values, rasterized=len(values) > MANY_POINTS, **raw_style)
        label = f"train, mean over {window} entries" if window > 1 else "train"
        axes.plot(steps, mean, color=TRAIN, linewidth=2.2, label=label)
        # One early spike must not flatten the rest of the curve.
        tops += [float(mean.max()), float(np.quantile(values, 0.98))]
    for position, key in enumerate(["flow_loss", *keys_under(log, DOMAIN_LOSS)]):
        valid_steps, valid_values = series(log, "valid", key)
        if not len(valid_values):
            continue
        overall = key == "flow_loss"
        axes.plot(
            valid_steps,
            valid_values,
            color=INK if overall else PALETTE[(position - 1) % len(PALETTE)],
            linewidth=1.4 if overall else 1.0,
            linestyle="-" if overall else (0, (3, 2)),
            marker="o" if overall else None,
            markersize=4.5,
            label="valid" if overall else f"valid, {key.removeprefix(DOMAIN_LOSS)}",
            zorder=3,
        )
        tops.append(float(valid_values.max()))
    if tops:
        bottom, _ = axes.get_ylim()
        axes.set_ylim(bottom, max(tops) + 0.08 * (max(tops) - bottom))
    _step_axis(axes)
    axes.set_ylabel("flow loss")
    style_axes(axes)
    _mark_moments(axes, log)
    legend_beside(figure, axes)
    return figure


def plot_cosines(log: Log) -> Figure:
    """Raw cosine between projected hidden states and teacher features, or what another objective has in its place: one
    colour per teacher/layer.

    Lines are the moving mean of the train entries, points the valid entries. A teacher keeps one hue; its
    layers go from dark to light with depth.
    """
    log = current_timeline(log)
    figure = new_figure(10, 4.2)
    axes = figure.add_subplot()
    by_teacher: dict[str, list[str]] = {}
    keys_drawn = similarity_keys(log)
    for key in keys_drawn:
        teacher, _, _ = key.removeprefix(COSINE).rpartition("/")
        by_teacher.setdefault(teacher, []).append(key)
    for hue, (teacher, keys) in enumerate(by_teacher.items()):
        for place, key in enumerate(keys):
            color = _shade(PALETTE[hue % len(PALETTE)], place, len(keys))
            label: str | None = " · layer ".join(part for part in (teacher, key.rpartition("/")[2]) if part)
            steps, values = series(log, "train", key)
            if len(values):
                mean = moving_mean(values, _window(len(values)))
                axes.plot(steps, mean, color=color, linewidth=1.6, label=label)
                label = None
            steps, values = series(log, "valid", key)
            if len(values):
                axes.plot(steps, values, "o", color=color, markersize=4.5, label=label)
    axes.axhline(0.0, color=INK, alpha=0.35, linewidth=0.8)
    _step_axis(axes)
    axes.set_ylabel(f"{similarity_name(keys_drawn)} (line train, points valid)")
    style_axes(axes)
    legend_beside(figure, axes)
    return figure


def _mark_moments(axes: Axes, log: Log) -> None:
    """Vertical lines at the first probe, alignment start and alignment stop; a tick at every probe."""
    moments: list[tuple[float, str]] = []
    probes = [
        step for entry in log if entry.get("event") == "probe" and (step := number(entry.get("step"))) is not None
    ]
    if probes:
        moments.append((probes[0], "first probe" if len(probes) > 1 else "probe"))
        # Markers rather than lines: a run may probe thousands of times.
        axes.plot(
            probes,
            [0.0] * len(probes),
            "|",
            color=ACCENT,
            markersize=7,
            alpha=max(0.3, min(1.0, 60 / len(probes))),
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label="probes",
        )
    steps, weights = series(log, "train", "align_weight")
    aligned = np.flatnonzero(weights > 0)
    if len(aligned):
        moments.append((float(steps[aligned[0]]), "alignment starts"))
        if aligned[-1] + 1 < len(steps):
            moments.append((float(steps[aligned[-1] + 1]), "alignment stops"))
    together: dict[float, list[str]] = {}
    for step, name in moments:
        together.setdefault(step, []).append(name)
    left, right = axes.get_xlim()
    for row, (step, names) in enumerate(sorted(together.items())):
        axes.axvline(step, color=ACCENT, alpha=0.7, linewidth=1.1, linestyle=(0, (4, 3)))
        on_the_right = step > (left + right) / 2
        axes.annotate(
            " / ".join(names),
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if on_the_right else 4, -11 - 12 * row),
            textcoords="offset points",
            ha="right" if on_the_right else "left",
            fontsize=8.5,
            color=ACCENT,
        )


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _window(count: int) -> int:
    """An odd moving-mean window of about a twentieth of the curve."""
    return 2 * (count // 40) + 1


def _shade(color: str, place: int, count: int) -> tuple[float, float, float]:
    """`color` with the lightness that the `place`-th of `count` lines gets, 0.38 (first) to 0.72 (last)."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if count > 1:
        lightness = 0.38 + 0.34 * place / (count - 1)
    return colorsys.hls_to_rgb(hue, lightness, saturation)
