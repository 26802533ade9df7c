"""Curves of a training run, drawn from the entries of its log.jsonl.

A log is a list of dicts with an "event"; numbers that are missing or not finite leave a gap, never an error.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..attribution.report import ACCENT, INK, PALETTE, legend_beside, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSINE = "cosine/"
SIMILARITIES = (COSINE, "relation/", "cka/")  # what alignment.objective may be, as its metrics begin
DOMAIN_LOSS = "flow_loss/"
TRAIN = "#8a93a3"  # grey: the palette's colours stand for domains and teachers in every picture
MANY_POINTS = 4000  # beyond this a noisy line is drawn as pixels, so that a long run keeps a small report


def number(value: Any) -> float | None:
    """`value` as a float, or None where it is no finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:  # an integer beyond 1e308
        return None
    return converted if math.isfinite(converted) else None


def current_timeline(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that still count: a resume at step s replaces whatever was logged before it beyond s."""
    kept: list[dict[str, Any]] = []
    for entry in log:
        resumed_at = number(entry.get("step")) if entry.get("event") == "resume" else None
        if resumed_at is not None:
            kept = [old for old in kept if (number(old.get("step")) or 0.0) <= resumed_at]
        kept.append(entry)
    return kept


def series(log: list[dict[str, Any]], event: str, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps [n] and values [n], float64, of `key` in the entries of `event` with a finite number there."""
    points = [
        (step, value)
        for entry in log
        if entry.get("event") == event
        and (step := number(entry.get("step"))) is not None
        and (value := number(entry.get(key))) is not None
    ]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def keys_under(log: list[dict[str, Any]], prefix: str, events: tuple[str, ...] = ("train", "valid")) -> list[str]:
    """The keys that start with `prefix` in entries of `events`; numbers in them sort as numbers."""
    keys = {key for entry in log if entry.get("event") in events for key in entry}
    return sorted((key for key in keys if key.startswith(prefix) and key != prefix), key=_natural)


def moving_mean(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Mean over a centred window of `window` values (odd), [n] to [n]; shorter at the ends."""
    reach = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def plot_losses(log: list[dict[str, Any]]) -> Figure:
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


def similarity_keys(log: list[dict[str, Any]]) -> list[str]:
    """The keys of all metrics of alignment: of the raw cosine, or of what another objective has in its place."""
    return [key for prefix in SIMILARITIES for key in keys_under(log, prefix)]


def similarity_name(keys: Sequence[str]) -> str:
    """What to call them together."""
    others = {prefix.rstrip("/") for prefix in SIMILARITIES[1:] for key in keys if key.startswith(prefix)}
    return f"similarity ({', '.join(sorted(others))})" if others else "raw cosine"


def plot_cosines(log: list[dict[str, Any]]) -> Figure:
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


def _mark_moments(axes: Axes, log: list[dict[str, Any]]) -> None:
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


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "speech/2" before "speech/10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in key.split("/")]
