"""The modules that a forward calls around its blocks, and what the calls of a pass of samples look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .examine import Examination
from .record import Call, overridden, record
from .subject import out_of_memory
from .wiring import Site, grown

CACHE_BYTES, CACHE_BYTES_PER_THREAD = 32 * 2**20, 4 * 2**20  # of a CPU; a server's last cache grows with its cores


class Shell:
    """The modules that run around the blocks `sites` of an examined model.

    Attributes:
        modules: {module: {number of its call: {path of a result: the dimension that grows with the samples}}}, the
            outermost ones."""

    def __init__(self, known: Examination, sites: Mapping[nn.Module, Site]) -> None:
        self.known, self.sites = known, sites
        self.modules = _around(known, sites)
        self._calls: dict[tuple[int, ...], dict[tuple[int, int], Call]] = {}

    def calls(self, rows: Tensor) -> dict[tuple[int, int], Call]:
        """{key: call} of a forward of these samples in which all blocks are switched off: the shapes of arguments."""
        key = tuple(rows.tolist())
        if key not in self._calls:
            self._calls[key] = self._without_blocks(rows)
        return self._calls[key]

    def _without_blocks(self, rows: Tensor) -> dict[tuple[int, int], Call]:
        watched = self.modules.keys() | self.sites.keys()

        def calls(run: bool) -> list[Call]:
            def skip(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                return self.sites[module].off(forward, args, kwargs, run)

            with overridden(self.sites, skip):
                return record(self.known.model, lambda: self.known.subject.forward(rows), only=watched)[1]

        try:
            found = calls(any(site.replaced for site in self.sites.values()))
        except Exception as error:  # a block needs what another one keeps somewhere
            if out_of_memory(error):
                raise
            found = calls(True)
        return {call.key: call for call in found}

    def at_once(self, streams: int) -> int:
        """Number of samples in a pass: all; on the CPU as many as keep the widest activation of all streams in the
        cache, if each pass makes the calls of the examined sample alone (no mask is left out, nothing is cut)."""
        samples = self.known.inputs.samples
        if self.known.device.type != "cpu":
            return samples
        widest = max(shape.numel() for call in self.known.calls for shape in call.results.values())
        cache = min(CACHE_BYTES, CACHE_BYTES_PER_THREAD * torch.get_num_threads())
        passes = -(-samples // max(1, cache // (streams * widest * self.known.dtype.itemsize)))
        at_once = -(-samples // passes)
        if at_once == samples:
            return samples
        try:
            alike = all(self._as_examined(rows) for rows in torch.arange(samples).split(at_once))
        except Exception as error:  # a part of the samples does not run
            if out_of_memory(error):
                raise
            return samples
        return at_once if alike else samples

    def _as_examined(self, rows: Tensor) -> bool:
        calls, samples = self.calls(rows), rows.numel()
        watched = self.modules.keys() | self.sites.keys()
        ones = {call.key: call for call in self.known.calls if call.module in watched}
        if calls.keys() != ones.keys():
            return False
        for key, call in calls.items():
            one = ones[key]
            if call.absent != one.absent or call.arguments.keys() != one.arguments.keys():
                return False
            dims = grown(one.arguments, call.arguments, samples, alike=True)
            if any(shape != one.arguments[path] and path not in dims for path, shape in call.arguments.items()):
                return False
        return True


def _around(known: Examination, sites: Mapping[nn.Module, Site]) -> dict[nn.Module, dict[int, dict[str, int]]]:
    inside = {part for module in sites for part in module.modules()}
    around = {module for module in known.model.modules() if not sites.keys().isdisjoint(module.modules())}
    fours = {call.key: call for call in known.watcher.calls}
    modules: dict[nn.Module, dict[int, dict[str, int]]] = {}
    for call in known.calls:
        outermost = call.parent is None or call.parent.module in around
        if not outermost or call.module in around | inside:
            continue
        other = fours.get(call.key)
        # Results that count the samples by other means than a dimension are those of the whole batch.
        if other is None or call.opaque or call.plain != other.plain or call.results.keys() != other.results.keys():
            continue
        if dims := grown(call.results, other.results):
            modules.setdefault(call.module, {})[call.number] = dims
    return modules
