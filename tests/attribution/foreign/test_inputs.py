"""Which inputs carry the samples, which frames count, and what a forward must not do."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers

from .models import FRAMES, SAMPLES, WIDTH, Block, Chain, build, draw, scores_by_loop


class Noisy(Chain):
    def forward(self, x, t, mask=None):
        return super().forward(x + 1e-3 * torch.randn_like(x), t)


class Dropping(Chain):
    def forward(self, x, t, mask=None):
        return nn.functional.dropout(super().forward(x, t), 0.1)


class HarmlessDraw(Chain):
    def forward(self, x, t, mask=None):
        torch.rand(1)
        return super().forward(x, t)


@pytest.mark.parametrize("kind", [Noisy, Dropping])
def test_a_random_forward_is_found(kind):
    with pytest.raises(ValueError, match="draws random numbers"):
        attribute_layers(build(kind), draw())


def test_drawing_without_using_is_no_fault():
    expected = attribute_layers(build(Chain), draw()).by_sample
    assert attribute_layers(build(HarmlessDraw), draw()).by_sample.equal(expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"inputs": {"x": torch.zeros(0, FRAMES, 5), "t": torch.zeros(0)}}, ValueError, "at least one sample"),
        ({"inputs": {"x": torch.zeros(2, FRAMES, 5)}}, TypeError, "do not fit Chain.forward: missing .* 't'"),
        ({"inputs": torch.zeros(2, FRAMES, 5)}, TypeError, "mapping of keyword arguments or a tuple, got Tensor"),
        ({"inputs": {"x": None, "t": 3}}, TypeError, "at least one tensor"),
        ({"branches": ("attn",)}, ValueError, "no block has a module 'attn'; the modules of blocks.0 are: mix, frames"),
        ({"blocks": [4]}, ValueError, r"0-based layers below 4, got \[4\]"),
        ({"domains": ["speech"]}, ValueError, "domains: expected 3 names, got 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        attribute_layers(**{"model": build(Chain), "inputs": draw(), **change})


class Attending(nn.Module):
    """Blocks that attend to a context shared by all samples, or to one each; with a table of positions."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, context):
            context = context if context.dim() == 3 else context.expand(len(x), -1, -1)
            return x + torch.softmax(self.q(x) @ self.k(context).mT, -1) @ context

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x, context, table=None):
        h = self.head(x)
        if table is not None:
            h = h + torch.cat([table] * (h.shape[1] // len(table)))
        for block in self.blocks:
            h = block(h, context)
        return self.tail(h)


def of_whole_batch(model, inputs):
    """[L, N]: forwards of all samples as they are given, one block's module taken out at a time."""
    model.eval()
    with torch.no_grad():
        base = model(**inputs)
        rows = []
        for block in model.blocks:
            handle = block.register_forward_hook(lambda _, args, __: args[0])
            change = (model(**inputs) - base).flatten(1).square().mean(1)
            handle.remove()
            rows.append((change + 1e-8).sqrt() / ((base.flatten(1).square().mean(1) + 1e-8).sqrt() + 1e-8))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("max_samples", [None, 1, 2])
@pytest.mark.parametrize("context, table", [((3, WIDTH), None), ((3, 4, WIDTH), (3, WIDTH)), ((3, WIDTH), (3, WIDTH))])
def test_what_has_as_many_rows_as_samples_is_not_taken_for_them(context, table, max_samples):
    """Three samples, and a context of three tokens that they share, a table of three rows, or both."""
    inputs = {"x": draw()["x"], "context": torch.randn(*context).double()}
    if table is not None:
        inputs["table"] = torch.randn(*table).double()
    model = build(Attending)
    scores = attribute_layers(model, inputs, max_samples=max_samples)
    np.testing.assert_allclose(scores.by_sample.numpy(), of_whole_batch(model, inputs), rtol=1e-9)


def test_the_first_input_need_not_carry_the_samples():
    class Late(Attending):
        def forward(self, context, x):
            return super().forward(x, context)

    inputs = {"context": torch.randn(4, WIDTH).double(), "x": draw()["x"]}
    model = build(Late)
    np.testing.assert_allclose(
        attribute_layers(model, inputs).by_sample.numpy(), of_whole_batch(model, inputs), rtol=1e-9
    )


def test_inputs_in_lists_are_taken_apart_by_sample():
    class Listed(Chain):
        def forward(self, frames, names, extra):
            t = torch.tensor([len(name) / 7 for name in names]).double()
            return list(super().forward(torch.stack(frames), t + extra["shift"]).unbind())

    inputs, lengths = draw(), [3, 5, 9]
    whole = {**inputs, "t": torch.tensor([length / 7 for length in lengths]).double()}
    model = build(Listed)
    listed = {
        "frames": list(inputs["x"]),
        "names": ["n" * length for length in lengths],
        "extra": {"shift": torch.zeros(SAMPLES).double()},
    }
    expected = scores_by_loop(build(Chain), "blocks", whole)
    for max_samples in (None, 1, 2):
        scores = attribute_layers(model, listed, max_samples=max_samples)
        np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-9)


def test_samples_in_the_second_dimension_are_found():
    class ByLayer(Attending):
        def forward(self, x, contexts):
            h = self.head(x)
            for block, context in zip(self.blocks, contexts):
                h = block(h, context)
            return self.tail(h)

    inputs = {"x": draw()["x"], "contexts": torch.randn(3, SAMPLES, 4, WIDTH).double()}
    model = build(ByLayer)
    np.testing.assert_allclose(
        attribute_layers(model, inputs).by_sample.numpy(), of_whole_batch(model, inputs), rtol=1e-9
    )


def test_batched_says_what_carries_the_samples():
    inputs = {"x": draw()["x"], "context": torch.randn(3, WIDTH).double()}
    model = build(Attending)
    expected = of_whole_batch(model, inputs)
    for batched in (["x"], {"context": False}, {"x": True, "context": False}):
        scores = attribute_layers(model, inputs, batched=batched)
        np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-9)
    with pytest.raises(ValueError, match=r"batched: the inputs have no tensor or list 'y'; they have 'x' \[3, 6, 5\]"):
        attribute_layers(model, inputs, batched=["y"])
    with pytest.raises(ValueError, match=r"depends on which samples .* batched= which of 'x' \[3, 6, 5\], 'context'"):
        attribute_layers(model, inputs, batched=["x", "context"])
    two = {**inputs, "context": torch.randn(4, 2, WIDTH).double()}
    with pytest.raises(ValueError, match=r"batched: expected one number of samples, got 'x' .*'context' \[4, 2, 8\]"):
        attribute_layers(model, two, batched=["x", "context"])


class Coupled(Chain):
    def forward(self, x, t):
        h = super().forward(x, t)
        return h / h.std()


def test_samples_that_depend_on_each_other_are_named():
    message = r"velocity of sample 0 depends on which samples run beside it \(statistics of the batch, dynamic quantis"
    with pytest.raises(ValueError, match=message):
        attribute_layers(build(Coupled), draw())
    scores = attribute_layers(build(Coupled), draw(), engine="loop", max_samples=1)
    expected = scores_by_loop(build(Coupled), "blocks", draw())
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-9)


class Masked(Chain):
    """Takes its mask by another name; None when nothing is padded, as encoders of transformers pass it on."""

    def forward(self, x, t, attention_mask):
        return super().forward(x, t, None if attention_mask.all() else attention_mask)


def test_a_mask_that_only_some_samples_need():
    """The first sample has no padding, so that the blocks of a run on it alone get no mask."""
    inputs = draw(masked=True)
    mask = inputs.pop("mask")
    inputs["attention_mask"] = mask
    assert mask[0].all()
    assert not mask.all()
    plain = {**draw(masked=True)}
    expected = scores_by_loop(build(Chain), "blocks", plain, mask=mask)
    for max_samples in (None, 1, 2):
        scores = attribute_layers(build(Masked), inputs, mask=mask, max_samples=max_samples)
        assert scores.engine == "prefix"
        np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-9)


def test_a_mask_that_is_not_used_is_named():
    inputs = draw(masked=True)
    mask = inputs.pop("mask")
    with pytest.warns(UserWarning, match="'attention_mask' may say which frames are real.*pass mask="):
        without = attribute_layers(build(Masked), {**inputs, "attention_mask": mask})

    class Padding(Chain):
        def forward(self, x, t, mask):
            return super().forward(x, t, ~mask)

    with pytest.warns(UserWarning, match="'mask' may say which frames are real"):
        inverted = attribute_layers(build(Padding), {**inputs, "mask": ~mask})
    assert torch.allclose(inverted.by_sample, without.by_sample, rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explicit = attribute_layers(build(Padding), {**inputs, "mask": ~mask}, mask=mask)
        by_name = attribute_layers(build(Chain), {**inputs, "mask": mask})
    assert torch.allclose(explicit.by_sample, by_name.by_sample, rtol=1e-9)
    assert not torch.allclose(explicit.by_sample[:, 1], without.by_sample[:, 1], rtol=1e-3)


def test_a_mask_over_channels_first_frames():
    class ChannelsFirst(Chain):
        def forward(self, x, t, mask=None):
            return super().forward(x.mT, t, mask).mT

    inputs = draw(masked=True)
    turned = {"x": inputs["x"].mT.contiguous(), "t": inputs["t"]}
    scores = attribute_layers(build(ChannelsFirst), turned, mask=inputs["mask"])
    whole = {name: inputs[name] for name in ("x", "t")}
    expected = scores_by_loop(build(Chain), "blocks", whole, mask=inputs["mask"])
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(SAMPLES, FRAMES), r"mask: expected a bool tensor .*got torch\.float32 \[3, 6\]"),
        (torch.ones(2, FRAMES, dtype=torch.bool), r"mask: expected \[3, frames\] for a velocity \[3, 6, 5\], got"),
        (torch.zeros(SAMPLES, FRAMES, dtype=torch.bool), "sample 0 has no valid frame"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises((TypeError, ValueError), match=message):
        attribute_layers(build(Chain), draw(), mask=mask)


class Keeping(Chain):
    """A staircase cannot narrow the list that its blocks get: as many parts as samples."""

    class Block(Block):
        def forward(self, x, te, *, table, extra=None):
            return super().forward(x, torch.cat(te), table=table)

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.__class__ = self.Block

    def forward(self, x, t):
        h = self.head(x)
        te = [part[None, None].cos().expand(1, WIDTH) for part in t]
        for block in self.blocks:
            h = block(h, te, table=torch.zeros(FRAMES, WIDTH).double())
        return SimpleNamespace(sample=self.tail(h))


def test_what_fails_on_the_staircase_runs_dense_and_says_so():
    with pytest.warns(UserWarning, match=r"engine 'prefix' fails \(NotAStaircase: blocks\.0.*'stacked' runs instead"):
        scores = attribute_layers(build(Keeping), draw())
    assert (scores.engine, scores.block_evaluations) == ("stacked", None)
    np.testing.assert_allclose(scores.by_sample.numpy(), of_whole_batch_of_samples(build(Keeping)), rtol=1e-9)
    with pytest.raises(ValueError, match=r"blocks\.0: is called otherwise than with one stream"):
        attribute_layers(build(Keeping), draw(), engine="prefix")


def of_whole_batch_of_samples(model):
    inner = model.forward
    model.forward = lambda **inputs: inner(**inputs).sample
    return of_whole_batch(model, draw())


class Tokens(nn.Module):
    """A model of tokens under a floating condition, which only the last block sees."""

    def __init__(self):
        super().__init__()
        self.embed, self.tail = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)
        )

    def forward(self, ids, condition):
        x = self.embed(ids)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.tail(self.blocks[-1](x + condition[:, None]))


def test_tokens_that_come_before_a_condition_are_the_state():
    """Blocks that the condition does not reach were left out without a word."""
    torch.manual_seed(0)
    model, ids = Tokens().double().eval(), torch.randint(0, 9, (SAMPLES, FRAMES))
    inputs = {"ids": ids, "condition": torch.randn(SAMPLES, WIDTH).double()}
    scores = attribute_layers(model, inputs)
    assert scores.names == ("blocks.0", "blocks.1", "blocks.2")
    np.testing.assert_allclose(scores.by_sample.numpy(), scores_by_loop(model, "blocks", inputs), rtol=1e-9)
