"""Aligned layers and their weights: a `LayerSelection`, one for all teachers or one for each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, nn

from ..attribution.foreign.wrapped import bare, prefix_of, unwrap
from ..errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

N = TypeVar("N", int, float)

# How the weights follow from scores.
WEIGHTINGS = ("share", "score", "by-time")


def checked_numbers(name: str, given: object, kind: type, convert: Callable[[Any], N]) -> tuple[N, ...]:
    """A sequence of numbers, NumPy's among them, as Python's."""
    words = "distinct ascending 0-based integers" if kind is Integral else "numbers"
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise ValueError(f"{name}: expected a sequence of {words}, got {given!r:.60}")
    values = tuple(given)
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{name}: expected {words}, got {values!r:.60}")
    return tuple(map(convert, values))


@dataclass(frozen=True)
class LayerSelection:
    """Aligned layers (0-based, ascending) and their weights.

    Attributes:
        layers: the layers.
        weights: one number >= 0 for each layer.
        method: how they were chosen, for the record.
        weighting: "share": the weights sum to 1 (the paper's lambda_k). "score": the weights are the FoG-A scores
            themselves (the authors' release). "by-time": each sample's weights are the layers' shares of the scores at
            its flow time; `weights` are the means of these shares over the grid.
        t_grid: the ascending times of `scores`; only "by-time".
        scores: [layers][times] numbers >= 0, with a sum above 0 at every time; only "by-time".
        names: the layers' names in another model ("single_transformer_blocks.7"); None for a `DiT`.
        target: the later layer toward which a self teacher aligns these layers, where a probe measured it; see
            `SelfTeacher`.
    """

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    method: str = "fixed"
    weighting: str = "share"
    t_grid: tuple[float, ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    names: tuple[str, ...] | None = None
    target: int | None = None

    def __post_init__(self) -> None:
        layers = checked_numbers("layers", self.layers, Integral, int)
        weights = checked_numbers("weights", self.weights, Real, float)
        if not layers:
            raise ValueError("layers: expected at least one layer")
        if len(layers) != len(weights):
            raise ValueError(f"layers and weights: expected as many of each, got {layers}, {weights}")
        if sorted(set(layers)) != list(layers) or layers[0] < 0:
            raise ValueError(f"layers: expected distinct ascending 0-based integers, got {layers}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {self.weighting!r:.60}")
        # The comparisons are written so that nan, for which each is false, is refused as well.
        if self.weighting == "score":
            if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
                raise ValueError(f"weights: expected finite numbers >= 0, at least one above 0, got {weights}")
        elif not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):
            raise ValueError(f'weights: expected numbers >= 0 that sum to 1, got {weights} (scores: weighting="score")')
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "weights", weights)
        if self.names is not None:
            names = tuple(self.names) if isinstance(self.names, list | tuple) else ()
            if len(names) != len(layers) or not all(isinstance(name, str) and name for name in names):
                raise ValueError(f"names: expected one name for each of {len(layers)} layers, got {self.names!r:.60}")
            object.__setattr__(self, "names", names)
        if self.target is not None:
            [target] = checked_numbers("target", (self.target,), Integral, int)
            if target <= layers[-1]:
                raise ValueError(f"target: expected a layer after all of {list(layers)}, got {target}")
            object.__setattr__(self, "target", target)
        self._check_times()

    def _check_times(self) -> None:
        t_grid = checked_numbers("t_grid", self.t_grid, Real, float)
        scores = tuple(checked_numbers("scores", row, Real, float) for row in self.scores)
        if self.weighting != "by-time":
            if t_grid or scores:
                raise ValueError(f't_grid, scores: only with weighting="by-time", got {self.weighting!r}')
            return
        if not t_grid or sorted(set(t_grid)) != list(t_grid) or not all(0 <= t <= 1 for t in t_grid):
            raise ValueError(f"t_grid: expected ascending times in [0, 1], got {t_grid}")
        if len(scores) != len(self.layers) or any(len(row) != len(t_grid) for row in scores):
            raise ValueError(f"scores: expected {len(self.layers)} layers of {len(t_grid)} times, got {scores!r:.80}")
        for t, column in zip(t_grid, zip(*scores)):
            # The loss divides by the sum in float32.
            if not (min(column) >= 0 and 1e-30 < sum(column) < 1e30):
                raise ValueError(f"scores: expected numbers >= 0 that sum to more than 0 at t {t:g}, got {column}")
        object.__setattr__(self, "t_grid", t_grid)
        object.__setattr__(self, "scores", scores)

    @classmethod
    def uniform(cls, layers: Sequence[int], method: str = "fixed", t_grid: Sequence[float] = ()) -> LayerSelection:
        """The given layers with equal weights; with `t_grid`, as a "by-time" selection that is equal at all times."""
        ordered = tuple(sorted(checked_numbers("layers", layers, Integral, int)))
        if len(t_grid):
            return cls.by_time(t_grid, {layer: [1.0] * len(t_grid) for layer in ordered}, method)
        return cls(ordered, (1 / len(ordered),) * len(ordered) if ordered else (), method)

    @classmethod
    def from_scores(cls, scores: Mapping[int, float], method: str, weighting: str = "share") -> LayerSelection:
        """{layer: score} with the scores as weights: as they are ("score"), or divided by their sum ("share")."""
        layers = sorted(scores)
        # A sum of 0 becomes nan, which __post_init__ refuses.
        total = 1.0 if weighting == "score" else sum(scores[layer] for layer in layers) or math.nan
        return cls(tuple(layers), tuple(scores[layer] / total for layer in layers), method, weighting)

    @classmethod
    def by_time(
        cls, t_grid: Sequence[float], scores: Mapping[int, Sequence[float]], method: str = "fixed"
    ) -> LayerSelection:
        """{layer: its score at each time of t_grid} with weights that change with flow time."""
        layers = tuple(sorted(scores))
        rows = tuple(checked_numbers("scores", scores[layer], Real, float) for layer in layers)
        totals = [sum(column) or math.nan for column in zip(*rows)]  # nan: __post_init__ names the time
        shares = [sum(value / total for value, total in zip(row, totals)) / len(totals) for row in rows if totals]
        whole = sum(shares)
        weights = [share / whole if whole == whole else 1 / len(rows) for share in shares]
        return cls(layers, tuple(weights), method, "by-time", tuple(t_grid), rows)

    def named(self, names: Mapping[int, str] | None) -> LayerSelection:
        """The same selection with its layers' names out of `names`, {layer: name}; None for none."""
        return replace(self, names=None if names is None else tuple(names[layer] for layer in self.layers))

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The selected blocks of `model`, which may be wrapped (DDP, PEFT, torch.compile), by their names.

        Raises:
            ValueError: the selection has no names, or the model no module of such a name.
        """
        if self.names is None:
            raise ValueError("selection: it has no names; selections made from scores of another model have them")
        network, prefix = unwrap(model), prefix_of(model)
        found = {name.replace("._orig_mod", ""): module for name, module in network.named_modules()}
        names = [bare(name, prefix) for name in self.names]
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"selection: {type(network).__name__} has no module {missing[0]!r}")
        return {name: found[name] for name in names}

    def to_json(self, path: str | Path) -> None:
        """Write `{"layers": [...], "weights": [...], "method": ...}`, and `"names"` where there are any."""
        write_selection(self, path)

    def state(self) -> dict[str, Any]:
        """Everything as plain lists and numbers; `from_state` reads it back."""
        state: dict[str, Any] = {"layers": list(self.layers), "weights": list(self.weights), "method": self.method}
        if self.weighting != "share":
            state["weighting"] = self.weighting
        if self.weighting == "by-time":
            state |= {"t_grid": list(self.t_grid), "scores": [list(row) for row in self.scores]}
        if self.names is not None:
            state["names"] = list(self.names)
        if self.target is not None:
            state["target"] = self.target
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LayerSelection:
        """Inverse of `state`; other entries are ignored."""
        return cls(
            tuple(state["layers"]),
            tuple(state["weights"]),
            state.get("method", "fixed"),
            state.get("weighting", "share"),
            tuple(state.get("t_grid", ())),
            tuple(map(tuple, state.get("scores", ()))),
            state.get("names"),
            state.get("target"),
        )

    def synchronised(self, device: torch.device | None = None, group: ProcessGroup | None = None) -> LayerSelection:
        """The first rank's selection on every rank; see the function `synchronised`."""
        return synchronised(self, device, group)

    @classmethod
    def from_json(cls, path: str | Path) -> LayerSelection:
        """Read a selection file that holds one selection for all teachers; `read_selection` reads both kinds.

        Raises:
            UserError: the file cannot be read or does not hold a selection; names the file.
        """
        selection = read_selection(path)
        if not isinstance(selection, LayerSelection):
            names = ", ".join(selection)
            raise UserError(f"{path}: holds a selection for each teacher ({names}): read it with ag.read_selection")
        return selection


# One selection for all teachers, or {teacher: its own}.
Selection = LayerSelection | Mapping[str, LayerSelection]
S = TypeVar("S", bound=Selection)


def check_selection(selection: Selection) -> None:
    """Refuse what is no selection, and say how to make one."""
    values = list(selection.values()) if isinstance(selection, Mapping) else [selection]
    wrong = [value for value in values if not isinstance(value, LayerSelection)]
    if wrong or not values:
        raise TypeError(
            "selection: expected a LayerSelection (LayerSelection.uniform([0, 2]), say) or {teacher: LayerSelection}, "
            f"got a {type(selection).__name__}"
        )


def by_teacher(selection: Selection, teachers: Iterable[str]) -> dict[str, LayerSelection]:
    """{teacher: its selection}, in the teachers' order.

    Raises:
        ValueError: a mapping that lacks a teacher, or names an unknown one.
    """
    check_selection(selection)
    names = list(teachers)
    if isinstance(selection, LayerSelection):
        return dict.fromkeys(names, selection)
    if set(selection) != set(names):
        raise ValueError(f"selection: expected one for each of the teachers {names}, got {list(selection)}")
    return {name: selection[name] for name in names}


def selection_state(selection: Selection) -> dict[str, Any]:
    """As plain lists and numbers: `LayerSelection.state`, or {"teachers": {teacher: that}}."""
    if isinstance(selection, LayerSelection):
        return selection.state()
    return {"teachers": {name: own.state() for name, own in selection.items()}}


def selection_from_state(state: Mapping[str, Any]) -> Selection:
    """Inverse of `selection_state`; other entries are ignored."""
    if "teachers" not in state:
        return LayerSelection.from_state(state)
    selection = {name: LayerSelection.from_state(own) for name, own in state["teachers"].items()}
    if not selection:
        raise ValueError("teachers: expected at least one")
    return selection


def described(selection: Selection) -> str:
    """The layers with their weights in one line, for people."""
    if isinstance(selection, LayerSelection):
        layers = ", ".join(f"{layer} ({weight:.3f})" for layer, weight in zip(selection.layers, selection.weights))
        return layers if selection.target is None else f"{layers} toward {selection.target}"
    return "; ".join(f"{name}: {described(own)}" for name, own in selection.items())


def write_selection(selection: Selection, path: str | Path, **facts: Any) -> None:
    """Write a selection as JSON, for `read_selection`. `facts` (a step, a metric) are recorded beside it.

    Raises:
        TypeError, ValueError: no selection; a fact with the name of one of its entries. OSError: it cannot be written.
    """
    check_selection(selection)
    state = selection_state(selection)
    if taken := [name for name in facts if name in (*state, "teachers")]:
        raise ValueError(f"{taken[0]}: the file holds the selection's own, so it cannot be one of the facts beside it")
    text = json.dumps({**state, **facts}, indent=1) + "\n"
    Path(path).write_text(text, encoding="utf-8")


def read_selection(path: str | Path) -> Selection:
    """Read a selection file: a `LayerSelection`, or {teacher: LayerSelection}.

    Raises:
        UserError: the file cannot be read or does not hold a selection; names the file.
    """
    try:
        return selection_from_state(json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a layer selection ({error})") from None


def synchronised(selection: S, device: torch.device | None = None, group: ProcessGroup | None = None) -> S:
    """The first rank's selection on every rank of the process group (None: of all); itself where there is none.

    Every rank of the group must call it. `device`: where its backend wants tensors (NCCL: this rank's GPU)."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return selection
    box = [selection_state(selection)]
    source = 0 if group is None else distributed.get_global_rank(group, 0)
    distributed.broadcast_object_list(box, src=source, group=group, device=device)
    return selection_from_state(box[0])  # type: ignore[return-value]  # of the same kind on all ranks
