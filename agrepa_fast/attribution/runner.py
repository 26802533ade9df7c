"""Score every layer of a network: check the inputs, run the plan pass by pass, and read the results once.

`native` has the work on the device for a `DiT` (`graph` captures it as a CUDA graph), `foreign` for other models.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotFiniteError
from ..models.dit import DiT
from .foreign.branches import AUTO
from .foreign.guard import quiet, refuse_caches
from .foreign.intercept import paused
from .foreign.wrapped import bare, prefix_of, reshard, resharded, unwrap
from .metrics import Metric, metric_name
from .networks import Foreign, Native
from .plan import BRANCHES, AblationPlan, Unit, layer_sets
from .scores import METRICS, SAFE_CHANGE_IN_16_BIT, LayerScores, integer, normalised_change, per_sample, whole_number

ENGINES = ("auto", "graph", "prefix", "stacked", "loop")


def attribute_layers(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    blocks: Sequence[int | str] | None = None,
    metric: str | Metric = "rms",
    domains: Sequence[str] | None = None,
    branches: Sequence[str] | str | bool | None = None,
    memory_budget: int | float | None = None,
    engine: str = "auto",
    max_samples: int | None = None,
    clips: Sequence[int] | None = None,
    block_list: str | Sequence[str] | None = None,
    mask: Tensor | None = None,
    batched: Sequence[str] | Mapping[str, bool] | None = None,
    sets: Sequence[Sequence[int | str]] | None = None,
    spans: int | None = None,
) -> LayerScores:
    """FoG-A (arXiv 2603.01006): how much the velocity changes when each layer is switched off.

    The baseline and all ablations share x_t, t, the condition and one batch. They run without gradient and in eval mode
    (dropout off). The model's flags and the random state are restored, also after an exception. Calls from
    several threads wait for each other.

    Args:
        model: a `DiT`, or any module whose forward passes a state through blocks (see `attribution.foreign`), also in
            wrappers of torch.compile, data parallelism and PEFT; compiled ones run eagerly during the probe.
        inputs: what the model's forward takes, by name or in order; for a `DiT` x_t [N, T, M], t [N], cond, mask.
            Take x_t from the path (`agrepa_fast.models.flow.probe_inputs` folds a grid of t into N).
            Of another model's inputs, tensors or lists with N entries carry the samples where running the model on a
            part of them says so; one called `t`, `time` or `timestep` [N] is the flow time.
        blocks: 0-based layers to score, or names of another model's blocks; None = all.
        metric: "rms" or "squared"; see `scores.normalised_change`. Or a function of the baseline's and the ablated
            output, both [B, ...], that returns [B] scores; see `attribution.metrics`.
        domains: the domain's name of each of the N samples, kept for per-domain statistics.
        branches: None to switch whole blocks off; "auto" (or True) to switch the branches of each block off apart:
            attention, cross-attention, feed-forward, found by what the block adds to its state. Or some of their names
            in the block: "attn", "ff" of a `DiT`, ["attn1", "ff"] of another model (see `foreign.branches`).
            ("parts",), for other models: the states of a joint block (image and text, say) apart, and the modules of a
            layer that is a list.
        engine: "prefix" (the staircase: shared prefixes, one batch), "graph" (the same as one CUDA graph, see
            `attribution.graph`; a `DiT` on a CUDA device), "stacked" (all streams from the start) or "loop" (one
            forward per ablation). "auto" is the graph where one fits and else the staircase; where that fails on
            another model, "stacked" and then "loop", with a warning. All give the same scores.
        memory_budget: bytes (int), or a share of the device's free memory (float up to 1), that the staircase of a
            `DiT` may take beside weights and inputs: `plan.split` runs fewer samples at once, and fewer layers where
            one sample is too much. Sizes of other models are not known; for them, and under autocast, use max_samples.
        max_samples: run at most so many of the N samples in one batch, to bound memory. None: all. The number of block
            evaluations stays the same.
            The staircase on a CPU runs no more than the cache holds.
        clips: an id for each of the N samples; samples of one id are the same clip at several t, and the standard
            error counts them as one.
        sets: sets of layers (0-based, or names of blocks), each switched off as a whole: [[0, 1], [4]].
        spans: every so many neighbouring blocks, in the order of the forward, switched off as a whole.
        block_list: dotted name(s) of another model's block lists or single blocks; None: every block through which its
            forward passes the noisy state, in the order of the forward.
        mask: [N, T] bool, True for a frame of another model's velocity [N, T, C] or [N, C, T] that counts. None: an
            input called `mask` where each sample is True first and then False (padding); else all frames count.
        batched: names of another model's inputs that carry the samples (dotted paths into nested ones), or {name:
            whether it does} for some of them; None: found out by running.

    Returns:
        LayerScores with by_sample [U, N].

    Raises:
        TypeError: model is not a module, or the inputs do not fit its forward.
        ValueError: on shapes, layers or names that do not fit, a sample without a valid frame, or a velocity
            that is not finite; for another model also no block, a forward that draws random numbers or whose samples
            depend on each other, an active cache, or what running it does not tell (names the input or the block).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    if not callable(metric) and metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS} or a function of two outputs, got {metric!r}")
    if isinstance(branches, str | bool):
        branches = branches if branches in AUTO else [branches] if isinstance(branches, str) else None
    elif branches is not None:
        if not isinstance(branches, Iterable):
            raise TypeError(f"branches: expected 'auto' or names of modules inside the blocks, got {branches!r:.60}")
        branches = list(branches)  # an iterator can be read only once
    function = metric if callable(metric) else None
    grouped = sets is not None or spans is not None
    if grouped and (blocks is not None or branches is not None):
        raise ValueError("sets, spans: whole blocks in groups; leave blocks= and branches= out")
    if max_samples is not None:
        whole_number("max_samples", max_samples, 1)
    prefix = prefix_of(model)
    blocks, block_list, sets = (_bare(names, prefix) for names in (blocks, block_list, sets))
    model = unwrap(model)
    ours = isinstance(model, DiT)
    if not ours:
        refuse_caches(model)
    reshard(model)  # so that `quiet` finds the parameters that FSDP2 expects after it
    # A whole copy of a sharded `DiT` is probed in its place.
    with probing(model), contextlib.nullcontext() if ours else quiet(model), resharded(model):
        network: Native | Foreign
        if isinstance(model, DiT):
            for option, value in (("block_list", block_list), ("mask", mask), ("batched", batched)):
                if value is not None:
                    raise ValueError(f"{option}: only for other models; a DiT knows its blocks and inputs")
            network = Native(model, inputs, engine, function)
        else:
            network = Foreign(model, inputs, engine, block_list, batched, mask, max_samples == 1, function, branches)
        samples, mask, t = network.samples, network.mask, network.t
        domains = None if domains is None else per_sample("domains", domains, samples)
        clips = None if clips is None else per_sample("clips", clips, samples, "id")
        if grouped:
            known = {name: layer for layer, name in enumerate(network.names or ())}
            groups = layer_sets(network.depth, sets, spans, known)
            plan = AblationPlan.of_sets(network.depth, groups, early=isinstance(network, Foreign))
        else:
            numbers = _numbers_of(blocks, network.names)
            if isinstance(network, Foreign):
                plan = network.by_branch(AblationPlan.build(network.depth, numbers))
            else:
                names = BRANCHES if branches in AUTO else branches
                plan = AblationPlan.build(network.depth, numbers, names)  # type: ignore[arg-type]
        plans: tuple[AblationPlan, ...] = (plan,)
        at_once = min(max_samples or samples, network.at_once(plan))
        if memory_budget is not None:
            plans, fitting = network.split(plan, memory_budget)
            at_once = min(at_once, fitting)
        # A graph keeps the memory of its plan. Elsewhere the first pass alone measures the noise.
        later = plans if network.engine == "graph" else tuple(replace(part, control=False) for part in plans)
        passes: list[Tensor] = []
        start, engine = 0, network.engine
        while start < samples:
            rows = slice(start, min(start + at_once, samples))
            measured = [network.measure(part, rows) for part in (later if start else plans)]
            if start and network.engine != engine:  # it failed on this pass: the passes before are not trusted
                passes, start, engine = [], 0, network.engine
                continue
            engine = network.engine
            # All parts of the plan have the same baseline: use the first one. Use the control of the first pass.
            changes = [result[: len(part.units)] for part, result in zip(plans, measured)]
            energy, *rest = measured[0][len(plans[0].units) :]
            floor = energy if function is None else rest.pop(0)
            passes.append(torch.cat([*changes, energy.unsqueeze(0), floor.unsqueeze(0)]))
            if start == 0:
                noise = rest[0][0] if rest else torch.full_like(energy[0], torch.nan)
                noise = noise / energy[0] if function is None else noise
            start = rows.stop
        frames = passes[0].new_ones(samples) if mask is None else mask.sum(1)
        times = frames if t is None else t.detach().float()
        facts = torch.stack([fact.double().to(noise.device) for fact in (frames, times)])
        facts = torch.cat([noise.double().expand(1, samples), facts])
        # This is the only copy to the host in a probe.
        result = torch.cat([torch.cat(passes, dim=1).double(), facts]).cpu()
    change, energy, floor, noise, frames, flow_time = result[:-5], *result[-5:]
    check_finite(plan, change, energy)
    check_frames(frames)
    outside = [time for time in flow_time.tolist() if not 0 <= time <= 1]
    if ours and outside:
        raise ValueError(f"t: expected times in [0, 1], 0 noise and 1 data, got {outside[0]:g}")
    if not energy.any():
        warnings.warn(
            "the velocity is identically zero (a network as adaLN-zero initialises it): every score is 0/0 "
            "and set to 0; train before probing",
            stacklevel=2,
        )
    units = [network.described(unit) for unit in plan.units]
    if grouped:  # back to the order of the arguments
        units = [Unit.of_layers(group) for group in groups]
        change = change[[plan.units.index(unit) for unit in units]]
    if function is None:
        floor = torch.zeros_like(energy)
        noise = (noise * energy).nan_to_num(0.0)  # rounding is relative
        change, floor, noise = (normalised_change(part, energy, str(metric)) for part in (change, floor, noise))
    scores = LayerScores(
        layers=tuple(unit.layer for unit in units),
        by_sample=change,
        metric=metric_name(metric),
        branches=None if branches is None else tuple(str(unit.branch) for unit in units),
        sets=tuple(unit.layers for unit in units) if grouped else None,
        names=tuple(
            unit.name
            if network.names is None
            else "+".join(network.names[layer] for layer in unit.layers) + (f".{unit.branch}" if unit.branch else "")
            for unit in units
        ),
        engine=network.engine,
        floor_by_sample=floor,
        noise_by_sample=None if noise.isnan().any() else noise,
        t=None if t is None else flow_time.float(),
        domains=None if domains is None else tuple(domains),
        clips=None if clips is None else tuple(clips),
        block_evaluations=(sum(map(network.evaluations, plans)) if network.engine in ("prefix", "graph") else None),
    )
    if function is None and network.dtype.itemsize == 2 and energy.any():
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


def _bare(names: Any, prefix: str) -> Any:
    """Names of blocks, also in lists, as the network inside of wrappers calls them."""
    if isinstance(names, str):
        return bare(names, prefix)
    return [_bare(part, prefix) for part in names] if isinstance(names, tuple | list | Iterator) else names


def _numbers_of(blocks: Sequence[int | str] | None, names: tuple[str, ...] | None) -> list[int] | None:
    """The numbers of blocks that are given by number or name."""
    if blocks is None:
        return None
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise TypeError(f"blocks: expected a list of layer numbers or names, got {blocks!r:.60}")
    numbers = []
    for block in blocks:
        if isinstance(block, str) and block not in (names or ()):
            known = f" or some of {', '.join(names)}" if names else ""
            raise ValueError(f"blocks: expected layer numbers{known}, got {block!r}")
        numbers.append((names or ()).index(block) if isinstance(block, str) else integer("blocks", block))
    return numbers


# A probe changes its model (also through a wrapper) and state of the whole process: the random state, and the fused
# path of nn.TransformerEncoder. So probes of other threads wait at this lock. The same thread may nest probes.
_ONE_PROBE = threading.RLock()


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode without gradient, and restore training flags and random state on every exit.

    Probes of several threads run one after the other. A thread that trains the same model must not run meanwhile."""
    with _ONE_PROBE, paused(model), _evaluated(model):
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
    """Raise `NotFiniteError` where the energy [N] or a unit's change [U, N] is not finite; names sample and layer."""
    bad = (~energy.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError(f"the baseline velocity of sample {bad[0]} is not finite: check the weights and x_t")
    rows = (~change.isfinite()).nonzero().tolist()
    if rows:
        unit, sample = rows[0]
        raise NotFiniteError(f"the velocity of sample {sample} without layer {plan.units[unit].name} is not finite")
