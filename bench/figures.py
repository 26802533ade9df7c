"""Pictures of results as PNG and SVG: ours against each provider, the roofline, scaling with fitted exponents.

Each file holds a digest of what it shows. So an outdated picture is found without comparing pixels, which differ
between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agrepa_fast.errors import UserError

from .targets import ours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 3  # raise it when a drawing changes, so that stored pictures count as outdated
COLOURS = {"win": "#2a7f62", "tie": "#8a8a8a", "loss": "#b4452f"}
INK, GRID = "#222222", "#dddddd"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of value = c size^p, by least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    if spread == 0:
        raise ValueError(f"sizes: expected at least two different ones, got {list(sizes)}")
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread


Curve = tuple[list[float], list[float]]


def curves(result: Mapping[str, Any], column: str) -> dict[str, dict[str, Curve]]:
    """{axis: {provider: (sizes, values)}} of the scaling case, by size; column "median_us" or "peak_bytes"."""
    by_axis: dict[str, dict[str, Curve]] = {}
    problems = [p for p in result["problems"] if p["case"] == "scaling" and p["gate"]["passed"]]
    for problem in sorted(problems, key=lambda p: p["params"]["size"]):
        for row in problem["rows"]:
            if row["role"] != "again" and row[column]:
                sizes, values = by_axis.setdefault(problem["params"]["axis"], {}).setdefault(row["provider"], ([], []))
                sizes.append(problem["params"]["size"])
                values.append(row[column])
    return by_axis


def speedups(result: Mapping[str, Any]) -> Figure:
    """A bar for each rival of each problem, except scaling: how many times faster ours is."""
    from matplotlib.figure import Figure

    bars = [
        (f"{p['case']} · {_short(p)} · {row['provider']}", row["speedup"], row["verdict"], p["noise_floor"])
        for p in sorted(result["problems"], key=lambda p: result["cases"].index(p["case"]))
        if p["case"] != "scaling"
        for row in p["rows"]
        if row["speedup"] is not None
    ]
    figure = Figure(figsize=(9, 0.8 + 0.24 * max(len(bars), 1)), layout="constrained")
    axes = figure.subplots()
    for place, (_, value, word, floor) in enumerate(reversed(bars)):
        axes.barh(place, value - 1, left=1, color=COLOURS[word], height=0.65)
        axes.plot([1 / (1 + floor), 1 + floor], [place, place], color=INK, linewidth=1)
        # Beyond the bar and the noise line, on the bar's side.
        end, side = (max(value, 1 + floor), "left") if value >= 1 else (min(value, 1 / (1 + floor)), "right")
        axes.annotate(f" {value:.2f}x ", (end, place), va="center", ha=side, fontsize=7, color=INK)
    axes.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)], fontsize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel(
        "time of the other over ours\ngreen faster, grey within noise, red slower; line: noise floor", fontsize=7
    )
    _tidy(axes, f"Ours against each provider, {result['environment']['device']}", "x")
    return figure


def roofline(result: Mapping[str, Any]) -> Figure:
    """Achieved rate of ours over operations per byte, below the copy and matmul rates of the same run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    copy = result["roofline"]["copy_bytes_per_s"]
    points = [p for p in result["problems"] if p["flops"] and ours(p)["median_us"]]
    intensities = [p["flops"] / p["bytes"] for p in points]
    rates = result["roofline"]["matmul_flops_per_s"]
    low = min([*intensities, 0.5]) / 2
    high = max([*intensities, *(rate / copy for rate in rates.values())]) * 4
    for name, rate in rates.items():
        axes.plot([low, rate / copy, high], [low * copy, rate, rate], color=INK, linewidth=1)
        axes.annotate(f"{name} {rate / 1e12:.3g} TFLOP/s", (high, rate), ha="right", va="bottom", fontsize=7)
    axes.annotate(f"copy {copy / 1e9:.3g} GB/s", (low, low * copy), va="bottom", fontsize=7)
    for case, mark in zip(dict.fromkeys(p["case"] for p in points), "osD^vP*"):
        of_case = [(p, x) for p, x in zip(points, intensities) if p["case"] == case]
        axes.plot(
            [x for _, x in of_case],
            [p["flops"] / ours(p)["median_us"] * 1e6 for p, _ in of_case],
            mark,
            markersize=5,
            label=case,
            alpha=0.8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte, counted from the shapes")
    axes.set_ylabel("operations per second")
    if points:
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    _tidy(axes, f"Roofline, {result['environment']['device']}", "both")
    return figure


def scaling(result: Mapping[str, Any]) -> Figure:
    """Time and peak memory over layers, frames, batch and width, with the fitted exponents."""
    from matplotlib.figure import Figure

    columns = (("median_us", "ms", 1e-3), ("peak_bytes", "MiB", 2.0**-20))
    axes_names = list(curves(result, "median_us"))
    figure = Figure(figsize=(2.8 * max(len(axes_names), 1) + 0.6, 5), layout="constrained")
    grid = figure.subplots(2, max(len(axes_names), 1), squeeze=False)
    for line, (column, unit, factor) in enumerate(columns):
        by_axis = curves(result, column)
        for place, axis in enumerate(axes_names):
            axes = grid[line][place]
            for (provider, (sizes, values)), colour in zip(by_axis.get(axis, {}).items(), ("#2a7f62", "#b4452f")):
                label = f"{provider}, p = {exponent(sizes, values):.2f}" if len(set(sizes)) > 1 else provider
                axes.plot(sizes, [value * factor for value in values], "o-", color=colour, markersize=4, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.legend(fontsize=7, frameon=False)
            axes.set_xlabel(axis, fontsize=8)
            axes.set_ylabel(unit if place == 0 else "", fontsize=8)
            _tidy(axes, "", "both")
    figure.suptitle(f"FoG-A: time and peak memory as size^p, {result['environment']['device']}", fontsize=10)
    return figure


def _tidy(axes: Any, title: str, grid: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(problem: Mapping[str, Any]) -> str:
    """The values of the params without the dtype."""
    return " ".join(str(value) for name, value in problem["params"].items() if name != "dtype")


DRAWINGS: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "speedups": speedups,
    "roofline": roofline,
    "scaling": scaling,
}


def drawn(result: Mapping[str, Any]) -> list[str]:
    """The pictures for which a result has something to show."""
    scaled = any(problem["case"] == "scaling" for problem in result["problems"])
    return [name for name in DRAWINGS if name != "scaling" or scaled]


def digest(name: str, result: Mapping[str, Any]) -> str:
    """What a picture shows, as a short hash."""
    shown = [VERSION, name, result["environment"]["device"], result["roofline"], result["problems"]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def stored_digest(path: Path) -> str | None:
    """The digest in a picture; None if there is no picture or no digest."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    match = re.search(rb"agrepa-bench:([0-9a-f]{16})", content)
    return match[1].decode() if match else None


def draw(name: str, result: Mapping[str, Any], path: Path) -> None:
    """Draw to `path` (.png or .svg) and store the digest in it.

    Raises:
        UserError: matplotlib is not installed.
    """
    save(lambda: DRAWINGS[name](result), digest(name, result), path)


def save(figure: Callable[[], Figure], digest: str, path: Path) -> None:
    """Write what `figure` draws to `path` (.png or .svg), with a digest of what it shows.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed: pip install 'agrepa-fast[train]'") from error
    stamp = f"agrepa-bench:{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "agrepa-bench", "svg.fonttype": "none", "font.size": 9}):
        metadata = {"Description": stamp} | ({"Date": None} if path.suffix == ".svg" else {})
        figure().savefig(path, dpi=150, metadata=metadata)
