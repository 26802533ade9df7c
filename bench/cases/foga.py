"""FoG-A on a whole network: every engine of this library, the released loop, an SDPA loop, a compiled loop, captum.

x_t [B, T, M] -> scores [L, B]. Least work: L (L + 1) / 2 block evaluations of B sequences (those that shared prefixes
leave), each of which reads its weights once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from agrepa_fast.attribution.runner import attribute_layers
from agrepa_fast.models.cost import block_flops, ends_flops
from agrepa_fast.models.dit import PRESETS, DiTConfig
from agrepa_fast.models.flow import SIGMA

from ..case import Outputs, Problem, Provider, Run, Setup, compiled, dtype_of, optional
from ..protocol import recorded
from ..published import PublishedDiT, foga_loop, published, random_dit

TITLE = "FoG-A attribution"
AFFORDABLE_FLOPS = 3e13  # a reference loop in float64 up to here, in float32 beyond
BOUND = {"float32": 1e-5, "bfloat16": 3e-2}

# The released code always runs in float32; its row says so beside the ratio.
RELEASED = {"float32": "released loop", "bfloat16": "released loop, float32"}

TOY = DiTConfig(depth=3, width=32, heads=2, mels=8, cond=12, dropout=0.0)
COMPACT = PRESETS["small"]  # 12 x 384
DEEP = dataclasses.replace(COMPACT, depth=24)
PAPER = PRESETS["paper"]  # 24 x 1024


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [problem("toy", TOY, 2, 16, "float32")]
    if device.type == "cpu":
        if scale == "quick":
            return [problem("compact", COMPACT, 1, 64, "float32")]
        loops = ("SDPA loop", "released loop")
        return [problem("compact", COMPACT, 4, 256, "float32"), problem("deep", DEEP, 4, 256, "float32", loops)]
    chosen = [problem("paper", PAPER, 4, 938, "bfloat16"), problem("compact", COMPACT, 4, 256, "bfloat16")]
    if scale == "full":  # run the slow rivals only once
        rivals = ("SDPA loop", "compiled loop")
        chosen += [problem("paper", PAPER, batch, 938, "bfloat16", rivals) for batch in (2, 8)]
    return chosen


def problem(
    name: str, config: DiTConfig, batch: int, frames: int, dtype: str, rivals: tuple[str, ...] | None = None
) -> Problem:
    """A probe of a network of `config`. `rivals` limits the providers besides ours to these names."""
    return Problem(
        params={
            "scale": name,
            "layers": config.depth,
            "width": config.width,
            "frames": frames,
            "batch": batch,
            "dtype": dtype,
        },
        dtype=dtype,
        bytes=probe_bytes(config, batch, frames, dtype_of(dtype).itemsize),
        flops=probe_flops(config, batch, frames),
        build=functools.partial(build, config, batch, frames, dtype, rivals),
    )


def probe_flops(config: DiTConfig, batch: int, frames: int) -> int:
    evaluations = config.depth * (config.depth + 1) // 2
    return evaluations * block_flops(config, batch, frames) + ends_flops(config, batch, config.depth + 1, frames)


def probe_bytes(config: DiTConfig, batch: int, frames: int, size: int) -> int:
    """Weights once, and for each block evaluation the streams in and out of its branches (6 passes of B T D each)."""
    weights = config.depth * (4 + 2 * config.ff_ratio + 6) * config.width**2
    evaluations = config.depth * (config.depth + 1) // 2
    return size * (weights + evaluations * 12 * batch * frames * config.width)


def precision(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast over float32 weights, as in training; nothing for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype_of(dtype))


def draw_inputs(config: DiTConfig, batch: int, frames: int, device: torch.device) -> dict[str, Tensor]:
    draw = functools.partial(torch.randn, device=device)
    return {
        "x_t": SIGMA * draw(batch, frames, config.mels),
        "t": torch.rand(batch, device=device),
        "cond": draw(batch, frames, config.cond),
    }


def build(
    config: DiTConfig, batch: int, frames: int, dtype: str, rivals: tuple[str, ...] | None, device: torch.device
) -> Setup:
    model = random_dit(config, device).eval()
    inputs = draw_inputs(config, batch, frames, device)

    def engine(name: str) -> Run:
        def run() -> Outputs:
            with precision(dtype, device):
                return (attribute_layers(model, inputs, engine=name).by_sample,)

        return run

    def loop(keep_weights: bool, wrap: Callable[[Any], Any] | None = None, cast: bool = False, **options: Any) -> Run:
        """The loop of forwards. `cast`: the model in the problem's dtype instead of autocast, which casts weights in
        every call.
        """
        network = published(model, keep_weights)
        converted = inputs
        if cast:
            network.to(dtype_of(dtype))
            converted = {name: value if name == "t" else value.to(dtype_of(dtype)) for name, value in inputs.items()}
        # The authors probe a network in training mode (only there does torch keep attention's weights); the
        # dropout that comes with it is left out, so that the numbers can be compared.
        network.train(keep_weights)
        _without_dropout(network)
        if wrap is not None:
            block = wrap(type(network.blocks[0]).forward)
            options["run_block"] = lambda module, x, embedded: block(module, x, embedded)
        plain = keep_weights or cast
        context = contextlib.nullcontext if plain else functools.partial(precision, dtype, device)

        def run() -> Outputs:
            with context():
                return (foga_loop(network, converted, **options),)

        return run

    def reference() -> Outputs:
        wide = torch.float64 if probe_flops(config, batch, frames) < AFFORDABLE_FLOPS else torch.float32
        network = published(model, keep_weights=False).to(wide).eval()
        return (foga_loop(network, {name: value.to(wide) for name, value in inputs.items()}),)

    on_gpu = device.type == "cuda"
    low = dtype != "float32"
    # Not in the headline, where launches are hidden by the work: after a failed capture all of it would run again.
    graphed = [Provider("compiled loop, graphed", "rival", lambda: _graphed(loop(False, compiled, cast=low)))]
    headline = config is PAPER and rivals is None
    cast = [
        Provider(f"SDPA loop, {dtype} model", "rival", lambda: loop(False, cast=True)),
        Provider(f"compiled loop, {dtype} model", "rival", lambda: loop(False, compiled, cast=True)),
    ]
    providers = [
        Provider("ours", "ours", lambda: engine("auto")),
        *([Provider("eager staircase", "engine", lambda: engine("prefix"))] if on_gpu else ()),
        Provider("stacked engine", "engine", lambda: engine("stacked")),
        Provider("loop engine", "engine", lambda: engine("loop")),
        Provider(RELEASED[dtype], "published", lambda: loop(True, host_sync=True)),
        Provider("SDPA loop", "rival", lambda: loop(False)),
        Provider("compiled loop", "rival", lambda: loop(False, compiled)),
        *(cast if low else ()),
        *(graphed if on_gpu and not headline else ()),
        Provider("captum", "rival", lambda: _captum(published(model, keep_weights=False).eval(), inputs, dtype)),
    ]
    kept = tuple(p for p in providers if p.role == "ours" or rivals is None or p.name.partition(",")[0] in rivals)
    return Setup(kept, reference, {"scores": BOUND[dtype]})


def _without_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


def _graphed(run: Run) -> Run:
    """The whole loop as one CUDA graph, whose outputs are in the graph's memory."""
    run()
    recording = recorded("compiled loop, graphed", run, torch.device("cuda", torch.cuda.current_device()))

    def replay() -> Outputs:
        recording.replay()
        return recording.output

    return replay


def _captum(network: PublishedDiT, inputs: dict[str, Tensor], dtype: str) -> Run:
    """LayerFeatureAblation layer by layer: a block's output is replaced by its input.

    captum compares a scalar of each sample, so the forward function returns the negative score.
    """
    ablation = optional("captum.attr").LayerFeatureAblation
    device = inputs["x_t"].device

    def run() -> Outputs:
        with torch.no_grad(), precision(dtype, device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before: dict[int, Tensor] = {}
            handles = [
                block.register_forward_pre_hook(lambda _, arguments, layer=layer: before.update({layer: arguments[0]}))
                for layer, block in enumerate(network.blocks)
            ]
            base, _ = network(**inputs)
            for handle in handles:
                handle.remove()
            energy = base.float().square().mean((-2, -1))

            floor = 1e-4 / ((energy + 1e-8).sqrt() + 1e-8)

            def minus_score(x_t: Tensor) -> Tensor:
                velocity, _ = network(x_t, inputs["t"], inputs["cond"])
                change = (velocity.float() - base.float()).square().mean((-2, -1))
                return -(change + 1e-8).sqrt() / ((energy + 1e-8).sqrt() + 1e-8)

            scores = []
            for layer, block in enumerate(network.blocks):
                whole = torch.zeros(1, *before[layer].shape[1:], dtype=torch.long, device=device)
                effect = ablation(minus_score, block).attribute(
                    inputs["x_t"], layer_baselines=before[layer], layer_mask=whole
                )
                # Every element carries the group's effect: the score, less what an unchanged velocity scores.
                scores.append(effect.flatten(1)[:, 0] + floor)
            return (torch.stack(scores),)

    return run
