"""The network of a probe: a `DiT` (`Native`) or another model (`Foreign`), with the same methods.

Both know the number of samples and blocks, turn a plan of blocks into work that they can run, and measure a pass.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.dit import DiT
from . import graph, native
from .foreign.branches import AUTO, branch_names, check_branches, find_branches
from .foreign.drive import BlockModel
from .metrics import Metric, VelocityRatio, measure_with, score_of
from .plan import AblationPlan, Sizes, Unit, split
from .scores import whole_number

PARTS = ("parts",)  # of other models' blocks
# Bytes of the widest activation of a pass on the CPU. It fits into the last cache of a server, which is faster.
CPU_PASS_BYTES = 32 * 2**20


class Native:
    """A `DiT` with its inputs by name."""

    names = None  # of its blocks: their numbers

    def described(self, unit: Unit) -> Unit:
        return unit

    def __init__(
        self, model: DiT, inputs: Mapping[str, Any] | Sequence[Any], engine: str, metric: Metric | None
    ) -> None:
        self.model = model = native.whole(model)
        self.metric = metric
        self.inputs = by_name(inputs)
        self.depth = model.depth
        self.samples = self.inputs["x_t"].shape[0]
        self.t = self.inputs["t"]
        self.mask = self.inputs.get("mask")
        device = self.inputs["x_t"].device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else self.inputs["x_t"].dtype
        obstacle = None
        if engine in ("auto", "graph"):
            metric_obstacle = "it holds no metric that is a function" if metric is not None else None
            obstacle = metric_obstacle or graph.why_not(model, self.inputs)
        if engine == "graph" and obstacle is not None:
            raise ValueError(f"engine: 'graph' cannot capture this probe: {obstacle}; engine='prefix' runs it eagerly")
        self.engine = engine if engine != "auto" else "graph" if obstacle is None else "prefix"

    def at_once(self, plan: AblationPlan) -> int:
        """Number of samples in a pass: all; on the CPU as many as keep the feed-forward's activation in the cache."""
        x_t, config = self.inputs["x_t"], self.model.config
        if x_t.device.type != "cpu" or self.engine != "prefix":
            return self.samples
        widest = plan.streams * x_t.shape[1] * config.ff_ratio * config.width * self.dtype.itemsize
        passes = math.ceil(self.samples / max(1, CPU_PASS_BYTES // widest))
        return math.ceil(self.samples / passes)

    def split(self, plan: AblationPlan, memory_budget: int | float) -> tuple[tuple[AblationPlan, ...], int]:
        if self.engine not in ("prefix", "graph"):
            raise ValueError(f"memory_budget: only for the staircase, not for engine={self.engine!r}: use max_samples")
        x_t, config = self.inputs["x_t"], self.model.config
        sizes = Sizes(x_t.shape[1], config.width, config.ff_ratio, config.mels, config.heads, x_t.element_size())
        sizes = replace(sizes, masked=self.mask is not None)
        return split(plan, sizes, self.samples, _bytes(memory_budget, x_t.device))

    def evaluations(self, plan: AblationPlan) -> float:
        return plan.block_evaluations

    def measure(self, plan: AblationPlan, rows: slice) -> Tensor:
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        if self.engine == "graph":
            return graph.replayed(self.model, plan, inputs, partial(native.measure, self.model, plan))
        if self.metric is not None:
            control, velocity = native.ENGINES[self.engine](self.model, plan, inputs)
            metric = self.metric.at(inputs) if isinstance(self.metric, VelocityRatio) else self.metric
            return measure_with(metric, velocity, inputs.get("mask"), control if plan.control else None)
        return native.measure(self.model, plan, inputs, self.engine)


class Foreign:
    """Another model behind its adapter. Its wiring and its first velocity decide which engine "auto" means."""

    names: tuple[str, ...]

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        engine: str,
        block_list: str | Sequence[str] | None,
        batched: Sequence[str] | Mapping[str, bool] | None,
        mask: Tensor | None,
        alone: bool,
        metric: Metric | None,
        branches: Sequence[str] | str | bool | None,
    ) -> None:
        if engine == "graph":
            raise ValueError("engine: 'graph' is only for a DiT; other models are asked questions between their blocks")
        self.metric = metric
        self.blocks = BlockModel(model, inputs, block_list, batched, mask, engine, alone)
        self.depth, self.samples, self.names = self.blocks.depth, self.blocks.samples, tuple(self.blocks.names)
        self.parts = isinstance(branches, Sequence) and tuple(branches) == PARTS
        self.inner: dict[str, tuple[int, str]] = {}  # of branches: {name: (layer, name in the block)}
        if branches is not None and not self.parts:
            self.inner = self._inner(model, branches)
            with warnings.catch_warnings():  # said of the blocks already
                warnings.simplefilter("ignore")
                self.blocks = BlockModel(model, inputs, tuple(self.inner), batched, mask, engine, alone, branches=True)
        self.t, self.mask, self.dtype = self.blocks.t, self.blocks.mask, self.blocks.dtype

    def _inner(self, model: nn.Module, branches: Sequence[str] | str | bool) -> dict[str, tuple[int, str]]:
        """The named branches, or those that are found, of all blocks."""
        blocks = self.blocks.blocks
        whole = [block.sites[0] for block in blocks if len(block.sites) == 1]
        if branches not in AUTO:
            names = branch_names(model, self.names, branches)  # type: ignore[arg-type]
            if len(whole) == len(blocks):
                check_branches(self.blocks.known, whole, names)
            return names
        for site in whole:
            if site.adds:
                raise ValueError(
                    f"branches: forward adds the result of {site.name} to the state, so it is a branch itself: leave "
                    "branches out"
                )
        found = find_branches(self.blocks.known, whole)
        return {
            f"{block.name}.{branch}": (layer, branch)
            for layer, block in enumerate(blocks)
            for branch in (found.get(block.name) or self.blocks.parts(layer))
        }

    @property
    def engine(self) -> str:
        return self.blocks.engine

    def at_once(self, plan: AblationPlan) -> int:
        return self.blocks.at_once(plan)

    def by_branch(self, plan: AblationPlan) -> AblationPlan:
        """The plan with each block replaced by its parts, or by the modules that are its branches."""
        if self.parts:
            units = [replace(unit, branch=part) for unit in plan.units for part in self.blocks.parts(unit.layer)]
            return replace(plan, units=tuple(units))
        if not self.inner:
            return plan
        chosen = {unit.layer for unit in plan.units}
        layers = [n for n, name in enumerate(self.blocks.names) if self.inner[name][0] in chosen]
        return AblationPlan.build(self.blocks.depth, layers)

    def described(self, unit: Unit) -> Unit:
        """The unit by its block's layer and the branch's name in the block."""
        if not self.inner:
            return unit
        layer, branch = self.inner[self.blocks.names[unit.layer]]
        return Unit(layer, branch, 2 * layer, 2 * layer + 2)

    def evaluations(self, plan: AblationPlan) -> float:
        """The cost in block evaluations. A branch that runs by itself counts as its share of a block."""
        return self.blocks.evaluations(plan) * self.depth / self.blocks.depth

    def split(self, plan: AblationPlan, memory_budget: int | float) -> tuple[tuple[AblationPlan, ...], int]:
        raise ValueError("memory_budget: the sizes of another model's activations are not known: use max_samples")

    def measure(self, plan: AblationPlan, rows: slice) -> Tensor:
        velocity = self.blocks.run(plan, torch.arange(self.samples)[rows])
        mask = None if self.mask is None else self.mask[rows].to(velocity.device)
        channels_first = mask is not None and velocity.shape[2] != mask.shape[1]
        velocity = velocity.mT if channels_first else velocity
        if self.metric is not None:
            measured = measure_with(self.metric, velocity, mask, None)
            if not plan.control:
                return measured
            known = self.blocks.known
            base, nudged = (output.mT if channels_first else output for output in known.nudged)
            frames = None if self.mask is None else self.mask[known.first : known.first + 1].to(velocity.device)
            noise = score_of(self.metric, base, nudged, frames).double()
            return torch.cat([measured, noise.expand(1, measured.shape[1])])
        # The axes are frames and bins; an image or a vector counts as one frame.
        velocity = velocity if velocity.dim() == 4 else velocity.flatten(2).unsqueeze(2)
        change, energy = ops.velocity_delta(velocity.contiguous(), mask)
        noise = (self.blocks.noise * energy).unsqueeze(0)
        return torch.cat([change, energy.unsqueeze(0), *([noise] if plan.control else ())])


def _bytes(memory_budget: int | float, device: torch.device) -> int:
    """The budget in bytes; a float is a share of the device's free memory."""
    if isinstance(memory_budget, float):
        if not 0 < memory_budget <= 1:
            raise ValueError(f"memory_budget: expected bytes (int) or a share in (0, 1], got {memory_budget}")
        if device.type == "cuda":
            return int(memory_budget * torch.cuda.mem_get_info(device)[0])
        return int(memory_budget * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return whole_number("memory_budget", memory_budget, 1)


def by_name(inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs of a `DiT` by name. All must have the same number of samples: slices would drop surplus rows.

    Raises:
        TypeError: a name is unknown or missing, or a value is not a real tensor.
        ValueError: there are no samples or frames, or the numbers of samples differ.
    """
    names = ("x_t", "t", "cond", "mask")
    if not isinstance(inputs, Mapping):
        if not isinstance(inputs, tuple | list) or len(inputs) > len(names):
            raise TypeError(f"inputs: expected a mapping or a tuple of {names}, got {type(inputs).__name__}")
        inputs = dict(zip(names, inputs))
    named = {name: value for name, value in inputs.items() if value is not None}
    if not {"x_t", "t"} <= set(named) <= set(names):
        raise TypeError(f"inputs: expected x_t, t and perhaps cond, mask; got {sorted(map(str, named))}")
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            got = "a scalar" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor with the samples first, got {got}")
        if value.is_complex() or (name in ("x_t", "cond") and not value.is_floating_point()):
            raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    samples = named["x_t"].shape[0]
    if samples == 0:
        raise ValueError("x_t: expected at least one sample, got a batch of 0")
    if named["x_t"].numel() == 0:
        raise ValueError(f"x_t: expected at least one frame and one bin, got {list(named['x_t'].shape)}")
    for name, value in named.items():
        if value.shape[0] != samples:
            raise ValueError(f"{name}: expected {samples} samples as in x_t, got {list(value.shape)}")
    return named
