"""What each change of our trainer to a straightforward step is worth, one after the other.

All providers have the same model, loss, random numbers and clips; from the second one on each keeps the changes of the
one before. mel [B, T, M], tokens [B, S, 1], pooled features of two teachers. Dropout is 0, so that losses can be
compared. "equal" is one step on clips of equal length. "mixed" is four steps of B clips each: the straightforward form
shuffles the clips and pads a batch to T; the trainer batches the clips of each quarter of T, as its buckets do. The
learning rate is 0, so that the order of the steps cannot matter; no provider gets cheaper by it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from agrepa_fast.models.conditioning import assemble_condition
from agrepa_fast.models.cost import forward_flops
from agrepa_fast.models.flow import SIGMA
from agrepa_fast.training.config import RunConfig, load_config
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.objective import Draws, Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.step import WARMUP, TrainStep

from ..case import Outputs, Problem, Provider, Run, Setup, compiled, dtype_of
from ..published import published, random_dit
from .foga import precision
from .train_step import ALIGN_WEIGHT, BOUND, RELEASED_FORM, TEACHERS, selected

TITLE = "What the trainer's changes to a step are worth"
LR = 0.0
QUICK_FRAMES = 128
TOY = ("model.depth=3", "model.width=16", "model.heads=2", "model.token_width=8", "mel.mels=16")


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [
            _problem("small", batch, 16, lengths, "float32", TOY) for batch, lengths in ((2, "equal"), (4, "mixed"))
        ]
    if device.type == "cpu":
        if scale == "quick":
            return [_problem("demo", 4, QUICK_FRAMES, "equal", "float32")]
        return [_problem("small", 4, 256, lengths, "float32") for lengths in ("equal", "mixed")]
    chosen = [_problem("small", 16, 938, lengths, "bfloat16") for lengths in ("equal", "mixed")]
    return chosen + ([_problem("paper", 16, 938, "equal", "bfloat16")] if scale == "full" else [])


def _problem(preset: str, batch: int, frames: int, lengths: str, dtype: str, changes: tuple[str, ...] = ()) -> Problem:
    config = load_config(preset, [*changes, "model.dropout=0.0"])
    weights = config.model.depth * (4 + 2 * config.model.ff_ratio + 6) * config.model.width**2
    buckets = [frames] if lengths == "equal" else [frames * quarter // 4 for quarter in (1, 2, 3, 4)]
    rows = config.model.depth * 12 * batch * sum(buckets) * config.model.width
    return Problem(
        params={
            "preset": preset,
            "lengths": lengths,
            "steps": len(buckets),
            "layers": config.model.depth,
            "width": config.model.width,
            "frames": frames,
            "batch": batch,
            "dtype": dtype,
        },
        dtype=dtype,
        bytes=4 * 8 * weights * len(buckets) + 3 * dtype_of(dtype).itemsize * rows,
        flops=3 * sum(forward_flops(config.dit, batch, length) for length in buckets),
        build=functools.partial(_build, config, batch, buckets, dtype),
        alone=preset == "paper",
    )


Drawn = tuple[StepInputs, Draws]


def _draw(config: RunConfig, batch: int, frames: int, device: torch.device) -> Drawn:
    """A batch of clips of one length; every other clip is speech."""
    draw = functools.partial(torch.randn, device=device)
    valid = torch.ones(batch, frames, dtype=torch.bool, device=device)
    speech = torch.arange(batch, device=device) % 2 == 0
    kept = torch.ones(batch, dtype=torch.bool, device=device)
    inputs = StepInputs(
        mel=draw(batch, frames, config.mel.mels),
        mask=valid,
        prompt=torch.arange(frames, device=device).expand(batch, frames) < frames // 4,
        tokens=torch.randint(1, 256, (batch, max(1, frames // 8), 1), device=device),
        token_lengths=torch.full((batch,), frames // 8, device=device),
        vocabulary=torch.zeros(batch, dtype=torch.int64, device=device),
        targets={name: draw(batch, width) for name, width in TEACHERS.items()},
        target_mask=valid,
        domains={"speech": speech, "audio": ~speech},
    )
    noise = SIGMA * draw(batch, frames, config.mel.mels)
    return inputs, Draws(torch.rand(batch, device=device), noise, kept, kept)


def _shuffled(buckets: list[Drawn]) -> list[Drawn]:
    """The same clips in as many batches, each with the same number from every bucket, padded to the longest."""
    count = len(buckets)

    def mixed(values: Sequence[Any], step: int) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {name: mixed([value[name] for value in values], step) for name in values[0]}
        rows = [value[(step + number) % count :: count] for number, value in enumerate(values)]
        if values[0].dim() < 2:
            return torch.cat(rows)
        longest = max(row.shape[1] for row in rows)
        return torch.cat([F.pad(row, (*[0, 0] * (row.dim() - 2), 0, longest - row.shape[1])) for row in rows])

    names = [field.name for field in dataclasses.fields(StepInputs)]
    return [
        (
            StepInputs(**{name: mixed([getattr(inputs, name) for inputs, _ in buckets], step) for name in names}),
            Draws(*(mixed(values, step) for values in zip(*(draws for _, draws in buckets)))),
        )
        for step in range(count)
    ]


class Watch:
    """Losses and gradients of the first run, for the gate. Timed runs do not pay for it."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.outputs: Outputs | None = None

    def add(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Add a step, before its gradients are clipped."""
        if self.outputs is None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.losses.append(loss.detach().clone())
            self.sums = self.sums or [torch.zeros_like(gradient) for gradient in gradients]
            for total, gradient in zip(self.sums, gradients, strict=True):
                total.add_(gradient)

    def read(self) -> Outputs:
        """The mean loss of the steps and the norm of their mean gradient."""
        if self.outputs is None:
            steps = len(self.losses)
            self.outputs = torch.stack(self.losses).mean(), nn.utils.get_total_norm(self.sums) / steps
            self.sums = []
        return self.outputs


class Watched(TrainStep):
    """The trainer's step with a watch."""

    watch: Watch

    def _update(self, metrics: dict[str, Tensor]) -> None:
        self.watch.add(metrics["loss"], (p for group in self.optimizer.param_groups for p in group["params"]))
        super()._update(metrics)


def trainer_step(
    objective: Objective, batches: list[Drawn], config: RunConfig, device: torch.device, bf16: bool, engine: str
) -> Run:
    """The trainer's steps on the batches. The engine "graph" has recorded them already: no timed call does it."""
    numbers = {inputs.mel.shape: draws for inputs, draws in batches}
    objective.draw = lambda inputs, generator=None: numbers[inputs.mel.shape]  # type: ignore[method-assign]
    optimizer = build_optimizer(objective, config, capturable=engine == "graph")
    ema = Ema(objective.backbone, config.optimizer.ema_decay)
    step = Watched(objective, optimizer, ema, config, device, bf16, engine)
    step.watch = Watch()

    def run() -> Outputs:
        for inputs, _ in batches:
            step([inputs], LR)
        return step.watch.read()

    for _ in range(WARMUP + 1 if engine == "graph" else 0):
        run()
    return run


def _build(config: RunConfig, batch: int, buckets: list[int], dtype: str, device: torch.device) -> Setup:
    torch.manual_seed(0)
    with device:  # on the CPU a large network takes many seconds to initialise
        origin = Objective(config, TEACHERS, torch.Generator(device)).to(device)
    origin.backbone.network.load_state_dict(random_dit(config.dit, device).state_dict())
    origin.aligner.select(selected(config.model.depth))
    origin.aligner.align(ALIGN_WEIGHT)
    together = [_draw(config, batch, frames, device) for frames in buckets]
    shuffled = _shuffled(together)
    bf16 = dtype == "bfloat16"

    def trainer(engine: str) -> Run:
        return trainer_step(copy.deepcopy(origin), together, config, device, bf16, engine)

    def straight(**options: Any) -> Run:
        return _straight(copy.deepcopy(origin), shuffled, config, dtype, device, **options)

    def reference() -> Outputs:
        wide = copy.deepcopy(origin).double()
        return _straight(wide, [_double(drawn) for drawn in together], config, "float32", device, recompute=True)()

    # The engine that train.engine=auto picks here.
    auto = "eager" if device.type == "cpu" else "graph"
    providers = [
        Provider("ours", "ours", lambda: trainer(auto)),
        Provider("straightforward", "rival", straight),
        Provider("+ one modulation Linear, one op between branches", "engine", lambda: straight(network="ours")),
        Provider(
            "+ domains as weights, no .item()", "engine", lambda: straight(network="ours", loss="ours", items=False)
        ),
    ]
    # Left out if compiling would take longer than all the rest: for every mixed length, and in the quick run.
    if len(buckets) == 1 and buckets != [QUICK_FRAMES]:
        providers.append(Provider("trainer, compiled", "engine", lambda: trainer("compile")))
    if device.type == "cuda":
        providers += [
            Provider("trainer, eager", "engine", lambda: trainer("eager")),
            Provider(RELEASED_FORM[dtype], "published", lambda: straight(keep_weights=True)),
            Provider("straightforward, compiled", "rival", lambda: straight(network="compiled")),
        ]
    # Twelve blocks with random weights amplify rounding in backward.
    return Setup(tuple(providers), reference, {"loss": BOUND[dtype], "grad_norm": 100 * BOUND[dtype]})


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _double(item) for name, item in value.items()}
    if isinstance(value, StepInputs):
        return StepInputs(**{f.name: _double(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, tuple):
        parts = [_double(item) for item in value]
        return Draws(*parts) if isinstance(value, Draws) else tuple(parts)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _straight(
    objective: Objective,
    batches: list[Drawn],
    config: RunConfig,
    dtype: str,
    device: torch.device,
    network: str = "published",
    loss: str = "published",
    items: bool = True,
    keep_weights: bool = False,
    recompute: bool = False,
) -> Run:
    """Straightforward steps: AdamW and EMA as torch and a loop have them, and every metric read with .item().

    recompute: compute each block again in backward, to keep little in memory.
    """
    backbone, alignment = objective.backbone, objective.alignment
    module: nn.Module = backbone.network
    if network != "ours":
        module = published(backbone.network, keep_weights)
    call: Callable[..., Any] = compiled(module) if network == "compiled" else module
    weights = alignment.weights[0]  # the same for all teachers
    layers = [layer for layer, weight in zip(alignment.layers, weights.tolist()) if weight > 0]
    if loss == "ours":
        trained = [*objective.parameters()]
    else:
        heads = [alignment.heads.get_submodule(f"{name}.{layer}") for name in TEACHERS for layer in layers]
        trained = [
            *module.parameters(),
            *backbone.conditioner.parameters(),
            *(p for h in heads for p in h.parameters()),
        ]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=config.optimizer.weight_decay)
    average = [p.detach().clone() for p in trained]
    weight = torch.tensor(ALIGN_WEIGHT, device=device)
    # Without padding there is nothing to mask: the fast attention kernels take no mask.
    masks = [None if inputs.mask.all() else inputs.mask for inputs, _ in batches]
    watch = Watch()

    def published_loss(inputs: StepInputs, draws: Draws, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        time = draws.t[:, None, None]
        x_t = (1 - time) * draws.noise + time * inputs.mel
        cond = assemble_condition(backbone.embed_tokens(inputs), inputs.mel, inputs.prompt)
        if recompute:
            options = {
                "run_block": lambda block, x, embedded: checkpoint(block, x, embedded, mask, use_reentrant=False)
            }
        else:
            options = {}
        velocity, hidden = call(x_t, draws.t, cond, hidden_layers=layers, mask=mask, **options)
        frames = inputs.mask.sum(1)
        error = ((velocity - (inputs.mel - draws.noise)).square().mean(-1) * inputs.mask).sum(1) / frames
        total = flow = error.mean()
        seen = [flow]
        for layer in layers:
            for name in TEACHERS:
                kept = inputs.domains[name]
                if not kept.any():
                    continue
                head: Any = alignment.heads.get_submodule(f"{name}.{layer}")
                pooled = (hidden[layer] * inputs.mask[..., None])[kept].sum(1) / frames[kept, None]
                projected = head.output(F.gelu(head.hidden(F.layer_norm(pooled, (pooled.shape[-1],)))))
                distance = (1 - F.cosine_similarity(projected, inputs.targets[name][kept], dim=-1)).mean()
                seen.append(distance)
                total = total + ALIGN_WEIGHT * weights[layer] * distance
        return total, seen

    def step(inputs: StepInputs, draws: Draws, mask: Tensor | None) -> None:
        with precision("float32" if keep_weights else dtype, device):
            if loss == "published":
                total, seen = published_loss(inputs, draws, mask)
            else:
                total, seen = objective(inputs, draws, weight)[0], []
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        watch.add(total, trained)
        norm = nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average, trained):
                mean.lerp_(parameter, 1 - config.optimizer.ema_decay)
        if items:
            [metric.item() for metric in (total, norm, *seen)]

    def run() -> Outputs:
        objective.train()
        module.train()
        for (inputs, draws), mask in zip(batches, masks):
            step(inputs, draws, mask)
        return watch.read()

    return run
