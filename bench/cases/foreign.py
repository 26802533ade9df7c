"""FoG-A on other people's models: F5-TTS's DiT and diffusers' SD3, beside what other tools do on the same modules.

inputs of B samples -> scores [L, B]. The others run a forward for each block, in which a block's result is replaced by
the state that it was given; ours finds the blocks and shares prefixes. Least work is not counted: the networks are not
ours.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from torch import Tensor, nn

from agrepa_fast.attribution.runner import attribute_layers

from ..case import Outputs, Problem, Provider, Run, Setup, optional

TITLE = "FoG-A attribution of other people's models"
BOUND = {"float32": 1e-5}
EPS = 1e-8


@dataclass(frozen=True)
class Size:
    """Blocks, heads of 64 channels, tokens of the state and samples."""

    layers: int
    heads: int
    tokens: int
    batch: int


@dataclass(frozen=True)
class Foreign:
    """A model with its inputs and blocks. `state`: what a block is called with -> its result if it had no effect."""

    model: nn.Module
    inputs: dict[str, Tensor]
    blocks: Sequence[nn.Module]
    state: Callable[[Any, Any], Any]

    def output(self, inputs: dict[str, Tensor] | None = None) -> Tensor:
        result = self.model(**(self.inputs if inputs is None else inputs))
        return result if isinstance(result, Tensor) else result.sample

    def wide(self) -> Foreign:
        """The same in float64."""
        model = copy.deepcopy(self.model).double()
        places = [place for place, module in enumerate(self.model.modules()) if module in set(self.blocks)]
        modules = list(model.modules())
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in self.inputs.items()}
        return Foreign(model, inputs, [modules[place] for place in places], self.state)


def f5_tts(size: Size, device: torch.device) -> Foreign:
    """The DiT of F5-TTS: a chain of blocks. `f5_tts.model` would import its trainer, so its place is held for it."""
    package = types.ModuleType("f5_tts.model")
    package.__path__ = [str(Path(optional("f5_tts").__path__[0]) / "model")]
    # librosa makes mels, which are not made here.
    stand_ins: dict[str, Any] = {"f5_tts.model": package, "librosa": Mock(), "librosa.filters": Mock()}
    missing = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        network = optional("f5_tts.model.backbones.dit").DiT
    finally:
        for name in missing:
            del sys.modules[name]
    width = 64 * size.heads
    sizes = {"dim": width, "depth": size.layers, "heads": size.heads, "dim_head": 64, "ff_mult": 2, "mel_dim": 80}
    model = _random(network(**sizes, text_num_embeds=256, text_dim=64, conv_layers=1)).to(device)
    draw = functools.partial(torch.randn, size.batch, size.tokens, 80, device=device)
    text = torch.randint(0, 256, (size.batch, max(1, size.tokens // 4)), device=device)
    inputs = {"x": draw(), "cond": draw(), "text": text, "time": torch.rand(size.batch, device=device)}
    return Foreign(model, inputs, _blocks(model), lambda arguments, _: arguments[0])


def sd3(size: Size, device: torch.device) -> Foreign:
    """SD3 of diffusers: joint blocks, which give back the states of text and image."""
    network = optional("diffusers").SD3Transformer2DModel
    side = max(2, 2 * round(size.tokens**0.5))
    sizes = {"sample_size": side, "num_layers": size.layers, "in_channels": 4, "out_channels": 4}
    heads = {"attention_head_dim": 64, "num_attention_heads": size.heads, "caption_projection_dim": 64 * size.heads}
    model = network(**sizes, **heads, joint_attention_dim=64, pooled_projection_dim=32, pos_embed_max_size=side)
    draw = functools.partial(torch.randn, size.batch, device=device)
    inputs = {
        "hidden_states": draw(4, side, side),
        "encoder_hidden_states": draw(max(1, size.tokens // 4), 64),
        "pooled_projections": draw(32),
        "timestep": 1000 * torch.rand(size.batch, device=device),
    }
    model = _random(model).to(device)
    names = ("encoder_hidden_states", "hidden_states")
    return Foreign(model, inputs, _blocks(model), lambda _, keywords: tuple(keywords[name] for name in names))


MODELS: dict[str, Callable[[Size, torch.device], Foreign]] = {"F5-TTS DiT": f5_tts, "diffusers SD3": sd3}
PACKAGES = {"F5-TTS DiT": "f5_tts", "diffusers SD3": "diffusers"}


def problems(scale: str, device: torch.device) -> list[Problem]:
    """A probe of each model whose package is installed."""
    if scale == "toy":
        size = Size(3, 1, 9, 2)
    elif device.type == "cpu":
        size = Size(6, 4, 64, 4) if scale == "quick" else Size(12, 6, 64, 8)
    else:
        size = Size(22, 16, 900, 4)
    return [_problem(name, size) for name in MODELS if importlib.util.find_spec(PACKAGES[name])]


def _problem(name: str, size: Size) -> Problem:
    return Problem(
        params={
            "model": name,
            "layers": size.layers,
            "width": 64 * size.heads,
            "tokens": size.tokens,
            "batch": size.batch,
            "dtype": "float32",
        },
        dtype="float32",
        bytes=None,
        flops=None,
        build=functools.partial(_build, name, size),
    )


def _build(name: str, size: Size, device: torch.device) -> Setup:
    foreign = MODELS[name](size, device)

    def ours() -> Outputs:
        return (attribute_layers(foreign.model, foreign.inputs).by_sample,)

    # captum does not take a layer that returns None, as SD3's last block does for the text.
    captum = [Provider("captum", "rival", lambda: _captum(foreign))] if name == "F5-TTS DiT" else []
    providers = (
        Provider("ours", "ours", lambda: ours),
        Provider("loop engine", "engine", lambda: lambda: (_engine(foreign, "loop"),)),
        Provider("loop of hooks", "rival", lambda: _hooks(foreign)),
        *captum,
        Provider("nnsight", "rival", lambda: _nnsight(foreign)),
    )
    return Setup(providers, lambda: _hooks(foreign.wide())(), {"scores": BOUND["float32"]})


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [*model.get_submodule("transformer_blocks").children()]


def _random(model: nn.Module) -> nn.Module:
    """Random weights everywhere: at their initialisation the blocks of these models have no effect."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def _engine(foreign: Foreign, name: str) -> Tensor:
    return attribute_layers(foreign.model, foreign.inputs, engine=name).by_sample


def _score(output: Tensor, base: Tensor) -> Tensor:
    """The score of each sample [B], see docs/concepts.md."""
    change, energy = (x.flatten(1).square().mean(1) for x in (output - base, base))
    return (change + EPS).sqrt() / ((energy + EPS).sqrt() + EPS)


def _hooks(foreign: Foreign) -> Run:
    """What is usually written by hand: a hook replaces the block's result."""

    def skip(_: nn.Module, arguments: Any, keywords: Any, result: Any) -> Any:
        return foreign.state(arguments, keywords)

    @torch.no_grad()
    def run() -> Outputs:
        base, scores = foreign.output(), []
        for block in foreign.blocks:
            with block.register_forward_hook(skip, with_kwargs=True):
                scores.append(_score(foreign.output(), base))
        return (torch.stack(scores),)

    return run


def _captum(foreign: Foreign) -> Run:
    """LayerFeatureAblation block by block, whose baseline is the state that the block was given."""
    ablation = optional("captum.attr").LayerFeatureAblation
    first, *rest = foreign.inputs

    @torch.no_grad()
    def run() -> Outputs:
        before: list[Tensor] = []
        hooks = [b.register_forward_pre_hook(lambda _, arguments: before.append(arguments[0])) for b in foreign.blocks]
        base = foreign.output()
        for hook in hooks:
            hook.remove()
        unchanged = _score(base, base)

        def minus_score(x: Tensor) -> Tensor:
            inputs = {first: x} | {name: foreign.inputs[name] for name in rest}
            return -_score(foreign.output(inputs), base)

        scores = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block, state in zip(foreign.blocks, before):
                whole = torch.zeros(1, *state.shape[1:], dtype=torch.long, device=state.device)
                effect = ablation(minus_score, block).attribute(
                    foreign.inputs[first], layer_baselines=state, layer_mask=whole
                )
                # Every element carries the effect of all: the score, less that of an unchanged output.
                scores.append(effect.flatten(1)[:, 0] + unchanged)
        return (torch.stack(scores),)

    return run


def _nnsight(foreign: Foreign) -> Run:
    """A trace for each block, in which its output is set to its input."""
    # It puts a forward of its own into every module, which must not slow the others down.
    wrapped = optional("nnsight").NNsight(copy.deepcopy(foreign.model))
    names = {id(module): name for name, module in foreign.model.named_modules()}
    envoys = [wrapped.get(names[id(block)]) for block in foreign.blocks]

    @torch.no_grad()
    def run() -> Outputs:
        with wrapped.trace(**foreign.inputs):
            base = wrapped.output.save()
        scores = []
        for envoy in envoys:
            with wrapped.trace(**foreign.inputs):
                envoy.output = foreign.state(*envoy.inputs)
                output = wrapped.output.save()
            scores.append(_score(_sample(output), _sample(base)))
        return (torch.stack(scores),)

    return run


def _sample(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample
