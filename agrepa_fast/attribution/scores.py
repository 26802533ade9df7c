"""FoG-A scores and their statistics: per unit (a layer or one of its branches) and sample.

by_sample [U, N] float64 on the CPU; N samples, each with its t and domain when they are known.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("rms", "squared")
EPS = 1e-8
COLUMNS = ("layer", "branch", "sample", "t", "domain", "score")


def normalised_change(change: Tensor, energy: Tensor, metric: str) -> Tensor:
    """FoG-A's score from mean squares: change [U, N], energy [N] -> [U, N].

    "rms": sqrt(change + 1e-8) / (sqrt(energy + 1e-8) + 1e-8), as the authors' code computes it;
    "squared": change / (energy + 1e-8), as the paper (arXiv 2603.01006) writes it.
    Where the velocity is identically zero the ratio means nothing: the score is 0.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    if metric == "rms":
        score = (change + EPS).sqrt() / ((energy + EPS).sqrt() + EPS)
    else:
        score = change / (energy + EPS)
    return torch.where(energy > 0, score, 0.0)


@dataclass(frozen=True, eq=False)
class LayerScores:
    """Normalised change of the velocity when a unit is switched off.

    Attributes:
        layers: 0-based layer of each unit.
        branches: "attn" or "ff" of each unit; None when whole blocks were switched off.
        by_sample: [U, N] float64.
        metric: "rms" or "squared" (see `normalised_change`).
        floor: the score that a unit without any effect gets; at or below it a score says nothing.
        t: [N] or None. domains: N names or None.
        block_evaluations: what the probe cost, in evaluations of a block on all samples.
    """

    layers: tuple[int, ...]
    by_sample: Tensor
    metric: str = "rms"
    branches: tuple[str, ...] | None = None
    floor: float = 0.0
    t: Tensor | None = None
    domains: tuple[str, ...] | None = None
    block_evaluations: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        units, samples = self.by_sample.shape
        if len(self.layers) != units or (self.branches is not None and len(self.branches) != units):
            raise ValueError(f"by_sample has {units} rows for {len(self.layers)} layers")
        if self.t is not None and self.t.shape != (samples,):
            raise ValueError(f"t: expected [{samples}], got {list(self.t.shape)}")
        if self.domains is not None and len(self.domains) != samples:
            raise ValueError(f"domains: expected {samples} names, got {len(self.domains)}")

    @property
    def names(self) -> tuple[str, ...]:
        """ "0", "1", ... for blocks; "0.attn", "0.ff", ... for branches."""
        if self.branches is None:
            return tuple(map(str, self.layers))
        return tuple(f"{layer}.{branch}" for layer, branch in zip(self.layers, self.branches))

    @property
    def mean(self) -> Tensor:
        """[U] mean over the samples."""
        return self.by_sample.mean(1)

    @property
    def stderr(self) -> Tensor:
        """[U] standard error of the mean; samples that share a clip over a grid of t count as independent.

        nan for a single sample."""
        samples = self.by_sample.shape[1]
        if samples < 2:
            return torch.full((len(self.layers),), torch.nan, dtype=self.by_sample.dtype)
        return self.by_sample.std(1) / samples**0.5

    @property
    def above_floor(self) -> Tensor:
        """[U] bool: the unit's mean score is above what a unit without effect gets."""
        return self.mean > self.floor * (1 + 1e-6)

    def domain(self, name: str) -> LayerScores:
        """The scores of one domain's samples."""
        if self.domains is None or name not in self.domains:
            raise ValueError(f"domain: expected one of {sorted(set(self.domains or ()))}, got {name!r}")
        return self._take([i for i, domain in enumerate(self.domains) if domain == name])

    def by_domain(self) -> dict[str, LayerScores]:
        """{domain: scores}, in order of name; empty when the domains are unknown."""
        return {name: self.domain(name) for name in sorted(set(self.domains or ()))}

    def at(self, t: float) -> LayerScores:
        """The scores at one value of t."""
        if self.t is None:
            raise ValueError("t: the samples' t is not known")
        return self._take([i for i, value in enumerate(self.t.tolist()) if abs(value - t) < 1e-6])

    def _take(self, samples: Sequence[int]) -> LayerScores:
        if not samples:
            raise ValueError("no sample fits")
        index = torch.tensor(samples)
        return LayerScores(
            self.layers,
            self.by_sample[:, index],
            self.metric,
            self.branches,
            self.floor,
            None if self.t is None else self.t[index],
            None if self.domains is None else tuple(self.domains[i] for i in samples),
        )

    def table(self) -> str:
        """Text table: unit, mean, standard error, mean per domain; highest first."""
        domains = self.by_domain() if len(set(self.domains or ())) > 1 else {}
        lines = ["layer        mean    stderr" + "".join(f"{name:>10}" for name in domains)]
        for u in self.mean.argsort(descending=True).tolist():
            row = f"{self.names[u]:<8}{self.mean[u]:9.4f} {self.stderr[u]:9.4f}"
            lines.append(row + "".join(f"{scores.mean[u]:10.4f}" for scores in domains.values()))
        return "\n".join(lines)

    def to_csv(self, path: str | Path) -> None:
        """One row per unit and sample: layer, branch, sample, t, domain, score."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for u, layer in enumerate(self.layers):
                for n, score in enumerate(self.by_sample[u].tolist()):
                    writer.writerow(
                        (
                            layer,
                            "" if self.branches is None else self.branches[u],
                            n,
                            "" if self.t is None else repr(self.t[n].item()),
                            "" if self.domains is None else self.domains[n],
                            repr(score),
                        )
                    )

    def to_json(self, path: str | Path) -> None:
        """Everything, as one JSON object."""
        Path(path).write_text(json.dumps(self.state(), indent=1), encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """Everything as plain lists and numbers; `LayerScores.from_state` reads it back."""
        return {
            "metric": self.metric,
            "layers": list(self.layers),
            "branches": None if self.branches is None else list(self.branches),
            "floor": self.floor,
            "block_evaluations": self.block_evaluations,
            "t": None if self.t is None else self.t.tolist(),
            "domains": None if self.domains is None else list(self.domains),
            "mean": self.mean.tolist(),
            "by_sample": self.by_sample.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LayerScores:
        """Inverse of `state`."""
        return cls(
            tuple(state["layers"]),
            torch.tensor(state["by_sample"], dtype=torch.float64),
            state["metric"],
            None if state["branches"] is None else tuple(state["branches"]),
            state["floor"],
            None if state["t"] is None else torch.tensor(state["t"]),
            None if state["domains"] is None else tuple(state["domains"]),
            state["block_evaluations"],
        )

    def plot(self) -> Figure:
        """Bars of the mean with standard error, per domain (needs matplotlib)."""
        from .report import plot_scores

        return plot_scores(self)


def read_scores(path: str | Path) -> LayerScores:
    """Read a CSV that `LayerScores.to_csv` wrote (the metric is not in it: "rms" is assumed).

    Raises:
        UserError: names the file and line that does not fit.
    """
    units: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    times: dict[int, str] = {}
    domains: dict[int, str] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not set(COLUMNS) <= set(reader.fieldnames):
                raise UserError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
            for row in reader:
                try:
                    sample = int(row["sample"])
                    units[int(row["layer"]), row["branch"]][sample] = float(row["score"])
                    times[sample], domains[sample] = row["t"], row["domain"]
                except (TypeError, ValueError) as error:
                    raise UserError(f"{path}:{reader.line_num}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    samples = sorted(times)
    if not units or any(sorted(scores) != samples for scores in units.values()):
        raise UserError(f"{path}: expected a score for each of the {len(samples)} samples of every layer")
    branches = tuple(branch for _, branch in units)
    return LayerScores(
        tuple(layer for layer, _ in units),
        torch.tensor([[s[n] for n in samples] for s in units.values()], dtype=torch.float64),
        branches=branches if any(branches) else None,
        t=torch.tensor([float(times[n]) for n in samples]) if all(times.values()) else None,
        domains=tuple(domains[n] for n in samples) if all(domains.values()) else None,
    )
