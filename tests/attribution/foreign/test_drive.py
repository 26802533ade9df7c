"""The engines on other people's models, against a loop that takes one block out of its list at a time."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers

from .models import (
    DEPTH,
    ENGINES,
    FRAMES,
    SAMPLES,
    WIDTH,
    Chain,
    Encoder,
    InPlace,
    LateSkip,
    TwoStates,
    UNetSkips,
    build,
    draw,
    scores_by_loop,
)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Chain, InPlace])
def test_a_chain_equals_the_loop(kind, engine, samples):
    model, inputs = build(kind), draw(samples=samples)
    scores = attribute_layers(model, inputs, engine=engine)
    expected = scores_by_loop(build(Chain), "blocks", inputs)
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-10)
    assert scores.t.tolist() == pytest.approx(inputs["t"].tolist())
    assert scores.block_evaluations == (DEPTH * (DEPTH + 1) / 2 if engine in ("auto", "prefix") else None)


@functools.cache
def loop_in(kind, dtype, weights):
    model, inputs = build(kind, dtype=weights).to(dtype), draw(weights)
    return scores_by_loop(model, "blocks", {name: value.to(dtype) for name, value in inputs.items()})


@pytest.mark.filterwarnings("ignore:layers .* change the velocity by less")
@pytest.mark.parametrize("max_samples", [None, 1, 2])
@pytest.mark.parametrize("kind, engine", [(kind, name) for kind in (Chain, UNetSkips) for name in ENGINES[1:]])
def test_every_engine_split_and_dtype(kind, engine, max_samples):
    """float64 and float32 to their bounds; bfloat16 within twice the error of the bfloat16 loop, against float64."""

    def scores(dtype):
        return attribute_layers(
            build(kind, dtype=dtype), draw(dtype), engine=engine, max_samples=max_samples
        ).by_sample.numpy()

    wide = torch.float64
    np.testing.assert_allclose(scores(wide), loop_in(kind, wide, wide), rtol=1e-10)
    np.testing.assert_allclose(scores(torch.float32), loop_in(kind, wide, torch.float32), rtol=1e-5, atol=1e-6)
    exact, narrow = loop_in(kind, wide, torch.bfloat16), loop_in(kind, torch.bfloat16, torch.bfloat16)
    error, of_loop = (np.sqrt(np.mean((part - exact) ** 2)) for part in (scores(torch.bfloat16), narrow))
    assert error <= 2 * of_loop


def test_single_precision_and_nested_masks():
    inputs = draw(torch.float32, masked=True)
    scores = attribute_layers(build(Chain, dtype=torch.float32), (inputs["x"], inputs["t"], inputs["mask"]))
    wide = draw(masked=True)
    expected = scores_by_loop(build(Chain), "blocks", wide, mask=wide["mask"])
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-5)


def test_what_has_as_many_rows_as_there_are_samples_is_not_repeated():
    """The table is [frames, width], and here there are as many samples as frames."""
    inputs = draw(samples=FRAMES)
    scores = attribute_layers(build(Chain), inputs, engine="prefix")
    np.testing.assert_allclose(scores.by_sample.numpy(), scores_by_loop(build(Chain), "blocks", inputs), rtol=1e-10)


@pytest.mark.parametrize("blocks, max_samples", [([0, 2], None), ([3], 2), (None, 1), ([1, 0], 2)])
def test_subsets_and_parts(blocks, max_samples):
    inputs = draw()
    scores = attribute_layers(build(Chain), inputs, blocks, max_samples=max_samples)
    chosen = sorted(range(DEPTH) if blocks is None else blocks)
    assert scores.layers == tuple(chosen)
    np.testing.assert_allclose(
        scores.by_sample.numpy(), scores_by_loop(build(Chain), "blocks", inputs)[chosen], rtol=1e-10
    )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [UNetSkips, LateSkip])
def test_long_skips_share_prefixes_too(kind, engine, samples):
    inputs = draw(samples=samples)
    scores = attribute_layers(build(kind), inputs, engine=engine)
    np.testing.assert_allclose(scores.by_sample.numpy(), scores_by_loop(build(kind), "blocks", inputs), rtol=1e-10)
    assert scores.block_evaluations == (DEPTH * (DEPTH + 1) / 2 if engine in ("auto", "prefix") else None)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_states_by_keyword(engine):
    inputs = {"x": draw()["x"], "context": torch.randn(SAMPLES, 2, WIDTH).double(), "timestep": draw()["t"]}
    model = build(TwoStates)
    expected = scores_by_loop(model, "transformer_blocks", inputs, lambda i: TwoStates.Off(i + 1 == DEPTH))
    np.testing.assert_allclose(attribute_layers(model, inputs, engine=engine).by_sample.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_transformer_encoder(engine, batch_first):
    """Also with the frames before the samples inside, and with dropout on while it trains."""
    model, inputs = build(Encoder, batch_first).train(), draw(masked=True)
    scores = attribute_layers(model, inputs, engine=engine)

    def off(layer):
        return Encoder.Off(WIDTH, 2, 16, batch_first=batch_first).double()

    expected = scores_by_loop(model, "encoder.layers", inputs, off, inputs["mask"])
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-10)
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_evaluations_as_counted_by_hooks():
    """The staircase; beside it a run of one sample, one of four (one of them for the noise), and an ablation."""
    model, rows = build(Chain), [0] * DEPTH
    for i, block in enumerate(model.blocks):
        block.mix.register_forward_hook(lambda _, args, __, i=i: rows.__setitem__(i, rows[i] + args[0].shape[0]))
    attribute_layers(model, draw())
    assert rows == [1 + 4 + 1 + (i + 1) * SAMPLES for i in range(DEPTH)]


def test_a_velocity_that_is_not_finite_names_the_layer():
    model = build(Chain)
    with torch.no_grad():
        model.head.bias.fill_(1e200)  # finite only because block 0 brings it down again

    class Rescue(nn.Module):
        def forward(self, x, te, *, table, extra=None):
            return x * 1e-200

    class Grow(nn.Module):
        def forward(self, x, te, *, table, extra=None):
            return x + torch.where(x.abs() > 1e100, x * 1e200, 0)

    model.blocks[0], model.blocks[1] = Rescue(), Grow()
    with pytest.raises(ValueError, match="velocity of sample 0 without layer 0 is not finite"):
        attribute_layers(model, draw())
    with torch.no_grad():
        model.tail.bias[0] = torch.nan
    with pytest.raises(ValueError, match="baseline velocity of sample 0 is not finite"):
        attribute_layers(model, draw())
