"""The pictures of a study: differences with their intervals, and curves with bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..attribution.pictures import ACCENT, INK, PALETTE, legend_beside, new_figure, style_axes
from .tables import baselines_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
DASHES = ("-", "--", ":", "-.")
Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


def plot_differences(setting: Mapping[str, Any]) -> Figure | None:
    """A row for every arm: its loss less that of none and of shallowest, with the interval, and a dot for each seed.

    None where nothing can be compared."""
    arms = [arm for arm in setting["arms"] if any(arm["differences"].values())]
    if not arms:
        return None
    baselines = baselines_of(setting)
    figure = new_figure(10, 1.1 + 0.36 * len(arms))
    axes = figure.add_subplot()
    for number, name in enumerate(baselines):
        color, label = PALETTE[number % len(PALETTE)], f"less {name}"
        for row, arm in enumerate(arms):
            difference = arm["differences"].get(name)
            if not difference:
                continue
            at = row + (number - (len(baselines) - 1) / 2) * 0.3
            if difference["low"] is not None:
                axes.plot([difference["low"], difference["high"]], [at, at], color=color, linewidth=1.6)
            seeds = list(difference["by_seed"].values())
            axes.plot(seeds, [at] * len(seeds), "|", color=color, markersize=6, alpha=0.7)
            axes.plot(difference["value"], at, "o", color=color, markersize=5, label=label)
            label = "_"
    axes.axvline(0.0, color=INK, alpha=0.5, linewidth=0.9)
    axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("difference of the final validation flow loss (left is better); strokes: seeds")
    style_axes(axes, "x")
    legend_beside(figure, axes)
    return figure


def plot_losses(setting: Mapping[str, Any]) -> Figure | None:
    """The validation loss of every arm over the steps: means over seeds."""
    arms = [(arm["arm"], list(_by_seed(arm).values())) for arm in setting["arms"] if arm["runs"]]
    if not arms:
        return None
    figure = new_figure(10, 4.2)
    axes = figure.add_subplot()
    others = 0
    for name, lines in arms:
        color, width, dashes = INK, 2.0, "-"
        if name != "none":
            color, dashes = PALETTE[others % len(PALETTE)], DASHES[others // len(PALETTE) % len(DASHES)]
            others, width = others + 1, 1.2
        steps, values = _stacked(lines)
        axes.plot(steps, values.mean(0), color=color, linewidth=width, linestyle=dashes, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("flow loss")
    style_axes(axes)
    legend_beside(figure, axes)
    return figure


def plot_curves(setting: Mapping[str, Any]) -> Figure | None:
    """A panel for every arm: its validation loss less that of none over the steps (without none: the loss itself).

    The line is the mean over seeds; the band goes from the lowest seed to the highest."""
    curves = {arm["arm"]: _by_seed(arm) for arm in setting["arms"]}
    none = curves.get("none", {})
    shown = {name: curve for name, curve in curves.items() if curve and not (none and name == "none")}
    if not shown:
        return None
    rows = math.ceil(len(shown) / COLUMNS)
    figure = new_figure(10, 0.6 + 1.9 * rows)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (name, by_seed) in zip(panels, shown.items()):
        lines = [_less(by_seed[seed], none.get(seed)) for seed in by_seed if not none or seed in none]
        if lines:
            steps, values = _stacked(lines)
            axes.fill_between(steps, values.min(0), values.max(0), color=ACCENT, alpha=0.25, linewidth=0)
            axes.plot(steps, values.mean(0), color=ACCENT, linewidth=1.6)
        if none:
            axes.axhline(0.0, color=INK, alpha=0.5, linewidth=0.9)
        axes.set_title(name)
        style_axes(axes)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("step", color=INK, fontsize=10)
    figure.supylabel("flow loss less none" if none else "flow loss", color=INK, fontsize=10)
    return figure


def _stacked(lines: Sequence[Curve]) -> tuple[list[float], NDArray[Any]]:
    """The steps that all curves have, and their values [curves, steps]."""
    steps = sorted(set.intersection(*(set(steps) for steps, _ in lines)))
    return steps, np.array([[dict(zip(*line))[step] for step in steps] for line in lines])


def _by_seed(arm: Mapping[str, Any]) -> dict[int, Curve]:
    """{seed: its validation curve}: the mean over the draws, at the steps that all have."""
    curves: dict[int, Curve] = {}
    for seed in dict.fromkeys(run["seed"] for run in arm["runs"]):
        draws = [
            dict(zip(run["curve"]["step"], run["curve"]["flow_loss"])) for run in arm["runs"] if run["seed"] == seed
        ]
        steps = [step for step in draws[0] if all(step in draw for draw in draws)]
        curves[seed] = (steps, [sum(draw[step] for draw in draws) / len(draws) for step in steps])
    return curves


def _less(curve: Curve, other: Curve | None) -> Curve:
    """The difference of two curves at the steps that both have."""
    if other is None:
        return curve
    values = dict(zip(*other))
    steps = [step for step in curve[0] if step in values]
    return steps, [value - values[step] for step, value in zip(*curve) if step in values]
