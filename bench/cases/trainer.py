"""What each change that the trainer makes to a straightforward step is worth, one after the other.

The same model, loss, random numbers and clips for all; from the second provider on each keeps what the one before
changed. mel [B, T, M], tokens [B, S, 1], two teachers' pooled features. Dropout is 0, so that losses can be compared.
Clips of equal length, or mixed: two of each quarter of T, which the straightforward form pads to T, and which the
trainer takes in four buckets whose gradients it averages.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agrepa_fast.models.conditioning import assemble_condition
from agrepa_fast.models.cost import forward_flops
from agrepa_fast.models.flow import SIGMA
from agrepa_fast.training.config import RunConfig, load_config
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.objective import Draws, Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.step import TrainStep

from ..case import Outputs, Problem, Provider, Run, Setup, compiled, dtype_of
from ..published import published, random_dit
from .foga import precision
from .train_step import ALIGN_WEIGHT, BOUND, TEACHERS, selected

TITLE = "What the trainer's changes to a step are worth"
LR = 1e-4
QUICK_FRAMES = 128
TOY = ("model.depth=3", "model.width=16", "model.heads=2", "model.token_width=8", "mel.mels=16")


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [_problem("small", 2, 16, "equal", "float32", TOY), _problem("small", 8, 16, "mixed", "float32", TOY)]
    if device.type == "cpu":
        name, frames = ("demo", QUICK_FRAMES) if scale == "quick" else ("small", 256)
        sizes = [(4, "equal")] if scale == "quick" else [(4, "equal"), (8, "mixed")]
        return [_problem(name, batch, frames, lengths, "float32") for batch, lengths in sizes]
    found = [_problem("small", 16, 938, lengths, "bfloat16") for lengths in ("equal", "mixed")]
    return found + ([_problem("paper", 16, 938, "equal", "bfloat16")] if scale == "full" else [])


def _problem(preset: str, batch: int, frames: int, lengths: str, dtype: str, changes: tuple[str, ...] = ()) -> Problem:
    config = load_config(preset, [*changes, "model.dropout=0.0"])
    weights = config.model.depth * (4 + 2 * config.model.ff_ratio + 6) * config.model.width**2
    clips = Counter(_lengths(batch, frames, lengths))
    rows = config.model.depth * 12 * sum(length * count for length, count in clips.items()) * config.model.width
    return Problem(
        params={
            "preset": preset,
            "lengths": lengths,
            "layers": config.model.depth,
            "width": config.model.width,
            "frames": frames,
            "batch": batch,
            "dtype": dtype,
        },
        dtype=dtype,
        bytes=4 * 8 * weights + 3 * dtype_of(dtype).itemsize * rows,
        flops=3 * sum(forward_flops(config.dit, count, length) for length, count in clips.items()),
        build=functools.partial(_build, config, batch, frames, lengths, dtype),
    )


def _lengths(batch: int, frames: int, lengths: str) -> list[int]:
    """Frames of each clip; mixed ones in ascending order, as many of each of four lengths."""
    if lengths == "equal":
        return [frames] * batch
    return [frames * (1 + 4 * n // batch) // 4 for n in range(batch)]


def _draw(config: RunConfig, lengths: list[int], device: torch.device) -> tuple[StepInputs, Draws]:
    """One batch, padded to the longest clip; every other clip is speech."""
    batch, frames = len(lengths), max(lengths)
    draw = functools.partial(torch.randn, device=device)
    valid = torch.arange(frames, device=device) < torch.tensor(lengths, device=device)[:, None]
    speech = torch.arange(batch, device=device) % 2 == 0
    kept = torch.ones(batch, dtype=torch.bool, device=device)
    inputs = StepInputs(
        mel=draw(batch, frames, config.mel.mels) * valid[..., None],
        mask=valid,
        prompt=torch.arange(frames, device=device).expand(batch, frames) < min(lengths) // 4,
        tokens=torch.randint(1, 256, (batch, frames // 8, 1), device=device),
        token_lengths=torch.tensor(lengths, device=device) // 8,
        vocabulary=torch.zeros(batch, dtype=torch.int64, device=device),
        targets={name: draw(batch, width) for name, width in TEACHERS.items()},
        target_mask=valid,
        domains={"speech": speech, "audio": ~speech},
        shares={},
    )
    noise = SIGMA * draw(batch, frames, config.mel.mels)
    return inputs, Draws(torch.rand(batch, device=device), noise, kept, kept)


def _buckets(inputs: StepInputs, draws: Draws, lengths: list[int]) -> tuple[list[StepInputs], list[Draws]]:
    """The batch by length, each part padded to its own."""
    parts, numbers = [], []
    for length in sorted(set(lengths)):
        rows = slice(lengths.index(length), lengths.index(length) + lengths.count(length))

        def cut(value: Any, rows: slice = rows, length: int = length) -> Any:
            if isinstance(value, dict):
                return {name: cut(item) for name, item in value.items()}
            whole = value.dim() > 1 and value.shape[1] == max(lengths)
            return value[rows, :length].contiguous() if whole else value[rows].contiguous()

        parts.append(StepInputs(**{f.name: cut(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)}))
        numbers.append(Draws(*(cut(value) for value in draws)))
    return parts, numbers


class Watched(TrainStep):
    """The trainer's step, with the loss and the gradient norm where the gate finds them."""

    losses: list[Tensor]
    norm: Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.losses = []
        add = self.meter.add

        def seen(metrics: Mapping[str, Tensor]) -> None:
            self.losses.append(metrics["loss"])
            add(metrics)

        self.meter.add = seen  # type: ignore[method-assign]

    def _run(self, inputs: Sequence[StepInputs], aligned: bool) -> None:
        self.losses.clear()
        super()._run(inputs, aligned)

    def _update(self, metrics: dict[str, Tensor]) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # First: AdamW leaves them clipped.
        self.norm = nn.utils.get_total_norm(gradients)
        super()._update(metrics)


def _build(config: RunConfig, batch: int, frames: int, lengths: str, dtype: str, device: torch.device) -> Setup:
    torch.manual_seed(0)
    origin = Objective(config, TEACHERS, torch.Generator(device)).to(device)
    origin.backbone.network.load_state_dict(random_dit(config.dit).state_dict())
    origin.alignment.select(selected(config.model.depth))
    clips = _lengths(batch, frames, lengths)
    inputs, draws = _draw(config, clips, device)
    parts, numbers = _buckets(inputs, draws, clips)
    bf16 = dtype == "bfloat16"

    def trainer(engine: str) -> Run:
        objective = copy.deepcopy(origin)
        turn = itertools.cycle(numbers)
        objective.draw = lambda inputs, generator=None: next(turn)  # type: ignore[method-assign]
        optimizer = build_optimizer(objective, config, capturable=engine == "graph")
        ema = Ema(objective.backbone, config.optimizer.ema_decay)
        step = Watched(objective, optimizer, ema, config, device, bf16, engine)

        def run() -> Outputs:
            step(parts, ALIGN_WEIGHT, LR)
            return torch.stack(step.losses).mean(), step.norm

        return run

    def straight(**options: Any) -> Run:
        return _straight(copy.deepcopy(origin), inputs, draws, config, dtype, device, **options)

    def reference() -> Outputs:
        wide = copy.deepcopy(origin).double()
        values = {f.name: _double(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)}
        given, numbers = StepInputs(**values), Draws(*(_double(value) for value in draws))
        return _straight(wide, given, numbers, config, "float32", device)()

    # What train.engine=auto is here.
    auto = "eager" if device.type == "cpu" else "graph" if len(parts) == 1 else "compile"
    providers = [
        Provider("ours", "ours", lambda: trainer(auto)),
        Provider("straightforward", "rival", straight),
        Provider("+ one modulation Linear, one op between branches", "engine", lambda: straight(network="ours")),
        Provider(
            "+ domains as weights, no .item()", "engine", lambda: straight(network="ours", loss="ours", items=False)
        ),
    ]
    # Left out where the compilations would take longer than all the rest: of every mixed length, and in the quick run.
    if len(parts) == 1 and frames != QUICK_FRAMES:
        providers.append(Provider("trainer, compiled", "engine", lambda: trainer("compile")))
    if device.type == "cuda":
        providers += [
            Provider("trainer, eager", "engine", lambda: trainer("eager")),
            Provider("released form", "published", lambda: straight(keep_weights=True)),
            Provider("straightforward, compiled", "rival", lambda: straight(network="compiled")),
        ]
    # Twelve blocks with random weights amplify the last bits on the way back.
    return Setup(tuple(providers), reference, {"loss": BOUND[dtype], "grad_norm": 100 * BOUND[dtype]})


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _double(item) for name, item in value.items()}
    return value.double() if value.is_floating_point() else value


def _straight(
    objective: Objective,
    inputs: StepInputs,
    draws: Draws,
    config: RunConfig,
    dtype: str,
    device: torch.device,
    network: str = "published",
    loss: str = "published",
    items: bool = True,
    keep_weights: bool = False,
) -> Run:
    """A step as one writes it down: AdamW and EMA as torch and a loop have them, every metric read with .item()."""
    backbone, alignment = objective.backbone, objective.alignment
    module: nn.Module = backbone.network
    if network != "ours":
        module = published(backbone.network, keep_weights)
    call: Callable[..., Any] = compiled(module) if network == "compiled" else module
    layers = [layer for layer, weight in zip(alignment.layers, alignment.weights.tolist()) if weight > 0]
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
    mask = None if inputs.mask.all() else inputs.mask

    def published_loss() -> tuple[Tensor, list[Tensor]]:
        time = draws.t[:, None, None]
        x_t = (1 - time) * draws.noise + time * inputs.mel
        cond = assemble_condition(backbone.embed_tokens(inputs), inputs.mel, inputs.prompt)
        velocity, hidden = call(x_t, draws.t, cond, hidden_layers=layers, mask=mask)
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
                total = total + ALIGN_WEIGHT * alignment.weights[layer] * distance
        return total, seen

    def run() -> Outputs:
        objective.train()
        module.train()
        with precision("float32" if keep_weights else dtype, device):
            total, seen = published_loss() if loss == "published" else (objective(inputs, draws, weight)[0], [])
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average, trained):
                mean.lerp_(parameter, 1 - config.optimizer.ema_decay)
        if items:
            [metric.item() for metric in (total, norm, *seen)]
        return total.detach(), norm

    return run
