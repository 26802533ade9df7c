"""Passes of a few samples, so that a CPU's cache holds all streams: the scores are those of one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agrepa_fast import attribute_layers
from agrepa_fast.attribution.foreign import drive, shell

from .models import DEPTH, Chain, Off, build, draw, scores_by_loop


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr(shell, "CACHE_BYTES", 1)


def batches(model, name="head"):
    """The batch sizes of the calls of a module, filled as it is called."""
    sizes = []
    model.get_submodule(name).register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    return sizes


class Trimmed(Chain):
    """Cuts a batch to its longest sample, so that what a sample gives depends on the lengths of the others."""

    def forward(self, x, t, mask):
        longest = int(mask.sum(1).max())
        h = self.head(x[:, :longest])
        h = torch.nn.functional.pad(h, (0, 0, 0, x.shape[1] - longest))
        for block in self.blocks:
            h = block(h, t[:, None] * torch.ones(h.shape[-1]).double(), table=torch.zeros(()).double())
        return self.tail(h) * (torch.arange(x.shape[1]) < longest)[:, None]


def test_one_sample_at_a_time(small_cache):
    model = build(Chain)
    expected = scores_by_loop(model, "blocks", draw(), lambda _: Off())
    sizes = batches(model, "blocks.0.mix")
    scores = attribute_layers(model, draw())
    assert sizes[-3:] == [1, 1, 1]
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-10)


def test_a_batch_that_is_cut_to_its_longest_sample_runs_as_one(small_cache):
    model, inputs = build(Trimmed), draw(masked=True)
    inputs["mask"][:] = torch.arange(inputs["mask"].shape[1]) < torch.tensor([[6], [6], [3]])
    together = attribute_layers(model, inputs, engine="loop")
    alone = attribute_layers(model, inputs, engine="loop", max_samples=1)
    assert not np.allclose(together.by_sample[:, 2], alone.by_sample[:, 2], rtol=1e-3)
    scores = attribute_layers(model, inputs)
    assert scores.engine == "prefix"
    np.testing.assert_allclose(scores.by_sample.numpy(), together.by_sample.numpy(), rtol=1e-10)


def test_an_engine_that_fails_later_scores_none_of_the_samples(monkeypatch):
    """The passes before may be as wrong: they are measured again."""
    model, inputs = build(Chain), draw()
    expected = scores_by_loop(model, "blocks", inputs, lambda _: Off())
    run = drive._Streams.run

    def wrong(self):
        velocity = run(self)
        return velocity * 2 if self.shared else velocity

    def unchecked_first(self, plan, rows, velocity):
        if self.engine == "prefix" and 1 in rows.tolist():
            raise drive.NotAStaircase("wrong")

    monkeypatch.setattr(drive._Streams, "run", wrong)
    monkeypatch.setattr(drive.BlockModel, "_check", unchecked_first)
    with pytest.warns(UserWarning, match="'stacked' runs instead"):
        scores = attribute_layers(model, inputs, max_samples=1)
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-10)
    assert scores.engine == "stacked"
    assert scores.by_sample.shape == (DEPTH, 3)
