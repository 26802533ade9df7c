"""Mean metrics of steps, summed on the device and read from it in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Meter:
    """Sums and counts of metrics, updated in place. A value that is not finite is not counted."""

    def __init__(self) -> None:
        # One vector for each set of names that come together.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a step's metrics, scalars on one device, without waiting for the device."""
        names = tuple(metrics)
        values = torch.stack([value.float() for value in metrics.values()])
        if names not in self._sums:
            self._sums[names] = values.new_zeros(2, len(names))
        finite = values.isfinite()
        self._sums[names].add_(torch.stack([torch.where(finite, values, 0), finite.to(values.dtype)]))

    def read(self, also: Tensor) -> tuple[dict[str, float], list[float]]:
        """Mean of each metric since the last call, without those that were never finite; and the values of `also` [n].

        Everything is read in one copy, which waits for the device.
        """
        names = [name for together in self._sums for name in together]
        flat = torch.cat([*(held.flatten() for held in self._sums.values()), also.flatten()]).cpu()
        total = dict.fromkeys(names, 0.0)
        count = dict.fromkeys(names, 0.0)
        place = 0
        for together, held in self._sums.items():
            sums, counts = flat[place : place + held.numel()].view(2, -1).tolist()
            place += held.numel()
            for name, value, steps in zip(together, sums, counts):
                total[name] += value
                count[name] += steps
            held.zero_()
        return {name: total[name] / count[name] for name in total if count[name]}, flat[place:].tolist()
