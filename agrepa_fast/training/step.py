"""One optimizer step without a host sync: forward, loss, backward, clip, AdamW, EMA, metrics.

Everything that changes from step to step is in tensors. So the step can run as it is ("eager"), with forward and
backward compiled ("compile"), or as one captured CUDA graph for each batch shape ("graph").
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..graphs import Recording, run_aside
from .config import RunConfig
from .ema import Ema
from .meter import Meter
from .objective import Objective, StepInputs
from .sharding import is_shard, is_sharded

# Real steps on the static inputs of a shape before it is recorded. They compile the kernels and make the optimizer's
# state.
WARMUP = 3


def pick_engine(config: RunConfig, device: torch.device, ranks: int) -> str:
    """The engine of a run: the configured one, or for "auto" the fastest that fits.

    Raises:
        UserError: CUDA graphs were asked for where they cannot run.
    """
    engine = config.train.engine
    why_not = (
        f"it needs a CUDA device, this is {device.type}"
        if device.type != "cuda"
        else "several ranks are not captured"
        if ranks > 1
        else "train.accumulate is not 1"
        if config.train.accumulate > 1
        else ""
    )
    if engine == "auto":
        plain = device.type == "cpu" or config.model.attention == "xformers"
        return "eager" if plain else "compile" if why_not else "graph"
    if engine == "graph" and why_not:
        raise UserError(f"train.engine: graph: {why_not}; use auto")
    return engine


class TrainStep:
    """`step(inputs, lr)` trains on one batch, or on several whose gradients are averaged.

    The objective's aligner says how strong alignment is. Without it the step skips alignment and its forward.

    A step whose gradient norm is not finite is dropped on the device by AdamW's own `found_inf`. All ranks drop it
    alike, because the norm is that of the averaged gradients. `skipped` counts such steps.

    Args:
        objective, optimizer, ema: are updated in place.
        engine: "eager", "compile" or "graph", see the module.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.AdamW,
        ema: Ema,
        config: RunConfig,
        device: torch.device,
        bf16: bool,
        engine: str,
    ) -> None:
        self.objective = objective
        self.aligner = objective.aligner
        self.optimizer = optimizer
        self.ema = ema
        self.clip = config.optimizer.clip
        self.sharded = is_sharded(objective)
        self.device = device
        self.bf16 = bf16
        self.engine = engine
        self.meter = Meter()
        # Number of steps without finite gradients: the present row of them, the longest row, and all.
        self.skipped = torch.zeros(3, device=device)
        self.captures = 0
        self._shapes: dict[Hashable, _Shape] = {}
        self._topology: Hashable = None
        # There is one compiled graph for each batch shape, with and without alignment, and no graph break. Branches
        # that are compiled apart have one for each shape, with and without gradient.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * config.data.buckets + 8)
        self._compiled: Any = objective
        if engine != "eager" and self.sharded:
            # The hooks that gather weights cannot be traced, so the branches between them are compiled.
            for branch in objective.backbone.network.branches:
                branch.forward = torch.compile(branch.forward, dynamic=False, fullgraph=True)
        elif engine != "eager":
            self._compiled = torch.compile(objective, dynamic=False, fullgraph=True)
        self._forward: Any = self._compiled

    def __call__(self, inputs: Sequence[StepInputs], lr: float) -> None:
        """Train on the batches `inputs`."""
        self.objective.train()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.aligner.topology != self._topology:
            self._enter()
        if self.engine == "graph":
            [only] = inputs
            self._replay(only)
        else:
            self._run(inputs)

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Mean metrics since the last call, and `skipped`. Waits for the device."""
        return self.meter.read(self.skipped)

    def _enter(self) -> None:
        """Prepare for another set of active heads: freeze the other heads, and build DDP anew.

        The loss would give inactive heads zero gradients, and DDP would average those zeros over the ranks in every
        step. With frame-wise heads on every layer that is more traffic than the network's own gradients.
        """
        self._topology = self.aligner.topology
        self.aligner.freeze_idle()
        self._forward = self._compiled
        if distributed.is_available() and distributed.is_initialized() and not self.sharded:
            self._forward = DistributedDataParallel(self._compiled)

    def _run(self, inputs: Sequence[StepInputs]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        last = len(inputs) - 1
        strength = self.aligner.strength if self.aligner.on else None
        for number, batch in enumerate(inputs):
            local = isinstance(self._forward, DistributedDataParallel) and number < last
            with self._forward.no_sync() if local else contextlib.nullcontext():
                draws = self.objective.draw(batch)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, metrics = self._forward(batch, draws, strength)
                (loss / len(inputs)).backward()
            if strength is not None:
                self.aligner.observe(metrics)
            if number < last:
                self.meter.add(metrics)
        self._update(metrics)

    @torch.no_grad()
    def _update(self, metrics: dict[str, Tensor]) -> None:
        """Clip the gradients, then update parameters and EMA."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if is_shard(norm):
            norm = norm.full_tensor()
        bad = (~norm.isfinite()).to(self.skipped.dtype)
        # The fused AdamW divides by grad_scale as it reads a gradient, and does nothing where found_inf is 1.
        self.optimizer.grad_scale = (norm / self.clip).clamp_min(1).float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.ema.update()
        row = (self.skipped[0] + 1) * bad
        self.skipped.copy_(torch.stack([row, torch.maximum(row, self.skipped[1]), self.skipped[2] + bad]))
        self.meter.add({**metrics, "grad_norm": norm})

    def _replay(self, inputs: StepInputs) -> None:
        """Run the step on the static inputs of this shape: eagerly WARMUP times, then recorded, then replayed."""
        key = (inputs.layout(), self._topology)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape(inputs.clone())
        else:
            shape.static.copy_(inputs)
        # Warm-up and recording run on the tensors of the replays. torch.compile guards the strides of a tensor and
        # which arguments are the same tensor; if these differed, it would compile during the recording.
        if shape.warm < WARMUP:
            shape.warm += 1
            run_aside(lambda: self._run([shape.static]), self.device)
            return
        if shape.recording is None:
            shape.recording = self._record(shape.static)
        shape.recording.replay()

    def _record(self, static: StepInputs) -> Recording:
        # Shapes of other active heads will not come back soon, and their recordings hold memory.
        self._shapes = {key: shape for key, shape in self._shapes.items() if key[1] == self._topology}  # type: ignore[index]
        living = [shape.recording for shape in self._shapes.values() if shape.recording is not None]
        # A recording keeps gradients in its own memory, so there must be none from before it.
        self.optimizer.zero_grad(set_to_none=True)
        self.captures += 1
        return Recording(
            lambda: self._run([static]),
            self.device,
            # Only a recording that is still alive can share its memory.
            pool=living[0] if living else None,
            generators=[self.objective.generator],
        )


@dataclass
class _Shape:
    """A batch shape and a set of active heads: static inputs, the number of steps on them, and a recording."""

    static: StepInputs
    warm: int = 0
    recording: Recording | None = None
