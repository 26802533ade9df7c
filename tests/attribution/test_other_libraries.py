"""The DiTs of f5-tts and diffusers, small, with random weights, against a loop that takes one block out at a time."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers

DEPTH, SAMPLES = 4, 2
ENGINES = ["auto", "stacked", "loop"]


def f5_tts_dit() -> type[nn.Module]:
    """The class, without its package's trainer: f5_tts.model imports that, and librosa for a mel of its own."""
    spec = importlib.util.find_spec("f5_tts")
    assert spec is not None, "f5-tts is missing: make test installs it"
    assert spec.submodule_search_locations is not None
    package = types.ModuleType("f5_tts.model")
    package.__path__ = [os.path.join(spec.submodule_search_locations[0], "model")]
    filters = types.ModuleType("librosa.filters")
    filters.mel = None  # type: ignore[attr-defined]
    stand_ins = {"f5_tts.model": package, "librosa": types.ModuleType("librosa"), "librosa.filters": filters}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        from f5_tts.model.backbones.dit import DiT
    return DiT


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).double()


def f5(**options):
    sizes = {"dim": 32, "depth": DEPTH, "heads": 2, "dim_head": 16, "ff_mult": 2, "mel_dim": 6, "text_num_embeds": 9}
    model = randomise(f5_tts_dit()(**sizes, dropout=0.1, conv_layers=1, **options))
    inputs = {
        "x": draw(SAMPLES, 9, 6),
        "cond": draw(SAMPLES, 9, 6).flip(1),
        "text": torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]]),
        "time": torch.tensor([0.2, 0.7]).double(),
        "mask": torch.arange(9) < torch.tensor([[6], [9]]),
    }
    return model, inputs, "transformer_blocks"


def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": DEPTH, "sample_size": 8, "patch_size": 2}
    model = DiTTransformer2DModel(**sizes, in_channels=3, out_channels=3, norm_num_groups=1, num_embeds_ada_norm=10)
    inputs = {
        "hidden_states": draw(SAMPLES, 3, 8, 8),
        "timestep": torch.tensor([3, 8]),
        "class_labels": torch.tensor([1, 4]),
    }
    return randomise(model), inputs, "transformer_blocks"


def diffusers_sd3():
    from diffusers import SD3Transformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": DEPTH, "sample_size": 8, "patch_size": 2}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    model = SD3Transformer2DModel(**sizes, **widths, in_channels=3, out_channels=3, pos_embed_max_size=8)
    inputs = {
        "hidden_states": draw(SAMPLES, 3, 8, 8),
        "encoder_hidden_states": draw(SAMPLES, 5, 12),
        "pooled_projections": draw(SAMPLES, 10),
        "timestep": torch.tensor([3.0, 8.0]).double(),
    }
    return randomise(model), inputs, "transformer_blocks"


class Off(nn.Module):
    """In place of a block of any of the three: gives back what it was given."""

    def __init__(self, joint: bool, last: bool) -> None:
        super().__init__()
        self.joint, self.last = joint, last

    def forward(self, hidden_states=None, *args, encoder_hidden_states=None, **kwargs):
        if not self.joint:
            return hidden_states
        return None if self.last else encoder_hidden_states, hidden_states


@torch.no_grad()
def scores_by_loop(model, inputs, blocks):
    model.eval()
    blocks = model.get_submodule(blocks)
    joint = type(model).__name__.startswith("SD3")

    def forward():
        velocity = model(**inputs)
        return getattr(velocity, "sample", velocity)

    # The whole batch at once: padding does reach the frames of f5-tts.
    base = forward()
    valid = [inputs["mask"][n] if "mask" in inputs else slice(None) for n in range(SAMPLES)]
    result = np.zeros((DEPTH, SAMPLES))
    for k in range(DEPTH):
        own = blocks[k]
        blocks[k] = Off(joint, k + 1 == DEPTH)
        blocks[k].norm1 = getattr(own, "norm1", None)  # diffusers' DiT embeds the time with its first block's
        velocity = forward()
        blocks[k] = own
        for n in range(SAMPLES):
            v, v_k = base[n][valid[n]].double().numpy(), velocity[n][valid[n]].double().numpy()
            result[k, n] = np.sqrt(np.mean((v_k - v) ** 2) + 1e-8) / (np.sqrt(np.mean(v**2) + 1e-8) + 1e-8)
    assert (result > 5e-4).all()
    return result


def f5_without_padding():
    model, inputs, blocks = f5()
    return model, {**inputs, "mask": torch.ones(SAMPLES, 9, dtype=torch.bool)}, blocks


BUILDERS = {
    "f5": f5,
    "f5 without padding": f5_without_padding,
    "f5 with a long skip": lambda: f5(long_skip_connection=True, attn_mask_enabled=True, qk_norm="rms_norm"),
    "diffusers DiT": diffusers_dit,
    "diffusers SD3": diffusers_sd3,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_loop(name):
    model, inputs, blocks = BUILDERS[name]()
    expected = scores_by_loop(model, inputs, blocks)
    model.train()
    for engine in ENGINES:
        scores = attribute_layers(model, inputs, engine=engine)
        np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-8, err_msg=engine)
        if engine == "auto":  # all of them are chains
            assert scores.block_evaluations == DEPTH * (DEPTH + 1) / 2
        assert scores.t.tolist() == pytest.approx(inputs.get("time", inputs.get("timestep")).tolist())
    assert model.training
    assert attribute_layers(model, inputs).by_sample.argsort(0).tolist() == expected.argsort(0).tolist()


def in_dtype(name, dtype, weights=None):
    """A model and its inputs in `dtype`, after a rounding of both to `weights`."""
    model, inputs, blocks = BUILDERS[name]()
    weights = weights or dtype
    model = model.to(weights).to(dtype)
    return model, {k: v.to(weights).to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, blocks


@functools.cache
def loop(name, dtype, weights=None):
    return scores_by_loop(*in_dtype(name, dtype, weights))


@pytest.mark.filterwarnings("ignore:layers .* change the velocity by less")
@pytest.mark.parametrize("engine", ["prefix", "stacked", "loop"])
# f5-tts' forward cuts a batch to its longest mask, and cannot take a short sample alone.
@pytest.mark.parametrize(
    "name, max_samples",
    [(name, None) for name in BUILDERS]
    + [(name, 1) for name in ("f5 without padding", "diffusers DiT", "diffusers SD3")],
)
def test_every_engine_split_and_dtype(name, engine, max_samples):
    """float64 and float32 to their bounds; bfloat16 within twice the error of the bfloat16 loop, against float64."""
    for dtype, relative, absolute in ((torch.float64, 1e-10, 1e-13), (torch.float32, 1e-5, 1e-6)):
        model, inputs, _ = in_dtype(name, dtype)
        scores = attribute_layers(model, inputs, engine=engine, max_samples=max_samples).by_sample.numpy()
        np.testing.assert_allclose(scores, loop(name, torch.float64), rtol=relative, atol=absolute)
    model, inputs, _ = in_dtype(name, torch.bfloat16)
    exact = loop(name, torch.float64, torch.bfloat16)
    scores = attribute_layers(model, inputs, engine=engine, max_samples=max_samples).by_sample.numpy()
    error, of_loop = (np.sqrt(np.mean((part - exact) ** 2)) for part in (scores, loop(name, torch.bfloat16)))
    assert error <= 2 * of_loop
    slack = 3 * np.abs(loop(name, torch.bfloat16) - exact).mean(1)
    means = exact.mean(1)
    apart = [(a, b) for a in range(DEPTH) for b in range(DEPTH) if means[a] - means[b] > slack[a] + slack[b]]
    assert all(scores.mean(1)[a] > scores.mean(1)[b] for a, b in apart)
