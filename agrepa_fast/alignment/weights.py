"""The weights of the layers toward one teacher: constant, or a function of each sample's flow time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..buffers import FixedBuffers
from .selection import LayerSelection


class LayerWeights(FixedBuffers):
    """The weights of the layers that have a head for one teacher; `select` changes them in place.

    Buffers, for L layers and K times: weights [L] float32 and selected [L] bool; by flow time also t_grid [K] and
    scores [L, K] float32. A sample at flow time t then has the weights

        w_l(t) = s_l(t) / sum_j s_j(t)        s_l: row l of `scores`, interpolated linearly over t_grid

    Before the first time of the grid and after the last one the scores are those of that time.

    Args:
        selection: the layers that have a head, and their first weights. After a "by-time" selection the weights are
            functions of t for good: a later selection may hold other scores and other times, but as many times.
    """

    weights: Tensor
    selected: Tensor
    t_grid: Tensor
    scores: Tensor

    def __init__(self, selection: LayerSelection) -> None:
        super().__init__()
        self.layers = selection.layers
        self.times = len(selection.t_grid)
        self._held = self._values(selection)
        for name, value in self.constants().items():
            self.register_buffer(name, value)

    @property
    def chosen(self) -> tuple[int, ...]:
        """The selected layers; one of them may have a weight of 0."""
        return tuple(layer for layer, selected in zip(self.layers, self._held["selected"]) if selected)

    def check(self, selection: LayerSelection) -> None:
        """Refuse a selection that `select` cannot take.

        Raises:
            ValueError: a layer without a head, or weights that do not fit the buffers.
        """
        unknown = set(selection.layers) - set(self.layers)
        if unknown:
            raise ValueError(f"selection: layer {min(unknown)} has no head, only {list(self.layers)}")
        built = f"weights by flow time, at {self.times} times" if self.times else "weights that do not change with t"
        if selection.t_grid and len(selection.t_grid) != self.times:
            raise ValueError(
                f"selection: holds scores at {len(selection.t_grid)} times, the loss was built for {built}"
            )
        if self.times and selection.weighting == "score":
            raise ValueError(f'selection: weighting "score" is not normalised, the loss was built for {built}')

    def select(self, selection: LayerSelection) -> None:
        """Take the weights of another selection among the layers that have heads; the others get 0."""
        self.check(selection)
        self._held = self._values(selection)
        for name, value in self.constants().items():
            self.get_buffer(name).copy_(value)

    def _values(self, selection: LayerSelection) -> dict[str, list[Any]]:
        """The values of the buffers for a selection, as lists."""
        weights = dict(zip(selection.layers, selection.weights))
        values: dict[str, list[Any]] = {
            "weights": [weights.get(layer, 0.0) for layer in self.layers],
            "selected": [layer in weights for layer in self.layers],
        }
        if self.times:
            # Constant weights are scores that are the same at all times.
            rows = selection.scores or [[weight] * self.times for weight in selection.weights]
            by_layer = dict(zip(selection.layers, map(list, rows)))
            values["t_grid"] = list(selection.t_grid or (i / self.times for i in range(self.times)))
            values["scores"] = [by_layer.get(layer, [0.0] * self.times) for layer in self.layers]
        return values

    def constants(self) -> dict[str, Tensor]:
        """The buffers' values, from the host's copy of them."""
        kinds = {name: torch.bool if name == "selected" else torch.float32 for name in self._held}
        return {name: torch.tensor(value, dtype=kinds[name]) for name, value in self._held.items()}

    def at(self, t: Tensor) -> Tensor:
        """[B] flow times -> [L, B] weights, which sum to 1 for each sample. Nothing waits for the device."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        grid, scores = self.t_grid.to(t.dtype), self.scores.to(t.dtype)
        if self.times == 1:
            scores = scores.expand(-1, t.shape[0])
        else:
            after = torch.searchsorted(grid, t.contiguous()).clamp(1, self.times - 1)
            start, end = grid[after - 1], grid[after]
            # Two times may be the same number in float32.
            share = ((t - start) / (end - start).clamp_min(torch.finfo(t.dtype).tiny)).clamp(0, 1)
            scores = torch.lerp(scores[:, after - 1], scores[:, after], share)
        return scores / scores.sum(0)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the buffers, and the host's copy of them."""
        for name in ("weights", "t_grid", "scores"):
            if isinstance(state_dict.get(prefix + name), Tensor):  # with assign=True the buffer would take its dtype
                state_dict[prefix + name] = state_dict[prefix + name].float()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.selected.is_meta:  # nothing was loaded
            return
        if self.selected.any():
            self._held = {name: self.get_buffer(name).tolist() for name in self._held}
        else:
            error_msgs.append(f"{prefix}selected: no layer is selected, expected at least one of {list(self.layers)}")


def upgrade(state_dict: Mapping[str, Any], teachers: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """An `AlignmentLoss`'s state dict in today's names.

    Earlier versions had one "weights" [layers] for all teachers, and "selected" beside it; before that, the layers
    whose weight was above 0 were the selected ones. Others are returned as they are.
    """
    state = dict(state_dict)
    weights = state.pop(prefix + "weights", None)
    if weights is not None:
        selected = state.pop(prefix + "selected", None)
        for name in teachers:
            state[f"{prefix}layer_weights.{name}.weights"] = weights
            state[f"{prefix}layer_weights.{name}.selected"] = weights > 0 if selected is None else selected
    return state
