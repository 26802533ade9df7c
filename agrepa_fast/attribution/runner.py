"""Run a plan on a network: velocities of the baseline and of every ablation, in one batched pass.

Streams are stacked stream-major: [S * B, T, D], sequence s * B + b is stream s of sample b.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.dit import EPS, DiT
from .adapters import BlockModel, NotAStaircase, eager
from .plan import AblationPlan, Sizes, split
from .scores import METRICS, SAFE_CHANGE_IN_16_BIT, LayerScores, normalised_change

ENGINES = ("auto", "prefix", "stacked", "loop")


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
    (dropout off), and leave the model's flags and the random state as they were, also after an exception.

    Args:
        model: a `DiT`, or any module whose forward runs a list of blocks (see `attribution.adapters`); compiled
            ones run eagerly during the probe.
        inputs: what the model's forward takes, by name or in order; for a `DiT` x_t [N, T, M], t [N], cond, mask.
            Take x_t from the path (`agrepa_fast.models.flow.probe_inputs` folds a grid of t into N).
            Of another model's inputs, tensors whose first size is that of the first tensor carry the samples; an
            input called `mask` (bool [N, T]) says which frames count, one called `t` or `timestep` [N] the flow time.
        blocks: 0-based layers to score; None = all.
        metric: "rms" or "squared"; see `scores.normalised_change`.
        domains: the domain's name of each of the N samples, kept for per-domain statistics.
        branches: None to switch whole blocks off; ("attn", "ff") or one of them to switch branches off apart.
        engine: "prefix" (the staircase: shared prefixes, one batch), "stacked" (all streams from the start) or
            "loop" (one forward per ablation); "auto" is the staircase, and "stacked" for a model that does something
            between its blocks (long skips). All give the same scores.
        memory_budget: bytes (int), or a share of the device's free memory (float up to 1), that the staircase of a
            `DiT` may take beside weights and inputs: `plan.split` runs fewer samples at once, and fewer layers where
            one sample is too much. Sizes of other models are not known; for them, and under autocast, use max_samples.
        max_samples: run at most so many of the N samples in one batch (bounds memory; costs nothing twice).
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
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples: expected at least 1, got {max_samples}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    with _probing(model), contextlib.nullcontext() if isinstance(model, DiT) else eager(model):
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
        at_once = max_samples or samples
        if memory_budget is not None:
            plans, fitting = network.split(plan, memory_budget)
            at_once = min(at_once, fitting)
        changes, energies = [], []
        for start in range(0, samples, at_once):
            rows = slice(start, min(start + at_once, samples))
            frames = None if mask is None else mask[rows]
            parts = []
            for part in plans:
                velocity = network.run(part, rows)
                parts.append(ops.velocity_delta(velocity, frames))
            changes.append(torch.cat([change for change, _ in parts]))
            energies.append(parts[0][1])
    # The probe's one copy to the host.
    result = torch.cat([torch.cat(changes, dim=1), torch.cat(energies).unsqueeze(0)]).double().cpu()
    change, energy = result[:-1], result[-1]
    _check_finite(plan, change, energy)
    if mask is not None and not mask.any(1).all():
        empty = (~mask.any(1)).nonzero()[0].item()
        raise ValueError(f"mask: sample {empty} has no valid frame, so it has no score: leave it out")
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
        t=None if t is None else t.detach().float().cpu(),
        domains=None if domains is None else tuple(domains),
        clips=None if clips is None else tuple(clips),
        block_evaluations=sum(part.block_evaluations for part in plans) if network.engine == "prefix" else None,
    )
    if torch.finfo(velocity.dtype).bits == 16 and energy.any():
        safe = SAFE_CHANGE_IN_16_BIT if metric == "rms" else SAFE_CHANGE_IN_16_BIT**2
        low = [name for name, mean in zip(scores.names, scores.mean.tolist()) if mean < safe]
        if low:
            warnings.warn(
                f"layers {', '.join(low)} change the velocity by less than {safe:g}, where the rounding of "
                f"{str(velocity.dtype).removeprefix('torch.')} decides their order: score them in float32",
                stacklevel=2,
            )
    return scores


class _Native:
    """A `DiT` with its inputs by name; checked here because parts of them are slices: a surplus row would be lost."""

    def __init__(self, model: DiT, inputs: Mapping[str, Any] | Sequence[Any], engine: str) -> None:
        self.model = model
        self.engine = "prefix" if engine == "auto" else engine
        self.inputs = _by_name(inputs)
        self.depth = model.depth
        self.samples = self.inputs["x_t"].shape[0]
        if self.samples == 0:
            raise ValueError("x_t: expected at least one sample, got a batch of 0")
        for name, value in self.inputs.items():
            if value.shape[0] != self.samples:
                raise ValueError(f"{name}: expected {self.samples} samples as in x_t, got {list(value.shape)}")
        self.t = self.inputs["t"]
        self.mask = self.inputs.get("mask")

    def split(self, plan: AblationPlan, memory_budget: int | float) -> tuple[tuple[AblationPlan, ...], int]:
        if self.engine != "prefix":
            raise ValueError(f"memory_budget: only for the staircase, not for engine={self.engine!r}: use max_samples")
        x_t, config = self.inputs["x_t"], self.model.config
        sizes = Sizes(x_t.shape[1], config.width, config.ff_ratio, config.mels, config.heads, x_t.element_size())
        sizes = dataclasses.replace(sizes, masked=self.mask is not None)
        return split(plan, sizes, self.samples, _bytes(memory_budget, x_t.device))

    def run(self, plan: AblationPlan, rows: slice) -> Tensor:
        engine = {"prefix": _prefix, "stacked": _stacked, "loop": _loop}[self.engine]
        return engine(self.model, plan, {name: value[rows] for name, value in self.inputs.items()})


class _Foreign:
    """Another model behind its adapter; "auto" is settled by its wiring and by its first velocity."""

    def __init__(
        self, model: nn.Module, inputs: Any, engine: str, block_list: str | Sequence[str] | None = None
    ) -> None:
        self.blocks = BlockModel(model, inputs, block_list)
        self.depth, self.samples = self.blocks.depth, self.blocks.samples
        self.t, self.mask = self.blocks.t, self.blocks.mask
        self.blocks.inspect()
        self.settled = engine != "auto"
        self.engine = engine if self.settled else "stacked" if self.blocks.not_a_chain else "prefix"

    def split(self, plan: AblationPlan, memory_budget: int | float) -> tuple[tuple[AblationPlan, ...], int]:
        raise ValueError("memory_budget: the sizes of another model's activations are not known: use max_samples")

    def run(self, plan: AblationPlan, rows: slice) -> Tensor:
        index = torch.arange(self.samples)[rows]
        try:
            velocity = self.blocks.run(self.engine, plan, index)
        except NotAStaircase:
            if self.settled or self.engine == "stacked":
                raise
            self.engine = "stacked"
            velocity = self.blocks.run(self.engine, plan, index)
        self.settled = True
        # Frames and bins; an image or a vector counts as one frame.
        return velocity if velocity.dim() == 4 else velocity.flatten(2).unsqueeze(2)


def _bytes(memory_budget: int | float, device: torch.device) -> int:
    """A budget in bytes; a float is a share of what is free on the device."""
    if isinstance(memory_budget, float):
        if not 0 < memory_budget <= 1:
            raise ValueError(f"memory_budget: expected bytes (int) or a share in (0, 1], got {memory_budget}")
        if device.type == "cuda":
            return int(memory_budget * torch.cuda.mem_get_info(device)[0])
        return int(memory_budget * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if memory_budget < 1:
        raise ValueError(f"memory_budget: expected at least 1 byte, got {memory_budget}")
    return memory_budget


def _by_name(inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
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
    return named


@contextlib.contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; training flags and random state are put back on every exit."""
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


def _prefix(model: DiT, plan: AblationPlan, inputs: dict[str, Tensor]) -> Tensor:
    """The staircase -> velocity [S, B, T, M]."""
    x, modulation = model.open(inputs["x_t"], inputs["t"], inputs.get("cond"))
    batch = x.shape[0]
    key_mask = model.key_mask(inputs.get("mask"), x)
    # Of the baseline, the state before each unit that has started and not yet joined.
    before: dict[int, Tensor] = {}
    h = ops.layer_norm_modulate(x, modulation[0].shift, modulation[0].scale, eps=EPS)
    rows = _sample_index(1, batch, x)
    masks = key_mask
    for i, branch in enumerate(model.branches):
        if any(unit.start == i for unit in plan.units):
            before[i] = x[:batch].clone()  # not a view: that would hold the memory of all streams of its time
        out = branch(h, masks)
        del h  # every stream's, so neither it nor `out` may outlive its use
        joining = [unit for unit in plan.units if unit.stop == i + 1]
        if joining:
            # The new streams skip the branch: they enter the op as sequences without branch rows.
            x = torch.cat([x, *(before.pop(unit.start) for unit in joining)])
            streams = x.shape[0] // batch
            rows = _sample_index(streams, batch, x)
            masks = None if key_mask is None else key_mask.repeat(streams, 1, 1, 1)
        x, h = _between(modulation, i, x, out, rows)
        del out
    del h
    return model.close(x).unflatten(0, (-1, batch))


def _stacked(model: DiT, plan: AblationPlan, inputs: dict[str, Tensor]) -> Tensor:
    """All streams from the first branch on, switched by stream_scale -> velocity [S, B, T, M]."""
    x, modulation = model.open(inputs["x_t"], inputs["t"], inputs.get("cond"))
    batch = x.shape[0]
    rows = _sample_index(plan.streams, batch, x)
    x = x.repeat(plan.streams, 1, 1)
    key_mask = model.key_mask(inputs.get("mask"), x[:batch])
    masks = None if key_mask is None else key_mask.repeat(plan.streams, 1, 1, 1)
    opening = modulation[0]
    h = ops.layer_norm_modulate(x, opening.shift, opening.scale, sample_index=rows, eps=EPS)
    for i, branch in enumerate(model.branches):
        kept = [1.0] + [float(not unit.start <= i < unit.stop) for unit in plan.units]
        scale = torch.tensor(kept, device=x.device, dtype=x.dtype).repeat_interleave(batch)
        x, h = _between(modulation, i, x, branch(h, masks), rows, scale)
    return model.close(x).unflatten(0, (-1, batch))


def _loop(model: DiT, plan: AblationPlan, inputs: dict[str, Tensor]) -> Tensor:
    """One forward for the baseline and one per unit -> velocity [S, B, T, M]."""
    velocities = []
    for unit in (None, *plan.units):
        x, modulation = model.open(inputs["x_t"], inputs["t"], inputs.get("cond"))
        key_mask = model.key_mask(inputs.get("mask"), x)
        rows = _sample_index(1, x.shape[0], x)
        h = ops.layer_norm_modulate(x, modulation[0].shift, modulation[0].scale, eps=EPS)
        for i, branch in enumerate(model.branches):
            skipped = unit is not None and unit.start <= i < unit.stop
            x, h = _between(modulation, i, x, x[:0] if skipped else branch(h, key_mask), rows)
        velocities.append(model.close(x))
    return torch.stack(velocities)


def _between(
    modulation: list[Any], i: int, x: Tensor, out: Tensor, rows: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Close branch i and open branch i + 1, or just close the last one."""
    gate = modulation[i].gate
    if i + 1 == len(modulation):
        x = ops.gated_residual(x, out, gate, stream_scale=scale, sample_index=rows)
        return x, x
    opening = modulation[i + 1]
    return ops.gated_residual_norm(
        x, out, gate, opening.shift, opening.scale, stream_scale=scale, sample_index=rows, eps=EPS
    )


def _sample_index(streams: int, batch: int, like: Tensor) -> Tensor:
    return torch.arange(batch, device=like.device).repeat(streams)


def _check_finite(plan: AblationPlan, change: Tensor, energy: Tensor) -> None:
    bad = (~energy.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the baseline velocity of sample {bad[0]} is not finite: check the weights and x_t")
    rows = (~change.isfinite()).nonzero().tolist()
    if rows:
        unit, sample = rows[0]
        raise ValueError(f"the velocity of sample {sample} without layer {plan.units[unit].name} is not finite")
