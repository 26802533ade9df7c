"""A probe of a `DiT`: its work on the device is one static function of the plan, which a CUDA graph can capture.

Sequences are stacked stream-major, [C + S B, T, D]: the control of sample 0 (C = 1, or 0 in a plan without), the
baseline's B samples, then the streams in the order in which they join. No code here reads a value
from the device, so shapes and plan determine every launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..models.dit import EPS, DiT, Modulation
from .plan import AblationPlan, Unit

Inputs = dict[str, Tensor]  # x_t [B, T, M], t [B], and where given cond [B, T, C], mask [B, T]


def measure(model: DiT, plan: AblationPlan, inputs: Inputs, engine: str = "prefix") -> Tensor:
    """Mean squares of one pass, on the device: [U + 1 + C, B] float32 (float64 for a float64 model).

    Rows: the change of each unit, the energy of the baseline, and the control's change (of sample 0, in every column).
    """
    control, velocity = ENGINES[engine](model, plan, inputs)
    mask = inputs.get("mask")
    change, energy = ops.velocity_delta(velocity, mask)
    rows = [change, energy.unsqueeze(0)]
    if plan.control:
        noise, _ = ops.velocity_delta(torch.stack([velocity[0, :1], control]), None if mask is None else mask[:1])
        rows.append(noise.expand(1, energy.shape[0]))
    return torch.cat(rows)


def whole(model: DiT) -> DiT:
    """The model itself, or a copy with whole weights if they are sharded (FSDP2). Every rank must call it.

    A probe calls the parts of a `DiT` instead of its forward, so the hooks that gather sharded weights would not run.
    """
    if not any(hasattr(weight, "full_tensor") for weight in model.parameters()):
        return model
    weights = {
        name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        for name, weight in model.state_dict().items()
    }
    copy = DiT(model.config).to(next(iter(weights.values())).device)
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def nudged(x: Tensor) -> Tensor:
    """Perturb every second channel by half an ulp; the resulting change of the velocity is the rounding noise floor.

    An unchanged copy would round exactly as the baseline does, and the change would be 0.
    """
    second = torch.arange(x.shape[-1], device=x.device).remainder(2).to(x.dtype)
    return x + x * (second * (0.5 * torch.finfo(x.dtype).eps))


def between(
    modulation: Sequence[Modulation],
    i: int,
    x: Tensor,
    out: Tensor,
    rows: Tensor,
    scale: Tensor | None = None,
    join: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Close branch i and open branch i + 1; the last branch is only closed.

    rows: int64 [R], the sample of each sequence; those of `join` come last."""
    gate = modulation[i].gate
    if i + 1 == len(modulation):
        x = ops.gated_residual(x, out, gate, stream_scale=scale, sample_index=rows, join=join)
        return x, x
    opening = modulation[i + 1]
    return ops.gated_residual_norm(
        x, out, gate, opening.shift, opening.scale, stream_scale=scale, sample_index=rows, join=join, eps=EPS
    )


def _staircase(model: DiT, plan: AblationPlan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run the staircase. Returns the velocity of the control [C, T, M] and of all streams [S, B, T, M]."""
    x, modulation, samples, masks = _opened(model, inputs, plan)
    batch, first = inputs["x_t"].shape[0], int(plan.control)
    if plan.control:
        x = torch.cat([nudged(x[:1]), x])
    h = ops.layer_norm_modulate(
        x, modulation[0].shift, modulation[0].scale, sample_index=samples[: x.shape[0]], eps=EPS
    )
    # The baseline's state before each unit that has started. It joins the batch where the unit stops.
    before: dict[int, list[Tensor]] = {}
    for i, branch in enumerate(model.branches):
        for unit in plan.units:
            if unit.start == i:
                state = x[first : first + batch]
                # A view would keep the states of all present streams in memory.
                before.setdefault(unit.stop, []).append(state.clone() if unit.stop > i + 1 else state)
        out = branch(h, None if masks is None else masks[: x.shape[0]])
        del h  # it holds all streams, and so does `out`: free both as soon as they are used
        # The new stream skips the branch; the op that closes it writes that stream behind the others.
        joining = before.pop(i + 1, [])
        join = torch.cat(joining) if len(joining) > 1 else joining[0] if joining else None
        rows = samples[: x.shape[0] + len(joining) * batch]
        later = [stream for stream, unit in enumerate(plan.units, 1) if unit.stop <= i and unit.skips(i)]
        scale = _without(later, x, len(rows), first, batch) if later else None
        x, h = between(modulation, i, x, out, rows, scale, join)
        del out, join, joining
    del h
    velocity = model.close(x)
    return velocity[:first], velocity[first:].unflatten(0, (plan.streams, batch))


def _stacked(model: DiT, plan: AblationPlan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run all streams from the first branch on and switch branches off by stream_scale. Returns as `_staircase`."""
    x, modulation, samples, masks = _opened(model, inputs, plan)
    batch, first = inputs["x_t"].shape[0], int(plan.control)
    x = torch.cat([*([nudged(x[:1])] if plan.control else ()), x.repeat(plan.streams, 1, 1)])
    h = ops.layer_norm_modulate(x, modulation[0].shift, modulation[0].scale, sample_index=samples, eps=EPS)
    for i, branch in enumerate(model.branches):
        off = [stream for stream, unit in enumerate(plan.units, 1) if unit.skips(i)]
        scale = _without(off, x, x.shape[0], first, batch)
        x, h = between(modulation, i, x, branch(h, masks), samples, scale)
    velocity = model.close(x)
    return velocity[:first], velocity[first:].unflatten(0, (-1, batch))


def _without(streams: Sequence[int], x: Tensor, rows: int, first: int, batch: int) -> Tensor:
    """The factors [rows] of a branch: 0 for the sequences of these streams, else 1."""
    scale = torch.ones(rows, device=x.device, dtype=x.dtype)
    for stream in streams:
        scale[first + stream * batch : first + (stream + 1) * batch].zero_()
    return scale


def _loop(model: DiT, plan: AblationPlan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run a forward for the control, the baseline and each unit. Returns as `_staircase`."""
    velocities = [_forward(model, inputs, unit) for unit in (None, *plan.units)]
    control = velocities[0][:0]
    if plan.control:
        control = _forward(model, {name: value[:1] for name, value in inputs.items()}, None, nudged)
    return control, torch.stack(velocities)


def _forward(
    model: DiT, inputs: Inputs, without: Unit | None, enter: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The velocity [B, T, M] without one unit's branches. `enter` changes the residual stream before block 0."""
    x, modulation, samples, masks = _opened(model, inputs, AblationPlan(model.depth, (), control=False))
    x = x if enter is None else enter(x)
    h = ops.layer_norm_modulate(x, modulation[0].shift, modulation[0].scale, eps=EPS)
    for i, branch in enumerate(model.branches):
        skipped = without is not None and without.skips(i)
        x, h = between(modulation, i, x, x[:0] if skipped else branch(h, masks), samples)
    return model.close(x)


def _opened(
    model: DiT, inputs: Inputs, plan: AblationPlan
) -> tuple[Tensor, Sequence[Modulation], Tensor, Tensor | None]:
    """The baseline before block 0 [B, T, D], the modulation of all branches, and the sample and the key mask of each of
    the C + S B sequences."""
    x, modulation = model.open(inputs["x_t"], inputs["t"], inputs.get("cond"), inputs.get("mask"))
    each = torch.arange(x.shape[0], device=x.device)
    samples = each.repeat(plan.streams)
    if plan.control:
        samples = torch.cat([each[:1], samples])
    key_mask = model.key_mask(inputs.get("mask"))
    return x, modulation, samples, None if key_mask is None else key_mask.index_select(0, samples)


ENGINES: dict[str, Callable[[DiT, AblationPlan, Inputs], tuple[Tensor, Tensor]]] = {
    "prefix": _staircase,
    "stacked": _stacked,
    "loop": _loop,
}
