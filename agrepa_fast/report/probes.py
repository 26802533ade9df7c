"""The section "Store and contribute over time": every probe, how far its choice can be trusted, and what it costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from ..attribution.pictures import INK, PALETTE, new_figure, style_axes
from ..attribution.statistics import spearman
from . import html
from .folder import RunFolder
from .log import Log, group, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DOMAINS = 4  # panels in the picture
ROWS = 40  # of the table; a run may probe thousands of times


@dataclass(frozen=True)
class Domain:
    """SCD of one domain at one probe: scores by layer, and the rank correlation of the two with its interval."""

    foga: list[float]
    lasp: list[float]
    overlap: float
    spearman: float
    low: float
    high: float


@dataclass(frozen=True)
class Probe:
    """One probe as the log has it; nan stands for a number that is missing."""

    step: float
    foga: list[float]
    layers: dict[str, list[int]]  # {teacher or "": the layers chosen}
    domains: dict[str, Domain]
    clips: list[float]  # numbers of clips, and for each of them:
    agreement: list[float]
    overlap: list[float]
    seconds: float
    share: float

    @property
    def certainty(self) -> float:
        """Share of the resamples of all scored clips that give the same K layers; the sizes end with N and 2 N."""
        return self.agreement[self.clips.index(self.clips[-1] / 2)] if self.clips else math.nan


def read_probes(log: Log) -> list[Probe]:
    """The probes of a log that hold scores by layer, as many as the last one's; others are left out."""
    probes = [probe for entry in log if entry.get("event") == "probe" and (probe := _probe(entry)) is not None]
    return [probe for probe in probes if len(probe.foga) == len(probes[-1].foga)]


def _probe(entry: dict[str, Any]) -> Probe | None:
    step, foga = number(entry.get("step")), _numbers(entry.get("foga"))
    if step is None or len(foga) < 2:
        return None
    choice = group(entry, "selection")
    teachers = group(choice, "teachers") or {"": choice}
    layers = {str(name): own.get("layers") for name, own in teachers.items() if isinstance(own, dict)}
    scd = entry.get("scd")
    domains = {}
    for part in scd if isinstance(scd, list) else []:
        if isinstance(part, dict):
            used, held = _numbers(part.get("foga")), _numbers(part.get("lasp"))
            if len(used) == len(held) == len(foga):
                numbers = (_number(part.get(name)) for name in ("overlap", "spearman", "low", "high"))
                domains[html.words(part.get("domain"))] = Domain(used, held, *numbers)
    sizes = group(entry, "by_clips")
    clips, agreement, overlap = (_numbers(sizes.get(name)) for name in ("clips", "agreement", "overlap"))
    if not len(clips) == len(agreement) == len(overlap) or not clips or clips[-1] / 2 not in clips:
        clips, agreement, overlap = [], [], []
    chosen = {name: value for name, value in layers.items() if isinstance(value, list) and all(map(_whole, value))}
    seconds, share = _number(entry.get("seconds")), _number(entry.get("share"))
    return Probe(step, foga, chosen, domains, clips, agreement, overlap, seconds, share)


def _whole(value: Any) -> bool:
    return isinstance(value, int)


def _number(value: Any) -> float:
    converted = number(value)
    return math.nan if converted is None else converted


def _numbers(value: Any) -> list[float]:
    """The list of finite numbers; empty for anything else."""
    values = [number(item) for item in value] if isinstance(value, list) else []
    return [] if None in values else values  # type: ignore[return-value]


def stability(probes: Sequence[Probe]) -> list[tuple[float, float]]:
    """(Spearman's rho of the FoG-A scores with those of the probe before, share of the layers that were replaced)."""
    rows = [(math.nan, math.nan)]
    for before, after in itertools.pairwise(probes):
        rho = spearman(torch.tensor(before.foga), torch.tensor(after.foga))
        kept = total = 0
        for name in before.layers.keys() & after.layers.keys():
            kept += len(set(before.layers[name]) & set(after.layers[name]))
            total += len(after.layers[name])
        rows.append((rho, 1 - kept / total if total else math.nan))
    return rows


def plot_probes(probes: Sequence[Probe]) -> Figure:
    """Maps of FoG-A and LASP by layer and probe for each domain, and four panels of what the probes tell and cost.

    The panels: the rank correlation of FoG-A with LASP, and the stability of the choice, over steps; how many clips
    the last probe needed; and the share of the run's time that the probes took.
    """
    names = list(probes[-1].domains)[:MOST_DOMAINS]
    figure = new_figure(10, 2.5 * (len(names) + 2))
    grid = figure.subplots(len(names) + 2, 2, squeeze=False)
    for row, name in zip(grid, names):
        own = [probe for probe in probes if name in probe.domains]
        title = name or "all clips"
        _map(row[0], [p.step for p in own], [p.domains[name].foga for p in own], f"{title}: FoG-A (use)")
        _map(row[1], [p.step for p in own], [p.domains[name].lasp for p in own], f"{title}: LASP (store)")
    for axes in grid[len(names) - 1] if names else ():
        axes.set_xlabel("step (dark: the probe's lowest layer, bright: its highest)")
    (correlation, choice), (clips, cost) = grid[-2:]
    _plot_correlation(correlation, probes, names)
    _plot_stability(choice, probes)
    _plot_clips(clips, probes[-1])
    _plot_cost(cost, probes)
    for axes in (correlation, choice, cost):
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True, nbins=6)
    for axes in (correlation, choice, clips, cost):
        style_axes(axes)
    return figure


def _plot_correlation(axes: Axes, probes: Sequence[Probe], names: Sequence[str]) -> None:
    """Spearman's rho of FoG-A with LASP by domain, with its interval over the clips."""
    for color, name in zip(itertools.cycle(PALETTE), names):
        own = [probe for probe in probes if name in probe.domains]
        steps, found = [probe.step for probe in own], [probe.domains[name] for probe in own]
        axes.fill_between(steps, [d.low for d in found], [d.high for d in found], color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, [d.spearman for d in found], "-o", color=color, markersize=3.5, label=name or "all clips")
    axes.axhline(0.0, color=INK, alpha=0.35, linewidth=0.8)
    axes.set_title("rank correlation of FoG-A with LASP")
    axes.set_ylabel("Spearman's rho")
    axes.set_ylim(-1.05, 1.05)
    if names:
        axes.legend(frameon=False, fontsize=8, ncols=len(names))


def _plot_stability(axes: Axes, probes: Sequence[Probe]) -> None:
    """How much a probe agrees with the one before, and its choice with that of resampled clips."""
    steps, rows = [probe.step for probe in probes], stability(probes)
    axes.plot(steps, [rho for rho, _ in rows], "-o", color=PALETTE[0], markersize=3.5, label="rank correlation")
    axes.plot(steps, [changed for _, changed in rows], "-s", color=PALETTE[1], markersize=3.5, label="changed layers")
    axes.plot(steps, [p.certainty for p in probes], ":", color=INK, label="same K layers, clips resampled")
    axes.set_title("stability from probe to probe")
    axes.set_ylabel("rho, or share")
    axes.set_ylim(min([-0.08, *(rho - 0.08 for rho, _ in rows if math.isfinite(rho))]), 1.08)
    # Most of the time there is room between the changed layers, which are few, and the other two.
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.1))


def _plot_clips(axes: Axes, last: Probe) -> None:
    """How often so many clips of the last probe give its choice, and how much of it they share."""
    axes.set_title(f"clips of the probe at step {last.step:,.0f}, drawn with replacement")
    axes.set_xlabel("number of clips")
    axes.set_ylabel("share")
    axes.set_ylim(-0.05, 1.08)
    if not last.clips:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=INK, fontsize=9)
        return
    axes.set_xscale("log", base=2)
    axes.set_xticks(last.clips, [f"{count:,.0f}" for count in last.clips], minor=False)
    axes.plot(last.clips, last.overlap, "-s", color=PALETTE[1], markersize=3.5, label="K layers that a resample shares")
    axes.plot(
        last.clips, last.agreement, "-o", color=PALETTE[0], markersize=3.5, label="of resamples, with the same K layers"
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _plot_cost(axes: Axes, probes: Sequence[Probe]) -> None:
    """The share of the run's time, up to each probe, that the probes took."""
    axes.plot([p.step for p in probes], [100 * p.share for p in probes], "-o", color=PALETTE[0], markersize=3.5)
    axes.set_title("time in probes")
    axes.set_ylabel("% of the run so far")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0.0)


def _map(axes: Axes, steps: Sequence[float], scores: Sequence[Sequence[float]], title: str) -> None:
    """Scores by layer (down) and probe (along), each probe scaled from its lowest to its highest layer."""
    values = torch.tensor(scores, dtype=torch.float64)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scaled = ((values - low) / (high - low).clamp_min(1e-12)).T
    axes.imshow(scaled.numpy(), aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    every = -(-len(steps) // 6)
    axes.set_xticks(range(0, len(steps), every), [f"{step:,.0f}" for step in steps[::every]])
    every = -(-scaled.shape[0] // 12)
    axes.set_yticks(range(0, scaled.shape[0], every))
    axes.set_ylabel("layer")
    axes.set_title(title, parse_math=False)
    style_axes(axes, grid="")


def section(run: RunFolder) -> str:
    probes = read_probes(run.log)
    if len(probes) < 2:
        return html.MISSING + '<p class="note">It takes two probes: set probe.every.</p>'
    names = list(probes[-1].domains)
    header = ["step", "rank correlation", "changed layers", "same K layers"]
    header += [escape(f"Spearman {name}".strip()) for name in names] + ["seconds", "share of time"]
    rows = []
    for probe, (rho, changed) in list(zip(probes, stability(probes)))[-ROWS:]:
        cells = [html.count(probe.step), _cell(rho, ".2f"), _cell(changed, ".0%"), _cell(probe.certainty, ".0%")]
        for name in names:
            domain = probe.domains.get(name)
            cells.append("" if domain is None else _cell(domain.spearman, ".2f"))
        rows.append([*cells, _cell(probe.seconds, ".2f"), _cell(probe.share, ".1%")])
    last = probes[-1]
    sizes = [[html.count(n), f"{a:.0%}", f"{o:.0%}"] for n, a, o in zip(last.clips, last.agreement, last.overlap)]
    return (
        '<p class="note">What the layers use (FoG-A) and store (LASP) at every probe. Each column of a map goes from '
        "the lowest layer of that probe (dark) to the highest (bright). Where Spearman is below 0, layers that store "
        "more are used less. Bands are 95 % intervals over the clips. Rank correlation and changed layers compare a "
        "probe with the one before. Same K layers: the share of resamples of the clips that give this choice. Share of "
        "time: how much of the run's time so far went into probes.</p>"
        + html.picture(run.path / "probes.png", plot_probes(probes), "FoG-A and LASP by layer over the steps")
        + html.table(header, rows, text_columns=0)
        + (
            "<h3>How many clips are enough</h3>"
            '<p class="note">Clips of the last probe, drawn with replacement: how often the K highest layers are those '
            "of all its clips, and which share of the K layers is.</p>"
            + html.table(["clips", "same K layers", "share of the K layers"], sizes, text_columns=0)
            if sizes
            else ""
        )
    )


def _cell(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""
