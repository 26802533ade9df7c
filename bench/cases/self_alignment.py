"""What alignment toward the network itself costs a training step: LayerSync and Self-Flow beside a step without.

mel [B, T, M]. It is the trainer's own step, with the engine that a run picks; heads are on every layer, pooled.
LayerSync adds its heads to the step, Self-Flow also a forward of the EMA without gradient. The learning rate is 0, so
that every call is the same step; the gate compares the flow-matching loss, which alignment must not change.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from agrepa_fast.alignment.selection import LayerSelection
from agrepa_fast.models.cost import forward_flops
from agrepa_fast.training.config import RunConfig, load_config, override_config
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.objective import Objective
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.step import TrainStep

from ..case import Outputs, Problem, Provider, Run, Setup, dtype_of
from ..published import random_dit
from .train_step import ALIGN_WEIGHT, BOUND
from .trainer import LR, TOY, _draw

TITLE = "Cost of alignment without a teacher"


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [_problem("small", 2, 16, "float32", TOY)]
    if device.type == "cpu":
        return [_problem(*(("demo", 4, 128) if scale == "quick" else ("small", 4, 256)), "float32")]
    return [_problem("small", 16, 938, "bfloat16")]


def _problem(preset: str, batch: int, frames: int, dtype: str, changes: tuple[str, ...] = ()) -> Problem:
    config = load_config(preset, [*changes, "model.dropout=0.0", "probe.k=1"])
    weights = config.model.depth * (4 + 2 * config.model.ff_ratio + 6) * config.model.width**2
    rows = config.model.depth * 12 * batch * frames * config.model.width
    return Problem(
        params={
            "preset": preset,
            "layers": config.model.depth,
            "width": config.model.width,
            "frames": frames,
            "batch": batch,
            "dtype": dtype,
        },
        dtype=dtype,
        bytes=4 * 8 * weights + 3 * dtype_of(dtype).itemsize * rows,  # as in the case `trainer`
        flops=3 * forward_flops(config.dit, batch, frames),
        build=functools.partial(_build, config, batch, frames, dtype),
    )


class _Watched(TrainStep):
    """The trainer's step; it keeps the last flow-matching loss."""

    flow_loss: Tensor

    def _update(self, metrics: dict[str, Tensor]) -> None:
        self.flow_loss = metrics["flow_loss"]
        super()._update(metrics)


def _build(config: RunConfig, batch: int, frames: int, dtype: str, device: torch.device) -> Setup:
    torch.manual_seed(0)
    network = random_dit(config.dit, device)
    inputs, drawn = _draw(config, batch, frames, device)
    draws = drawn._replace(clean_t=(1 + drawn.t) / 2)
    everywhere = torch.ones(batch, dtype=torch.bool, device=device)
    inputs = dataclasses.replace(inputs, targets={}, domains={"self": everywhere})
    depth = config.model.depth

    def step(source: str) -> Run:
        teacher = f"alignment.teachers={{self: {{source: {source or 'layersync'}, target_layer: {depth - 1}}}}}"
        here = override_config(config, [teacher])
        torch.manual_seed(0)
        with device:
            objective = Objective(here, {}, torch.Generator(device)).to(device)
        objective.backbone.network.load_state_dict(network.state_dict())
        objective.aligner.select(LayerSelection.uniform([0]))
        objective.aligner.align(ALIGN_WEIGHT if source else 0.0)
        objective.draw = lambda inputs, generator=None: draws  # type: ignore[method-assign]
        engine = "eager" if device.type == "cpu" else "graph"
        optimizer = build_optimizer(objective, here, capturable=engine == "graph")
        ema = Ema(objective.backbone, here.optimizer.ema_decay)
        objective.follow(ema.module)
        train_step = _Watched(objective, optimizer, ema, here, device, dtype == "bfloat16", engine)

        def run() -> Outputs:
            train_step([inputs], LR)
            return (train_step.flow_loss,)

        return run

    def reference() -> Outputs:
        return step("")()

    providers = (
        Provider("LayerSync", "ours", lambda: step("layersync")),
        Provider("Self-Flow", "engine", lambda: step("self-flow")),
        Provider("no alignment", "rival", lambda: step("")),
    )
    return Setup(providers, reference, {"flow_loss": BOUND[dtype]})
