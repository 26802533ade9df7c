"""FoG-A scores and their statistics: per unit (a layer or one of its branches) and sample.

by_sample [U, N] float64 on the CPU; N samples, each with its t and domain when they are known.
"""

from __future__ import annotations

import csv
import json
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
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
# Relative change of the velocity below which 16-bit rounding can decide ranks.
SAFE_CHANGE_IN_16_BIT = 2e-3
COLUMNS = ("layer", "branch", "sample", "t", "domain", "score")
OPTIONAL_COLUMNS = ("clip", "noise")  # which older files may lack


def whole_number(name: str, value: Any, low: int, high: int | None = None, of: str = "") -> int:
    """`value` as an int; `of` is what it counts.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below `low` or above `high`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {limits}{of and ' '}{of}, got {number}")
    return number


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
        floor_by_sample: [N] the score that a unit without any effect gets; None for 0.
        t: [N] or None. domains: N names or None.
        noise_by_sample: [N] the score that rounding alone makes in this dtype, measured with an identity block that
            leaves the residual stream a last bit away; None where it was not measured.
        clips: N ids or None; samples of one id are the same clip at several t, so they are not independent.
        block_evaluations: what the probe cost, in evaluations of a block on all samples.
    """

    layers: tuple[int, ...]
    by_sample: Tensor
    metric: str = "rms"
    branches: tuple[str, ...] | None = None
    floor_by_sample: Tensor | None = None
    t: Tensor | None = None
    domains: tuple[str, ...] | None = None
    block_evaluations: float | None = field(default=None, compare=False)
    clips: tuple[int, ...] | None = None
    noise_by_sample: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.by_sample, Tensor) or not self.by_sample.is_floating_point():
            got = getattr(self.by_sample, "dtype", type(self.by_sample).__name__)
            raise TypeError(f"by_sample: expected a floating tensor, got {got}")
        if self.by_sample.dim() != 2 or self.by_sample.numel() == 0:
            raise ValueError(
                f"by_sample: expected [units, samples], at least one of each, got {list(self.by_sample.shape)}"
            )
        if not self.by_sample.isfinite().all():
            unit, sample = (~self.by_sample.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"by_sample: the score of unit {unit} and sample {sample} is not finite")
        units, samples = self.by_sample.shape
        if len(self.layers) != units:
            raise ValueError(f"by_sample has {units} rows for {len(self.layers)} layers")
        if self.branches is not None and len(self.branches) != units:
            raise ValueError(
                f"branches: expected a name for each of by_sample's {units} rows, got {len(self.branches)}"
            )
        per_sample = ("t", self.t), ("floor_by_sample", self.floor_by_sample), ("noise_by_sample", self.noise_by_sample)
        for name, value in per_sample:
            if value is not None and value.shape != (samples,):
                raise ValueError(f"{name}: expected [{samples}], got {list(value.shape)}")
        if self.domains is not None and len(self.domains) != samples:
            raise ValueError(f"domains: expected {samples} names, got {len(self.domains)}")
        if self.clips is not None and len(self.clips) != samples:
            raise ValueError(f"clips: expected {samples} ids, got {len(self.clips)}")

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
        """[U] standard error of the mean over clips: with `clips`, a clip's samples are averaged first.

        nan for a single clip."""
        sums, counts = self.by_clip()
        by_clip = sums / counts
        count = by_clip.shape[1]
        if count < 2:
            return torch.full((len(self.layers),), torch.nan, dtype=self.by_sample.dtype)
        return by_clip.std(1) / count**0.5

    def by_clip(self) -> tuple[Tensor, Tensor]:
        """Sum of each clip's scores [U, clips] and its number of samples [clips]; without ids, a sample is a clip."""
        if self.clips is None:
            return self.by_sample, torch.ones(self.by_sample.shape[1], dtype=torch.long)
        ids, clip_of = torch.tensor(self.clips).unique(return_inverse=True)
        sums = self.by_sample.new_zeros(self.by_sample.shape[0], len(ids)).index_add_(1, clip_of, self.by_sample)
        return sums, clip_of.bincount()

    @property
    def floor(self) -> float:
        """The mean score of a unit without any effect; at or below it a mean says nothing."""
        return 0.0 if self.floor_by_sample is None else self.floor_by_sample.mean().item()

    @property
    def noise_floor(self) -> float:
        """The mean score that rounding alone makes, never below `floor`; `floor` where it was not measured."""
        return self.floor if self.noise_by_sample is None else max(self.floor, self.noise_by_sample.mean().item())

    @property
    def above_floor(self) -> Tensor:
        """[U] bool: the unit's mean score is above what a unit without effect gets, rounding included."""
        # Room for rounding: the velocities of two streams that compute the same may differ in the last bit.
        return self.mean > self.noise_floor * (1 + 1e-6) + 1e-12

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
        samples = [i for i, value in enumerate(self.t.tolist()) if abs(value - t) < 1e-6]
        if not samples:
            raise ValueError(f"t: no sample at {t:g}, only at {', '.join(f'{v:g}' for v in self.t.unique().tolist())}")
        return self._take(samples)

    def _take(self, samples: Sequence[int]) -> LayerScores:
        index = torch.tensor(samples)
        return LayerScores(
            self.layers,
            self.by_sample[:, index],
            self.metric,
            self.branches,
            None if self.floor_by_sample is None else self.floor_by_sample[index],
            None if self.t is None else self.t[index],
            None if self.domains is None else tuple(self.domains[i] for i in samples),
            clips=None if self.clips is None else tuple(self.clips[i] for i in samples),
            noise_by_sample=None if self.noise_by_sample is None else self.noise_by_sample[index],
        )

    def table(self) -> str:
        """Text table: unit, mean, standard error, mean per domain; highest first."""
        domains = self.by_domain() if len(set(self.domains or ())) > 1 else {}
        widths = {name: max(9, len(name)) for name in domains}
        lines = ["layer        mean    stderr" + "".join(f" {name:>{widths[name]}}" for name in domains)]
        for u in self.mean.argsort(descending=True, stable=True).tolist():
            row = f"{self.names[u]:<8}{self.mean[u]:9.4f} {self.stderr[u]:9.4f}"
            lines.append(row + "".join(f" {part.mean[u]:{widths[name]}.4f}" for name, part in domains.items()))
        return "\n".join(lines)

    def to_csv(self, path: str | Path) -> None:
        """One row per unit and sample: layer, branch, sample, t, domain, score, clip, noise (of the sample)."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow((*COLUMNS, *OPTIONAL_COLUMNS))
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
                            "" if self.clips is None else self.clips[n],
                            "" if self.noise_by_sample is None else repr(self.noise_by_sample[n].item()),
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
            "noise_floor": self.noise_floor,
            "floor_by_sample": None if self.floor_by_sample is None else self.floor_by_sample.tolist(),
            "noise_by_sample": None if self.noise_by_sample is None else self.noise_by_sample.tolist(),
            "block_evaluations": self.block_evaluations,
            "t": None if self.t is None else self.t.tolist(),
            "domains": None if self.domains is None else list(self.domains),
            "clips": None if self.clips is None else list(self.clips),
            "mean": self.mean.tolist(),
            "by_sample": self.by_sample.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LayerScores:
        """Inverse of `state`.

        Raises:
            ValueError: an entry is missing or does not fit; names it.
        """
        if not isinstance(state, dict):
            raise ValueError(f"scores: expected a mapping of their fields, got {type(state).__name__}")

        def entry(name: str, convert: Callable[[Any], Any], required: bool = False) -> Any:
            # Files of older versions lack the noise.
            if name not in state and name != "noise_by_sample":
                raise ValueError(f"scores: {name} is missing")
            value = state.get(name)
            if value is None and not required:
                return None
            try:
                return convert(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise ValueError(f"scores: {name}: does not hold what `LayerScores.state` writes") from None

        return cls(
            layers=entry("layers", _tuple_of(int), required=True),
            by_sample=entry("by_sample", _numbers, required=True),
            metric=entry("metric", _text, required=True),
            branches=entry("branches", _tuple_of(str)),
            floor_by_sample=entry("floor_by_sample", _numbers),
            t=entry("t", torch.tensor),
            domains=entry("domains", _tuple_of(str)),
            block_evaluations=entry("block_evaluations", float),
            clips=entry("clips", _tuple_of(int)),
            noise_by_sample=entry("noise_by_sample", _numbers),
        )

    def plot(self) -> Figure:
        """Bars of the mean with standard error, per domain (needs matplotlib)."""
        from .pictures import plot_scores

        return plot_scores(self)


def read_scores(path: str | Path) -> LayerScores:
    """Read a CSV that `LayerScores.to_csv` wrote (the metric is not in it: "rms" is assumed).

    Raises:
        UserError: names the file and line that does not fit.
    """
    units: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    times: dict[int, Any] = {}
    domains: dict[int, Any] = {}
    clips: dict[int, Any] = {}
    noises: dict[int, Any] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not set(COLUMNS) <= set(reader.fieldnames):
                raise UserError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
            for row in reader:
                try:
                    unit, sample, score, t = _parse(row)
                    if sample in units[unit]:
                        raise ValueError(f"a second score of sample {sample} for layer {row['layer']}{row['branch']}")
                    facts = (
                        (times, t),
                        (domains, row["domain"]),
                        (clips, int(row["clip"]) if row.get("clip") else None),
                        (noises, float(row["noise"]) if row.get("noise") else None),
                    )
                    if any(known.setdefault(sample, value) != value for known, value in facts):
                        raise ValueError(f"sample {sample} has another t, domain, clip or noise in an earlier line")
                    units[unit][sample] = score
                except ValueError as error:
                    raise UserError(f"{path}:{reader.line_num}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    samples = sorted(times)
    if not units or any(sorted(scores) != samples for scores in units.values()):
        raise UserError(f"{path}: expected a score for each of the {len(samples)} samples of every layer")
    branches = tuple(branch for _, branch in units)
    if any(branches) != all(branches):
        raise UserError(f"{path}: expected a branch in every row or in none")
    known_times = [t for t in (times[n] for n in samples) if t is not None]
    return LayerScores(
        tuple(layer for layer, _ in units),
        torch.tensor([[s[n] for n in samples] for s in units.values()], dtype=torch.float64),
        branches=branches if any(branches) else None,
        t=torch.tensor(known_times) if len(known_times) == len(samples) else None,
        domains=tuple(domains[n] for n in samples) if all(domains.values()) else None,
        clips=tuple(clips[n] for n in samples) if None not in clips.values() else None,
        noise_by_sample=(
            torch.tensor([noises[n] for n in samples], dtype=torch.float64) if None not in noises.values() else None
        ),
    )


def _numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    return value


def _tuple_of(kind: type) -> Callable[[Any], Any]:
    def convert(values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list | tuple) or not all(isinstance(value, kind) for value in values):
            raise TypeError(f"expected a list of {kind.__name__}")
        return tuple(values)

    return convert


def _parse(row: dict[str | Any, str | Any]) -> tuple[tuple[int, str], int, float, float | None]:
    """One line of the CSV -> (layer, branch), sample, score, t; ValueError says what does not fit."""
    if None in row or None in row.values():  # a line longer or shorter than the header
        raise ValueError(f"expected {len(COLUMNS)} fields")
    layer, score = int(row["layer"]), float(row["score"])
    if layer < 0:
        raise ValueError(f"expected a 0-based layer, got {layer}")
    if not math.isfinite(score):
        raise ValueError(f"the score is not finite: {row['score']}")
    return (layer, row["branch"]), int(row["sample"]), score, float(row["t"]) if row["t"] else None
