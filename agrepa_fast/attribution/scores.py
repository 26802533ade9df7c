"""FoG-A scores by unit (a layer or one of its branches) and sample, and their statistics.

by_sample is float64 [U, N] on the CPU. Each of the N samples may have a time t and a domain.
"""

from __future__ import annotations

import csv
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("rms", "squared")
EPS = 1e-8
# Relative change of the velocity below which 16-bit rounding can decide ranks.
SAFE_CHANGE_IN_16_BIT = 2e-3
COLUMNS = ("layer", "branch", "sample", "t", "domain", "score")
OPTIONAL_COLUMNS = ("clip", "noise", "name")  # older files may lack these


def integer(name: str, value: Any) -> int:
    """Return an integer of Python, NumPy or torch as an int. TypeError for anything else, True and False included."""
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r:.60}") from None


def per_sample(name: str, values: Any, samples: int, kind: str = "name") -> tuple[Any, ...]:
    """The names (kind "name") or integer ids (kind "id") of the samples, one each, as a tuple.

    Raises:
        TypeError: no iterable of them. ValueError: not one for each sample.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected one {kind} for each sample, got {values!r:.60}")
    values = tuple(values)
    if len(values) != samples:
        raise ValueError(f"{name}: expected {samples} {kind}s, got {len(values)}")
    if kind == "id":
        return tuple(integer(name, value) for value in values)
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected names, got {value!r:.60}")
    return values


def whole_number(name: str, value: Any, low: int, high: int | None = None, of: str = "") -> int:
    """Return `value` as an int, after a check of its range. `of` names what it counts.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below `low` or above `high`.
    """
    number = integer(name, value)
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
        floor_by_sample: [N] the score of a unit without any effect; None means 0.
        t: [N] or None. domains: N names or None.
        noise_by_sample: [N] the score that rounding alone causes in this dtype: the state was perturbed by half an ulp.
            None if it was not measured.
        clips: N ids or None; samples of one id are the same clip at several t, so they are not independent.
        block_evaluations: the cost of the probe, in evaluations of a block on all samples.
        names: names of the units: "0", "1", ... or "0.attn", "0.ff", ... for a `DiT`. Another model has its own names
            ("single_transformer_blocks.7"), and its layers are numbered in the order of its forward.
        engine: the engine that ran; see `attribute_layers`.
        sets: the layers of each unit if sets or spans were switched off (`layers` then has the first of each), or None.
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
    names: tuple[str, ...] = ()
    engine: str | None = field(default=None, compare=False)
    sets: tuple[tuple[int, ...], ...] | None = None

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
        if self.sets is not None and tuple(members[:1] for members in self.sets) != tuple((n,) for n in self.layers):
            raise ValueError(f"sets: expected {units} sets that begin with {self.layers}, got {self.sets}")
        if len(self.layers) != units:
            raise ValueError(f"by_sample has {units} rows for {len(self.layers)} layers")
        if self.branches is not None and len(self.branches) != units:
            raise ValueError(
                f"branches: expected a name for each of by_sample's {units} rows, got {len(self.branches)}"
            )
        if not self.names:
            object.__setattr__(self, "names", self._numbers())
        if len(self.names) != units:
            raise ValueError(f"names: expected a name for each of by_sample's {units} rows, got {len(self.names)}")
        for name in ("t", "floor_by_sample", "noise_by_sample"):
            value = getattr(self, name)
            if value is not None and value.shape != (samples,):
                raise ValueError(f"{name}: expected [{samples}], got {list(value.shape)}")
        if self.domains is not None:
            object.__setattr__(self, "domains", per_sample("domains", self.domains, samples))
        if self.clips is not None:
            object.__setattr__(self, "clips", per_sample("clips", self.clips, samples, "id"))

    def _numbers(self) -> tuple[str, ...]:
        """ "0", "1", ... for blocks; "0.attn", "0.ff", ... for branches; "0+1", "4+5", ... for sets."""
        if self.sets is not None:
            return tuple("+".join(map(str, members)) for members in self.sets)
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
        """The mean score of a unit without any effect. A mean at or below it has no meaning."""
        return 0.0 if self.floor_by_sample is None else self.floor_by_sample.mean().item()

    @property
    def noise_floor(self) -> float:
        """The mean score that rounding alone causes, at least `floor`; `floor` if it was not measured."""
        return self.floor if self.noise_by_sample is None else max(self.floor, self.noise_by_sample.mean().item())

    @property
    def above_floor(self) -> Tensor:
        """[U] bool: whether the unit's mean score is above that of a unit without effect, rounding included."""
        # The margin is for rounding: velocities of two streams that compute the same may differ in the last bit.
        return self.mean > self.noise_floor * (1 + 1e-6) + 1e-12

    def domain(self, *names: str) -> LayerScores:
        """The scores of the samples of one domain, or of several."""
        known = sorted(set(self.domains or ()))
        wrong = [name for name in names if name not in known]
        if self.domains is None or wrong or not names:
            raise ValueError(f"domain: expected one of {known}, got {', '.join(map(repr, wrong or names)) or 'none'}")
        return self._take([i for i, domain in enumerate(self.domains) if domain in names])

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

    def before(self, layer: int) -> LayerScores:
        """The scores of the units whose layer comes before `layer`."""
        kept = [unit for unit, own in enumerate(self.layers) if own < layer]

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[unit] for unit in kept)

        return replace(
            self,
            layers=pick(self.layers),
            by_sample=self.by_sample[kept],
            branches=None if self.branches is None else pick(self.branches),
            names=pick(self.names),
            sets=None if self.sets is None else pick(self.sets),
        )

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
            names=self.names,
            engine=self.engine,
            sets=self.sets,
        )

    def table(self) -> str:
        """Text table: unit, mean, standard error, mean per domain; highest first."""
        domains = self.by_domain() if len(set(self.domains or ())) > 1 else {}
        widths = {name: max(9, len(name)) for name in domains}
        wide = max(8, *(len(name) + 2 for name in self.names))
        lines = [f"{'layer':<{wide}}     mean    stderr" + "".join(f" {name:>{widths[name]}}" for name in domains)]
        for u in self.mean.argsort(descending=True, stable=True).tolist():
            row = f"{self.names[u]:<{wide}}{self.mean[u]:9.4f} {self.stderr[u]:9.4f}"
            lines.append(row + "".join(f" {part.mean[u]:{widths[name]}.4f}" for name, part in domains.items()))
        return "\n".join(lines)

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each unit and sample: layer ("0+3" for a set), branch, sample, t, domain, score, clip, noise
        (of the sample) and name (of the unit)."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow((*COLUMNS, *OPTIONAL_COLUMNS))
            for u, layers in enumerate(self.sets or ((layer,) for layer in self.layers)):
                for n, score in enumerate(self.by_sample[u].tolist()):
                    writer.writerow(
                        (
                            "+".join(map(str, layers)),
                            "" if self.branches is None else self.branches[u],
                            n,
                            "" if self.t is None else repr(self.t[n].item()),
                            "" if self.domains is None else self.domains[n],
                            repr(score),
                            "" if self.clips is None else self.clips[n],
                            "" if self.noise_by_sample is None else repr(self.noise_by_sample[n].item()),
                            self.names[u],
                        )
                    )

    def to_json(self, path: str | Path) -> None:
        """Write everything as one JSON object."""
        Path(path).write_text(json.dumps(self.state(), indent=1), encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """Everything as plain lists and numbers; `LayerScores.from_state` reads it back."""
        state = {
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
        # Files of older versions lack both; they are written again without them.
        if self.names != self._numbers():
            state["names"] = list(self.names)
        if self.engine is not None:
            state["engine"] = self.engine
        if self.sets is not None:
            state["sets"] = [list(members) for members in self.sets]
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LayerScores:
        """The inverse of `state`.

        Raises:
            ValueError: an entry is missing or does not fit; names it.
        """
        if not isinstance(state, dict):
            raise ValueError(f"scores: expected a mapping of their fields, got {type(state).__name__}")

        def entry(name: str, convert: Callable[[Any], Any], required: bool = False) -> Any:
            if name not in state and name not in ("noise_by_sample", "names", "engine", "sets"):  # of older versions
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
            names=entry("names", _tuple_of(str)) or (),
            engine=entry("engine", _text),
            sets=entry("sets", lambda sets: tuple(map(_tuple_of(int), sets))),
        )

    def plot(self) -> Figure:
        """Draw bars of the mean with its standard error, by domain. Needs matplotlib."""
        from .pictures import plot_scores

        return plot_scores(self)


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
