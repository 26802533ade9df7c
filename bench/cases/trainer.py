"""What each change that the trainer makes to a straightforward step is worth, one after the other.

The same model, loss, random numbers and batch for all; from the second provider on each keeps what the one before
changed. mel [B, T, M], tokens [B, S, 1], two teachers' pooled features. Dropout is 0, so that losses can be compared.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
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
TOY = ("model.depth=3", "model.width=16", "model.heads=2", "model.token_width=8", "mel.mels=16")


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [_problem("small", 2, 16, "float32", TOY)]
    if device.type == "cpu":
        return [_problem("demo", 4, 128, "float32") if scale == "quick" else _problem("small", 4, 256, "float32")]
    sizes = [("small", 16), ("paper", 16)] if scale == "full" else [("small", 16)]
    return [_problem(name, batch, 938, "bfloat16") for name, batch in sizes]


def _problem(preset: str, batch: int, frames: int, dtype: str, changes: tuple[str, ...] = ()) -> Problem:
    config = load_config(preset, [*changes, "model.dropout=0.0"])
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
        bytes=4 * 8 * weights + 3 * dtype_of(dtype).itemsize * rows,
        flops=3 * forward_flops(config.dit, batch, frames),
        build=functools.partial(_build, config, batch, frames, dtype),
    )


def _draw(config: RunConfig, batch: int, frames: int, device: torch.device) -> tuple[StepInputs, Draws]:
    draw = functools.partial(torch.randn, device=device)
    valid = torch.ones(batch, frames, dtype=torch.bool, device=device)
    speech = torch.arange(batch, device=device) % 2 == 0
    kept = torch.ones(batch, dtype=torch.bool, device=device)
    inputs = StepInputs(
        mel=draw(batch, frames, config.mel.mels),
        mask=valid,
        prompt=torch.arange(frames, device=device).expand(batch, frames) < frames // 4,
        tokens=torch.randint(1, 256, (batch, frames // 8, 1), device=device),
        token_lengths=torch.full((batch,), frames // 8, device=device),
        vocabulary=torch.zeros(batch, dtype=torch.int64, device=device),
        targets={name: draw(batch, width) for name, width in TEACHERS.items()},
        target_mask=valid,
        domains={"speech": speech, "audio": ~speech},
        shares={},
    )
    noise = SIGMA * draw(batch, frames, config.mel.mels)
    return inputs, Draws(torch.rand(batch, device=device), noise, kept, kept)


class Watched(TrainStep):
    """The trainer's step, with the loss and the gradient norm where the gate finds them."""

    seen: Outputs = ()

    def _update(self, metrics: dict[str, Tensor]) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # First: AdamW leaves them clipped.
        self.seen = (metrics["loss"], nn.utils.get_total_norm(gradients))
        super()._update(metrics)


def _build(config: RunConfig, batch: int, frames: int, dtype: str, device: torch.device) -> Setup:
    torch.manual_seed(0)
    origin = Objective(config, TEACHERS, torch.Generator(device)).to(device)
    origin.backbone.network.load_state_dict(random_dit(config.dit).state_dict())
    origin.alignment.select(selected(config.model.depth))
    inputs, draws = _draw(config, batch, frames, device)
    bf16 = dtype == "bfloat16"

    def trainer(engine: str) -> Run:
        objective = copy.deepcopy(origin)
        objective.draw = lambda inputs, generator=None: draws  # type: ignore[method-assign]
        optimizer = build_optimizer(objective, config, capturable=engine == "graph")
        ema = Ema(objective.backbone, config.optimizer.ema_decay)
        step = Watched(objective, optimizer, ema, config, device, bf16, engine)

        def run() -> Outputs:
            step([inputs], ALIGN_WEIGHT, LR)
            return step.seen

        return run

    def straight(**options: Any) -> Run:
        return _straight(copy.deepcopy(origin), inputs, draws, config, dtype, device, **options)

    def reference() -> Outputs:
        wide = copy.deepcopy(origin).double()
        values = {f.name: _double(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)}
        given, numbers = StepInputs(**values), Draws(*(_double(value) for value in draws))
        return _straight(wide, given, numbers, config, "float32", device)()

    providers = [
        Provider("ours", "ours", lambda: trainer("graph" if device.type == "cuda" else "eager")),
        Provider("straightforward", "rival", straight),
        Provider("+ one modulation Linear, one op between branches", "engine", lambda: straight(network="ours")),
        Provider(
            "+ domains as weights, no .item()", "engine", lambda: straight(network="ours", loss="ours", items=False)
        ),
        Provider("trainer, compiled", "engine", lambda: trainer("compile")),
    ]
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

    def published_loss() -> tuple[Tensor, list[Tensor]]:
        time = draws.t[:, None, None]
        x_t = (1 - time) * draws.noise + time * inputs.mel
        cond = assemble_condition(backbone.embed_tokens(inputs), inputs.mel, inputs.prompt)
        velocity, hidden = call(x_t, draws.t, cond, hidden_layers=layers)
        total = flow = F.mse_loss(velocity, inputs.mel - draws.noise)
        seen = [flow]
        for layer in layers:
            for name in TEACHERS:
                kept = inputs.domains[name]
                if not kept.any():
                    continue
                head: Any = alignment.heads.get_submodule(f"{name}.{layer}")
                pooled = hidden[layer][kept].mean(1)
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
