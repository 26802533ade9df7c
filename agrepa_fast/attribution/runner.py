"""Score every layer of a network: check the inputs, run the plan pass by pass, read the results off the device once.

The device work is in `native` (a `DiT`; as a CUDA graph in `graph`) and in `foreign` (any other model).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.dit import DiT
from . import graph, native
from .foreign.drive import BlockModel, NotAStaircase, eager
from .plan import AblationPlan, Sizes, split
from .scores import METRICS, SAFE_CHANGE_IN_16_BIT, LayerScores, normalised_change, whole_number

ENGINES = ("auto", "graph", "prefix", "stacked", "loop")
# The widest activation of a pass on the CPU: what a server processor's last cache holds, where the same work is faster.
CPU_PASS_BYTES = 32 * 2**20


def attribute_layers(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    blocks: Sequence[int] | None = None,
    metric: str = "rms",
    domains: Sequence[str] | None = None,
    branches: Sequence[str] | None = None,
    memory_budget: int | float | None = None,
    engine: str = "auto",
    max_samples: int | None = None,
    clips: Sequence[int] | None = None,
    block_list: str | Sequence[str] | None = None,
) -> LayerScores:
    """FoG-A (arXiv 2603.01006): how much the velocity changes when each layer is switched off.

    The baseline and all ablations share x_t, t, condition and one batch, run without gradient in eval mode
    (dropout off), and leave the model's flags and the random state as they were, also after an exception. Calls from
    several threads wait for each other.

    Args:
        model: a `DiT`, or any module whose forward runs a list of blocks (see `attribution.foreign`); compiled
            ones run eagerly during the probe.
        inputs: what the model's forward takes, by name or in order; for a `DiT` x_t [N, T, M], t [N], cond, mask.
            Take x_t from the path (`agrepa_fast.models.flow.probe_inputs` folds a grid of t into N).
            Of another model's inputs, tensors whose first size is that of the first tensor carry the samples; an
            input called `mask` (bool [N, T]) says which frames count, one called `t` or `timestep` [N] the flow time.
        blocks: 0-based layers to score; None = all.
        metric: "rms" or "squared"; see `scores.normalised_change`.
        domains: the domain's name of each of the N samples, kept for per-domain statistics.
        branches: None to switch whole blocks off; ("attn", "ff") or one of them to switch branches off apart.
        engine: "prefix" (the staircase: shared prefixes, one batch), "graph" (the same as one CUDA graph, see
            `attribution.graph`; a `DiT` on a CUDA device), "stacked" (all streams from the start) or "loop" (one
            forward per ablation). "auto" is the graph where one fits and else the staircase; "stacked" for a model
            that does something between its blocks (long skips). All give the same scores.
        memory_budget: bytes (int), or a share of the device's free memory (float up to 1), that the staircase of a
            `DiT` may take beside weights and inputs: `plan.split` runs fewer samples at once, and fewer layers where
            one sample is too much. Sizes of other models are not known; for them, and under autocast, use max_samples.
        max_samples: run at most so many of the N samples in one batch (bounds memory; costs nothing twice). None: all.
            A `DiT` on the CPU runs no more than its caches hold.
        clips: an id for each of the N samples; samples of one id are the same clip at several t, and the standard
            error counts them as one.
        block_list: dotted name(s) of another model's block lists; None = found under the usual names.

    Returns:
        LayerScores with by_sample [U, N].

    Raises:
        TypeError: model is not a module, or the inputs do not fit its forward.
        ValueError: on shapes, layers or names that do not fit, a sample without a valid frame, or a velocity
            that is not finite; for another model also no block list, a block that changes the shape, a forward that
            draws random numbers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    if max_samples is not None:
        whole_number("max_samples", max_samples, 1)
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    with probing(model), contextlib.nullcontext() if isinstance(model, DiT) else eager(model):
        network: _Native | _Foreign
        if isinstance(model, DiT):
            if block_list is not None:
                raise ValueError("block_list: only for other models; a DiT knows its blocks (choose with blocks=)")
            network = _Native(model, inputs, engine)
        else:
            if branches is not None:
                raise ValueError("branches: only a DiT knows its branches; other models are scored by whole blocks")
            network = _Foreign(model, inputs, engine, block_list)
        samples, mask, t = network.samples, network.mask, network.t
        if domains is not None and len(domains) != samples:
            raise ValueError(f"domains: expected {samples} names, got {len(domains)}")
        if clips is not None and len(clips) != samples:
            raise ValueError(f"clips: expected {samples} ids, got {len(clips)}")
        plan = AblationPlan.build(network.depth, blocks, branches)
        plans: tuple[AblationPlan, ...] = (plan,)
        at_once = min(max_samples or samples, network.at_once(plan))
        if memory_budget is not None:
            plans, fitting = network.split(plan, memory_budget)
            at_once = min(at_once, fitting)
        passes = []
        for start in range(0, samples, at_once):
            rows = slice(start, min(start + at_once, samples))
            measured = [network.measure(part, rows) for part in plans]
            # Of several parts of the plan, the first one's baseline stands for all; of several passes, its control.
            changes = [result[: len(part.units)] for part, result in zip(plans, measured)]
            energy, *control = measured[0][len(plans[0].units) :]
            passes.append(torch.cat([*changes, energy.unsqueeze(0)]))
            if start == 0:
                noise = control[0][0] / energy[0]
                if network.engine != "graph":  # which holds the memory of every plan that it has captured
                    plans = tuple(dataclasses.replace(part, control=False) for part in plans)
        frames = passes[0].new_ones(samples) if mask is None else mask.sum(1)
        facts = torch.stack([frames.double(), (frames if t is None else t.detach().float()).double()])
        facts = torch.cat([noise.double().expand(1, samples), facts.to(noise.device)])
        # The probe's one copy to the host.
        result = torch.cat([torch.cat(passes, dim=1).double(), facts]).cpu()
    change, energy, noise, frames, flow_time = result[:-4], *result[-4:]
    check_finite(plan, change, energy)
    check_frames(frames)
    if not energy.any():
        warnings.warn(
            "the velocity is identically zero (a network as adaLN-zero initialises it): every score is 0/0 "
            "and set to 0; train before probing",
            stacklevel=2,
        )
    scores = LayerScores(
        layers=tuple(unit.layer for unit in plan.units),
        by_sample=normalised_change(change, energy, metric),
        metric=metric,
        branches=None if branches is None else tuple(str(unit.branch) for unit in plan.units),
        floor_by_sample=normalised_change(torch.zeros_like(energy), energy, metric),
        # Rounding is relative: a sample with twice the energy gets twice the change.
        noise_by_sample=normalised_change((noise * energy).nan_to_num(0.0), energy, metric),
        t=None if t is None else flow_time.float(),
        domains=None if domains is None else tuple(domains),
        clips=None if clips is None else tuple(clips),
        block_evaluations=(
            sum(part.block_evaluations for part in plans) if network.engine in ("prefix", "graph") else None
        ),
    )
    if network.dtype.itemsize == 2 and energy.any():
        safe = SAFE_CHANGE_IN_16_BIT if metric == "rms" else SAFE_CHANGE_IN_16_BIT**2
        safe = max(safe, scores.noise_floor)
        low = [name for name, mean in zip(scores.names, scores.mean.tolist()) if mean < safe]
        if low:
            warnings.warn(
                f"layers {', '.join(low)} change the velocity by less than {safe:g}, where the rounding of "
                f"{str(network.dtype).removeprefix('torch.')} decides their order: score them in float32",
                stacklevel=2,
            )
    return scores


class _Native:
    """A `DiT` with its inputs by name."""

    def __init__(self, model: DiT, inputs: Mapping[str, Any] | Sequence[Any], engine: str) -> None:
        self.model = model
        self.inputs = by_name(inputs)
        self.depth = model.depth
        self.samples = self.inputs["x_t"].shape[0]
        self.t = self.inputs["t"]
        self.mask = self.inputs.get("mask")
        device = self.inputs["x_t"].device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else self.inputs["x_t"].dtype
        obstacle = graph.why_not(model, self.inputs) if engine in ("auto", "graph") else None
        if engine == "graph" and obstacle is not None:
            raise ValueError(f"engine: 'graph' cannot capture this probe: {obstacle}; engine='prefix' runs it eagerly")
        self.engine = engine if engine != "auto" else "graph" if obstacle is None else "prefix"

    def at_once(self, plan: AblationPlan) -> int:
        """Samples of a pass: on the CPU as many as keep the feed-forward's inner activation in its cache, else all."""
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
        sizes = dataclasses.replace(sizes, masked=self.mask is not None)
        return split(plan, sizes, self.samples, _bytes(memory_budget, x_t.device))

    def measure(self, plan: AblationPlan, rows: slice) -> Tensor:
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        if self.engine == "graph":
            return graph.replayed(self.model, plan, inputs, partial(native.measure, self.model, plan))
        return native.measure(self.model, plan, inputs, self.engine)


class _Foreign:
    """Another model behind its adapter; "auto" is settled by its wiring and by its first velocity."""

    def __init__(
        self, model: nn.Module, inputs: Any, engine: str, block_list: str | Sequence[str] | None = None
    ) -> None:
        if engine == "graph":
            raise ValueError("engine: 'graph' is only for a DiT; other models are asked questions between their blocks")
        self.blocks = BlockModel(model, inputs, block_list)
        self.depth, self.samples = self.blocks.depth, self.blocks.samples
        self.t, self.mask = self.blocks.t, self.blocks.mask
        self.dtype = self.blocks.inspect()
        self.settled = engine != "auto"
        self.engine = engine if self.settled else "stacked" if self.blocks.not_a_chain else "prefix"

    def at_once(self, plan: AblationPlan) -> int:
        return self.samples

    def split(self, plan: AblationPlan, memory_budget: int | float) -> tuple[tuple[AblationPlan, ...], int]:
        raise ValueError("memory_budget: the sizes of another model's activations are not known: use max_samples")

    def measure(self, plan: AblationPlan, rows: slice) -> Tensor:
        velocity = self._run(plan, torch.arange(self.samples)[rows])
        # Frames and bins; an image or a vector counts as one frame.
        velocity = velocity if velocity.dim() == 4 else velocity.flatten(2).unsqueeze(2)
        change, energy = ops.velocity_delta(velocity, None if self.mask is None else self.mask[rows])
        noise = (self.blocks.noise * energy).unsqueeze(0)
        return torch.cat([change, energy.unsqueeze(0), *([noise] if plan.control else ())])

    def _run(self, plan: AblationPlan, index: Tensor) -> Tensor:
        try:
            velocity = self.blocks.run(self.engine, plan, index)
        except NotAStaircase:
            if self.settled or self.engine == "stacked":
                raise
            self.engine = "stacked"
            velocity = self.blocks.run(self.engine, plan, index)
        self.settled = True
        return velocity


def _bytes(memory_budget: int | float, device: torch.device) -> int:
    """A budget in bytes; a float is a share of what is free on the device."""
    if isinstance(memory_budget, float):
        if not 0 < memory_budget <= 1:
            raise ValueError(f"memory_budget: expected bytes (int) or a share in (0, 1], got {memory_budget}")
        if device.type == "cuda":
            return int(memory_budget * torch.cuda.mem_get_info(device)[0])
        return int(memory_budget * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return whole_number("memory_budget", memory_budget, 1)


def by_name(inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs of a `DiT` by name, with as many samples each: a probe takes slices, which would lose surplus rows.

    Raises:
        TypeError: unknown or missing names, or values that are no real tensors.
        ValueError: no samples, no frames, or numbers of samples that differ.
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


# A probe changes what the whole process shares (the random state, the fused path of nn.TransformerEncoder) beside its
# model, also through a wrapper of it. One lock for both lets probes of other threads wait. The same thread may nest.
_ONE_PROBE = threading.RLock()


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; training flags and random state are put back on every exit.

    Probes of several threads run one after the other. A thread that trains the same model must not run meanwhile."""
    with _ONE_PROBE, _evaluated(model):
        yield


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


def check_frames(frames: Tensor) -> None:
    """Raise `ValueError` where a sample of `frames` [N], the numbers of valid frames, has none."""
    if not frames.all():
        empty = int(frames.argmin())
        raise ValueError(f"mask: sample {empty} has no valid frame, so it has no score: leave it out")


def check_finite(plan: AblationPlan, change: Tensor, energy: Tensor) -> None:
    """Raise `ValueError` where the energy [N] or a unit's change [U, N] is not finite; names the sample and layer."""
    bad = (~energy.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the baseline velocity of sample {bad[0]} is not finite: check the weights and x_t")
    rows = (~change.isfinite()).nonzero().tolist()
    if rows:
        unit, sample = rows[0]
        raise ValueError(f"the velocity of sample {sample} without layer {plan.units[unit].name} is not finite")
