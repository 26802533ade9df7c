"""Which layers to align, and with what weights: a `LayerSelection`, made from scores or given."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..attribution.scores import LayerScores


@dataclass(frozen=True)
class LayerSelection:
    """Aligned layers (0-based, ascending) and their weights lambda_k, which sum to 1."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    method: str = "fixed"

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.weights):
            raise ValueError(f"layers and weights: expected as many of each, got {self.layers}, {self.weights}")
        whole = all(type(layer) is int for layer in self.layers)
        if not whole or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 0:
            raise ValueError(f"layers: expected distinct ascending 0-based integers, got {self.layers}")
        # So that nan, for which every comparison is false, is refused as well.
        if not (min(self.weights) >= 0 and abs(sum(self.weights) - 1) <= 1e-6):
            raise ValueError(f"weights: expected numbers >= 0 that sum to 1, got {self.weights}")

    @classmethod
    def uniform(cls, layers: Sequence[int], method: str = "fixed") -> LayerSelection:
        """The given layers with equal weights."""
        ordered = tuple(sorted(layers))
        return cls(ordered, (1 / len(ordered),) * len(ordered) if ordered else (), method)

    def to_json(self, path: str | Path) -> None:
        """Write `{"layers": [...], "weights": [...], "method": ...}`."""
        Path(path).write_text(json.dumps(self.state(), indent=1) + "\n", encoding="utf-8")

    def state(self) -> dict[str, object]:
        return {"layers": list(self.layers), "weights": list(self.weights), "method": self.method}

    @classmethod
    def from_state(cls, state: dict) -> LayerSelection:
        return cls(tuple(state["layers"]), tuple(state["weights"]), state.get("method", "fixed"))

    @classmethod
    def from_json(cls, path: str | Path) -> LayerSelection:
        """Read a selection file.

        Raises:
            UserError: the file cannot be read or does not hold a selection; names the file.
        """
        try:
            return cls.from_state(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a layer selection ({error})") from None


def select_layers(scores: LayerScores, k: int = 3) -> LayerSelection:
    """AG-REPA's choice: the k layers of the highest mean score, weighted by score / sum over the chosen.

    Scores of branches are added up by layer; of equal scores the lower layer wins. Where no layer stands
    above the floor (a network at its adaLN-zero initialisation) the scores say nothing: a warning, and all
    layers with equal weights.

    Args:
        scores: [U] units; see `LayerScores`.
        k: how many layers, at least 1 and at most as many as were scored.

    Raises:
        ValueError: when k does not fit.
    """
    by_layer: dict[int, float] = {}
    for layer, mean in zip(scores.layers, scores.mean.tolist()):
        by_layer[layer] = by_layer.get(layer, 0.0) + mean
    if not 1 <= k <= len(by_layer):
        raise ValueError(f"k: expected 1 to {len(by_layer)} layers, got {k}")
    if not scores.above_floor.any():
        warnings.warn(
            "no layer's score is above the floor: falling back to equal weights on all layers; train before probing",
            stacklevel=2,
        )
        return LayerSelection.uniform(list(by_layer), "uniform")
    chosen = sorted(sorted(by_layer, key=lambda layer: (-by_layer[layer], layer))[:k])
    total = sum(by_layer[layer] for layer in chosen)
    return LayerSelection(tuple(chosen), tuple(by_layer[layer] / total for layer in chosen), "foga")
