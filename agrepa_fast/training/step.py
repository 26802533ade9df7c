"""One optimizer step as work for the device alone: forward, loss, backward, clip, AdamW, EMA, metrics.

Nothing in it waits for the device, and all that changes from step to step lies in tensors. So it runs as it is
("eager"), with the forward and backward compiled ("compile"), or captured as one CUDA graph per batch shape ("graph").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from .config import RunConfig
from .ema import Ema
from .meter import Meter
from .objective import Objective, StepInputs

# Real steps before a shape is captured: kernels are compiled and the optimizer's state is made in them.
WARMUP = 3


def pick_engine(config: RunConfig, device: torch.device, ranks: int) -> str:
    """What "auto" means here, or what was asked for.

    Raises:
        UserError: CUDA graphs where they cannot be.
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
    """`step(inputs, align_weight, lr)` trains on one batch, or on several whose gradients are averaged.

    Gradients of a step with a non-finite norm are dropped on the device (AdamW's own `found_inf`), the same on every
    rank, since the norm is of gradients that have been averaged over them. `skipped` counts such steps.

    Args:
        objective, optimizer, ema: what is trained, updated in place.
        engine: "eager", "compile" or "graph"; see the module.
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
        self.optimizer = optimizer
        self.ema = ema
        self.clip = config.optimizer.clip
        self.device = device
        self.bf16 = bf16
        self.engine = engine
        self.meter = Meter()
        # Steps in a row without finite gradients, the most in a row, and all of them.
        self.skipped = torch.zeros(3, device=device)
        self.align_weight = torch.zeros((), device=device)
        self.captures = 0
        self._graphs: dict[Hashable, _Captured] = {}
        self._seen: dict[Hashable, int] = {}
        self._pool: Any = None
        self._topology: Hashable = None
        # One compiled graph for each batch shape, with and without alignment; never a break in one.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * config.data.buckets + 8)
        self._compiled: Any = objective
        if engine != "eager":
            self._compiled = torch.compile(objective, dynamic=False, fullgraph=True)
        self._forward: Any = self._compiled

    def __call__(self, inputs: Sequence[StepInputs], align_weight: float, lr: float) -> None:
        """Train on the batches `inputs`; align_weight 0 leaves alignment out, its forward too."""
        self.objective.train()
        self.align_weight.fill_(align_weight)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        aligned = align_weight > 0
        topology = (aligned, self.objective.alignment.active if aligned else ())
        if topology != self._topology:
            self._enter(topology, aligned)
        if self.engine == "graph":
            [only] = inputs
            self._replay(only, aligned)
        else:
            self._run(inputs, aligned)

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Mean metrics since the last call, and `skipped`; waits for the device."""
        return self.meter.read(self.skipped)

    def _enter(self, topology: Hashable, aligned: bool) -> None:
        """A change of which heads run. Those that do not are frozen: DDP waits for no gradient of theirs."""
        self._topology = topology
        alignment = self.objective.alignment
        for parts in alignment.heads.children():
            for layer, head in parts.named_children():
                head.requires_grad_(aligned and int(layer) in alignment.active)
        self._forward = self._compiled
        if distributed.is_available() and distributed.is_initialized():
            self._forward = DistributedDataParallel(self._compiled)

    def _run(self, inputs: Sequence[StepInputs], aligned: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        last = len(inputs) - 1
        for number, given in enumerate(inputs):
            local = isinstance(self._forward, DistributedDataParallel) and number < last
            with self._forward.no_sync() if local else contextlib.nullcontext():
                draws = self.objective.draw(given)
                given = self.objective.shared(given, draws)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, metrics = self._forward(given, draws, self.align_weight if aligned else None)
                (loss / len(inputs)).backward()
            if aligned:
                self.objective.observe(metrics)
            if number < last:
                self.meter.add(metrics)
        self._update(metrics)

    @torch.no_grad()
    def _update(self, metrics: dict[str, Tensor]) -> None:
        """Clip, AdamW, EMA."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        bad = (~norm.isfinite()).to(self.skipped.dtype)
        # The fused AdamW divides by grad_scale as it reads a gradient, and does nothing where found_inf is 1.
        self.optimizer.grad_scale = (norm / self.clip).clamp_min(1).float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.ema.update()
        row = (self.skipped[0] + 1) * bad
        self.skipped.copy_(torch.stack([row, torch.maximum(row, self.skipped[1]), self.skipped[2] + bad]))
        self.meter.add({**metrics, "grad_norm": norm})

    def _replay(self, given: StepInputs, aligned: bool) -> None:
        """The step by the graph of this shape, captured once the shape has been seen WARMUP times."""
        key = (given.shapes(), self._topology)
        if key in self._graphs:
            self._graphs[key].replay(given)
            return
        seen = self._seen.get(key, 0)
        self._seen[key] = seen + 1
        if seen < WARMUP:
            self._aside(lambda: self._run([given], aligned))
            return
        # Frame by frame, other layers make another graph; the ones before would only hold memory.
        for old in [k for k in self._graphs if k[1] != self._topology]:  # type: ignore[index]
            del self._graphs[old]
        self.captures += 1
        self._graphs[key] = _Captured(lambda static: self._run([static], aligned), given, self._capture)
        self._graphs[key].replay(given)

    def _aside(self, work: Callable[[], None]) -> None:
        """Run `work` on another stream than the default one, as what is captured later will."""
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            work()
        torch.cuda.current_stream(self.device).wait_stream(aside)

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` as a CUDA graph, without running it; returns what runs it."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.objective.generator)
        # Gradients of the graph live in its own memory, so none may be left from before.
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = graph.pool()
        return graph.replay


class _Captured:
    """Work recorded on static copies of its inputs."""

    def __init__(
        self,
        work: Callable[[StepInputs], None],
        given: StepInputs,
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self.static = given.clone()
        self.run = capture(lambda: work(self.static))

    def replay(self, given: StepInputs) -> None:
        self.static.copy_(given)
        self.run()
