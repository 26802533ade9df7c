"""Which layers to align, and with what weights: a `LayerSelection`, made from scores or given."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..attribution.scores import LayerScores

N = TypeVar("N", int, float)


def _numbers(name: str, given: object, kind: type, convert: Callable[[Any], N]) -> tuple[N, ...]:
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
    """Aligned layers (0-based, ascending) and their weights lambda_k, which sum to 1."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    method: str = "fixed"

    def __post_init__(self) -> None:
        layers = _numbers("layers", self.layers, Integral, int)
        weights = _numbers("weights", self.weights, Real, float)
        if not layers or len(layers) != len(weights):
            raise ValueError(f"layers and weights: expected as many of each, got {layers}, {weights}")
        if sorted(set(layers)) != list(layers) or layers[0] < 0:
            raise ValueError(f"layers: expected distinct ascending 0-based integers, got {layers}")
        # So that nan, for which every comparison is false, is refused as well.
        if not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):
            raise ValueError(f"weights: expected numbers >= 0 that sum to 1, got {weights}")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "weights", weights)

    @classmethod
    def uniform(cls, layers: Sequence[int], method: str = "fixed") -> LayerSelection:
        """The given layers with equal weights."""
        ordered = tuple(sorted(_numbers("layers", layers, Integral, int)))
        return cls(ordered, (1 / len(ordered),) * len(ordered) if ordered else (), method)

    def to_json(self, path: str | Path) -> None:
        """Write `{"layers": [...], "weights": [...], "method": ...}`."""
        Path(path).write_text(json.dumps(self.state(), indent=1) + "\n", encoding="utf-8")

    def state(self) -> dict[str, object]:
        return {"layers": list(self.layers), "weights": list(self.weights), "method": self.method}

    @classmethod
    def from_state(cls, state: dict) -> LayerSelection:
        return cls(tuple(state["layers"]), tuple(state["weights"]), state.get("method", "fixed"))

    def synchronised(self, device: torch.device | None = None, group: ProcessGroup | None = None) -> LayerSelection:
        """The first rank's selection on every rank of the process group (None: of all); itself where there is none.

        Every rank of it must call it. `device`: where the group's backend wants its tensors (NCCL: this rank's GPU)."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        box = [self.state()]
        source = 0 if group is None else distributed.get_global_rank(group, 0)
        distributed.broadcast_object_list(box, src=source, group=group, device=device)
        return LayerSelection.from_state(box[0])

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


def check_selection(selection: LayerSelection) -> None:
    """Refuse what is no `LayerSelection`, and say how to make one."""
    if not isinstance(selection, LayerSelection):
        kind = type(selection).__name__
        raise TypeError(f"selection: expected a LayerSelection (LayerSelection.uniform([0, 2]), say), got a {kind}")


def check_k(k: int) -> None:
    """Refuse a number of layers that is no integer."""
    if not isinstance(k, Integral) or isinstance(k, bool):
        raise TypeError(f"k: expected a number of layers, got {k!r:.60}")


def select_layers(scores: LayerScores, k: int = 3) -> LayerSelection:
    """AG-REPA's choice: the k layers of the highest mean score, weighted by score / sum over the chosen.

    Scores of branches are added up by layer; of equal scores the lower layer wins. Where no layer stands
    above the floor (a network at its adaLN-zero initialisation) the scores say nothing: a warning, and all
    layers with equal weights.

    Args:
        scores: [U] units; see `LayerScores`.
        k: how many layers, at least 1 and at most as many as were scored.

    Raises:
        ValueError, TypeError: k does not fit, or `scores` are no `LayerScores`.
    """
    if not all(hasattr(scores, name) for name in ("layers", "mean", "above_floor")):
        raise TypeError(
            f"scores: expected LayerScores, as attribute_layers returns them, got a {type(scores).__name__}"
        )
    check_k(k)
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


# What a policy needs beside the depth and k.
POLICIES = {
    "fixed": "layers",
    "even": "",
    "random": "",
    "deepest": "",
    "shallowest": "",
    "stored": "values",
    "gradient-norm": "values",
    "first-order": "values",
    "foga": "scores",
    "foga-soft": "scores",
}


def choose_layers(
    policy: str,
    depth: int,
    k: int = 3,
    *,
    layers: Sequence[int] = (),
    values: Sequence[float] | Tensor = (),
    scores: LayerScores | None = None,
    seed: int = 0,
) -> LayerSelection:
    """AG-REPA's choice and the controls it is compared with, each in one line.

    Args:
        policy: "fixed" (`layers`); "even" (k layers in the middles of k equal parts of the depth); "random" (`seed`);
            "deepest"; "shallowest"; the k highest of `values`: "stored" (LASP), "gradient-norm" and "first-order"
            (`layer_sensitivity`); from `scores`: "foga" (`select_layers`) and "foga-soft" (every scored layer,
            weighted by its score). All but FoG-A's weigh their layers equally.
        depth: number of layers. k: how many to choose.
        values: [depth] what a layer stores, or how the loss reacts to it.

    Raises:
        UserError: an unknown policy, a k or layer outside the depth, or what the policy needs is not given.
    """
    if policy not in POLICIES:
        raise UserError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    given = {"layers": len(layers) > 0, "values": len(values) > 0, "scores": scores is not None, "": True}
    if not given[POLICIES[policy]]:
        raise UserError(f"policy {policy!r} needs {POLICIES[policy]}")
    check_k(k)
    if not 1 <= k <= depth:
        raise UserError(f"k: expected 1 to {depth} layers, got {k}")
    if scores is not None and policy == "foga":
        return select_layers(scores, k)
    if scores is not None and policy == "foga-soft":
        soft = select_layers(scores, len(set(scores.layers)))
        return soft if soft.method == "uniform" else LayerSelection(soft.layers, soft.weights, policy)
    if policy == "fixed":
        outside = [layer for layer in layers if not 0 <= layer < depth]
        if outside or len(set(layers)) != len(layers):
            raise UserError(f"layers: expected distinct layers from 0 to {depth - 1}, got {list(layers)}")
        chosen = list(layers)
    elif policy == "even":
        chosen = [(2 * i + 1) * depth // (2 * k) for i in range(k)]
    elif policy == "random":
        chosen = random.Random(seed).sample(range(depth), k)
    elif policy in ("deepest", "shallowest"):
        chosen = list(range(depth))[-k:] if policy == "deepest" else list(range(k))
    else:
        numbers = [float(value) for value in values]
        if len(numbers) != depth or not all(value == value for value in numbers):
            raise UserError(f"values: expected {depth} numbers, one a layer, got {numbers}")
        chosen = sorted(range(depth), key=lambda layer: (-numbers[layer], layer))[:k]
    return LayerSelection.uniform(chosen, policy)


def layer_sensitivity(loss: Tensor, hidden: Sequence[Tensor], block_input: Tensor) -> tuple[Tensor, Tensor]:
    """How a loss reacts to each block, from one backward pass: ([L] gradient norms, [L] first-order scores).

    gradient norm: |dL/dh_l|. First order: |<dL/dh_l, h_l - h_{l-1}>|, the change of the loss that a linear expansion
    predicts when block l is switched off (m_l = 0 in FoG-A's gate view). FoG-A measures that change instead.

    Args:
        loss: a scalar on the graph of `hidden`.
        hidden: the outputs of all blocks in order, [B, T, D] each. block_input: what enters block 0 [B, T, D].
    """
    if isinstance(hidden, Mapping) or not all(isinstance(h, Tensor) for h in hidden):
        raise TypeError(
            f"hidden: expected the blocks' outputs in order, a list of tensors, got a {type(hidden).__name__}"
        )
    grads = torch.autograd.grad(loss, list(hidden), retain_graph=True)
    wide = [grad.detach().to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    steps = [h.detach() - before.detach() for h, before in zip(hidden, [block_input, *hidden])]
    norms = torch.stack([grad.norm() for grad in wide])
    return norms, torch.stack([(grad * step.to(grad.dtype)).sum().abs() for grad, step in zip(wide, steps)])
