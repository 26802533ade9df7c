"""SCD, the store-contribute dissociation: FoG-A and LASP of every layer by domain, as tables and as a picture.

The CSVs begin with the columns of the authors' released toolkit (`step,epoch,layer,speech_foga,audio_foga` and
`step,epoch,layer,sem_sim,evt_sim`); further columns follow. L layers, 0-based.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import writing
from .pictures import INK, PALETTE, layer_t_map, new_figure, style_axes
from .scores import LayerScores
from .stored import Dissociation, dissociation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELEASED_DOMAINS = ("speech", "audio")
RELEASED_SIMILARITY = {"speech": "sem_sim", "audio": "evt_sim"}  # Cos-SEM, Cos-EVT


@dataclass(frozen=True, eq=False)
class Stored:
    """LASP and linear CKA of each layer with one teacher, on the clips of one domain ("" if domains are unknown).

    Attributes:
        lasp: [L, held-out clips], from `stored.lasp`. cka: [L], from `stored.linear_cka` on all clips.
        fitted: number of clips that the head was fitted on.
    """

    domain: str
    teacher: str
    lasp: Tensor
    cka: Tensor
    fitted: int


@dataclass(frozen=True)
class DomainDissociation:
    """SCD of one domain: the comparison, and the number of clips on each of its sides."""

    domain: str
    teacher: str
    result: Dissociation
    cka: tuple[float, ...]
    fitted: int
    held_out: int
    scored: int

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> DomainDissociation:
        """The inverse of `dataclasses.asdict`; null means an undefined number."""

        def numbers(values: Any) -> Any:
            if isinstance(values, list):
                return tuple(numbers(value) for value in values)
            return math.nan if values is None else values

        result = Dissociation(**{name: numbers(value) for name, value in state["result"].items()})
        return cls(**{**state, "result": result, "cka": numbers(state["cka"])})


def dissociations(scores: LayerScores, stored: Sequence[Stored], k: int = 3) -> list[DomainDissociation]:
    """`stored.dissociation` of each entry of `stored` with the scores of its domain.

    Raises:
        ValueError: a domain was not scored, the layers differ, or k does not fit.
    """
    results = []
    for entry in stored:
        of_domain = scores.domain(entry.domain) if entry.domain else scores
        result = dissociation(of_domain, entry.lasp, k)
        _, counts = of_domain.by_clip()
        cka = tuple(entry.cka.double().tolist())
        results.append(
            DomainDissociation(
                entry.domain, entry.teacher, result, cka, entry.fitted, entry.lasp.shape[1], counts.numel()
            )
        )
    return results


def write_scd(
    folder: str | Path,
    scores: LayerScores,
    stored: Sequence[Stored] = (),
    k: int = 3,
    step: int = 0,
    epoch: float = 0,
) -> list[DomainDissociation]:
    """Write the report's tables into `folder`: foga_layers.csv; foga_map.csv and foga_map.json (if the scores have
    times); and, with `stored`, lasp_layers.csv, scd.csv and scd.json.

    foga_layers.csv: step, epoch, layer, {domain}_foga, then foga, stderr and above_floor over all samples.
    lasp_layers.csv: step, epoch, layer, sem_sim (domain "speech"), evt_sim ("audio") or {domain}_sim, then their _cka.
    foga_map.csv: domain, layer, t, foga. scd.csv: domain, teacher, layer, foga, lasp, cka, most_used, most_stored.

    Raises:
        ValueError: the scores are of branches; and as `dissociations`.
        UserError: a file cannot be written; names it.
    """
    if scores.branches is not None:
        raise ValueError("scores: expected whole layers, got branches")
    folder = Path(folder)
    domains = sorted(scores.by_domain(), key=_released_first)
    means = {domain: scores.domain(domain).mean.tolist() for domain in domains}
    columns = [*(f"{domain}_foga" for domain in domains), "foga", "stderr", "above_floor"]
    rows = zip(*means.values(), scores.mean.tolist(), scores.stderr.tolist(), map(int, scores.above_floor.tolist()))
    _write_layers(folder / "foga_layers.csv", step, epoch, columns, scores.layers, list(rows))
    if scores.t is not None:
        _write_map(folder, scores, domains)
    results = dissociations(scores, sorted(stored, key=lambda entry: _released_first(entry.domain)), k)
    if results:
        columns = [f"{_similarity(entry)}" for entry in results] + [f"{_similarity(e, 'cka')}" for e in results]
        rows = zip(*(entry.result.stored for entry in results), *(entry.cka for entry in results))
        _write_layers(folder / "lasp_layers.csv", step, epoch, columns, scores.layers, list(rows))
        _write_scd(folder / "scd.csv", results)
        state = {"step": step, "epoch": epoch, "k": k, "domains": [_plain(asdict(entry)) for entry in results]}
        with writing(folder / "scd.json"):
            (folder / "scd.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    return results


def read_scd(path: str | Path) -> list[DomainDissociation]:
    """Read the scd.json that `write_scd` wrote.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OSError: the file cannot be read, or is not one.
    """
    state = json.loads(Path(path).read_text(encoding="utf-8"))
    return [DomainDissociation.from_state(entry) for entry in state["domains"]]


def plot_scd(results: Sequence[DomainDissociation]) -> Figure:
    """Draw a panel for each result of `write_scd`: FoG-A by layer as bars, LASP as points; the K highest are filled.

    Raises:
        ValueError: there is no result."""
    if not results:
        raise ValueError("results: expected at least one result of write_scd, got none")
    figure = new_figure(10, 3.6)
    grid = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, entry in zip(grid, results, strict=True):
        result, places = entry.result, range(len(entry.result.layers))
        used = [layer in result.most_used for layer in result.layers]
        bars = axes.bar(places, result.foga, 0.7, color=PALETTE[0])
        for bar, chosen in zip(bars, used, strict=True):
            bar.set_alpha(1.0 if chosen else 0.35)
        axes.set_xticks(places, map(str, result.layers))
        _thin(axes, len(result.layers))
        axes.set_xlabel("layer (0-based)")
        axes.set_ylim(bottom=min(0.0, *result.foga))
        rho = "not defined" if math.isnan(result.spearman) else f"{result.spearman:.2f}"
        title = f"{entry.domain or 'all clips'}: overlap {result.overlap:.0%}, Spearman {rho}"
        axes.set_title(title, parse_math=False)
        style_axes(axes)
        beside = axes.twinx()
        beside.plot(places, result.stored, "-", color=PALETTE[1], linewidth=1.0, alpha=0.6)
        for place, value, layer in zip(places, result.stored, result.layers, strict=True):
            face = PALETTE[1] if layer in result.most_stored else "none"
            beside.plot(place, value, "o", color=PALETTE[1], markerfacecolor=face, markersize=6)
        style_axes(beside, grid="")
        beside.spines["left"].set_visible(False)
        beside.spines["right"].set(visible=True, color=INK, alpha=0.35)
        if axes is grid[0]:
            axes.set_ylabel("FoG-A score (bars)")
        if axes is grid[-1]:
            beside.set_ylabel("LASP cosine (points)")
    return figure


def _thin(axes: Any, layers: int) -> None:
    """Label every layer if there is room, else some of them."""
    every = -(-layers // 13)
    for place, label in enumerate(axes.get_xticklabels()):
        label.set_visible(place % every == 0)


def _write_layers(
    path: Path, step: int, epoch: float, columns: Sequence[str], layers: Sequence[int], rows: Sequence[Sequence[float]]
) -> None:
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "epoch", "layer", *columns))
        for layer, row in zip(layers, rows, strict=True):
            writer.writerow((step, f"{epoch:g}", layer, *map(repr, row)))


def _write_map(folder: Path, scores: LayerScores, domains: Sequence[str]) -> None:
    entries = []
    for domain in domains or [""]:
        values, times = layer_t_map(scores, domain or None)
        entries.append({"domain": domain, "t": times.tolist(), "layers": list(scores.layers), "foga": values.tolist()})
    with writing(folder / "foga_map.csv"), open(folder / "foga_map.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("domain", "layer", "t", "foga"))
        for entry in entries:
            for layer, row in zip(entry["layers"], entry["foga"], strict=True):
                writer.writerows((entry["domain"], layer, f"{t:g}", repr(v)) for t, v in zip(entry["t"], row))
    with writing(folder / "foga_map.json"):
        (folder / "foga_map.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _write_scd(path: Path, results: Sequence[DomainDissociation]) -> None:
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("domain", "teacher", "layer", "foga", "lasp", "cka", "most_used", "most_stored"))
        for entry in results:
            result = entry.result
            for layer, foga, lasp, cka in zip(result.layers, result.foga, result.stored, entry.cka, strict=True):
                among = (int(layer in result.most_used), int(layer in result.most_stored))
                writer.writerow((entry.domain, entry.teacher, layer, repr(foga), repr(lasp), repr(cka), *among))


def _released_first(domain: str) -> tuple[int, str]:
    return (RELEASED_DOMAINS.index(domain) if domain in RELEASED_DOMAINS else len(RELEASED_DOMAINS), domain)


def _similarity(entry: DomainDissociation, kind: str = "sim") -> str:
    name = RELEASED_SIMILARITY.get(entry.domain, f"{entry.domain or 'all'}_sim")
    return name if kind == "sim" else f"{name.removesuffix('_sim')}_{kind}"


def _plain(value: Any) -> Any:
    """None for nan, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
