"""Probes from several threads: scores as from one thread, and nothing left behind in any order of ends."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x, t)


class Encoder(nn.Module):
    """Layers that draw random numbers on the way, without an effect on the velocity; they fail where t is negative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3).layers

    def forward(self, x, t):
        for layer in self.layers:
            torch.rand(3)
            if (t < 0).any():
                raise RuntimeError("out of memory")
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def eager_switches():
    """Threads take turns as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("wrapped", [False, True])
def test_probes_of_one_model_from_several_threads(wrapped):
    model = Encoder().train()
    other = Wrapper(model) if wrapped else model
    inputs = (torch.randn(3, 5, 8), torch.rand(3))
    expected = attribute_layers(model, inputs).by_sample
    torch.manual_seed(3)
    state, start = torch.get_rng_state(), threading.Barrier(4)

    def probe(number):
        start.wait()
        for turn in range(8):
            if (number + turn) % 3 == 0:
                with pytest.raises(RuntimeError, match="out of memory"):
                    attribute_layers(model, (inputs[0], -inputs[1]))
            else:
                scores = attribute_layers(other if number % 2 else model, inputs)
                torch.testing.assert_close(scores.by_sample, expected, rtol=0, atol=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(probe, range(4)))
    assert all(module.training for module in model.modules())
    assert torch.get_rng_state().equal(state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_probes_beside_the_training_of_another_model(build, draw):
    model, inputs, trained = build(dropout=0.5).train(), draw(), Encoder().train()
    expected, ended = attribute_layers(model, inputs).by_sample, threading.Event()

    def train():
        while not ended.is_set():
            trained(torch.randn(2, 5, 8), torch.rand(2)).sum().backward()
            assert trained.layers[0].training
            assert torch.is_grad_enabled()
            trained.zero_grad()

    with ThreadPoolExecutor(3) as pool:
        training = pool.submit(train)
        try:
            probes = [pool.submit(attribute_layers, model, inputs) for _ in range(20)]
            assert all(probe.result().by_sample.equal(expected) for probe in probes)
        finally:
            ended.set()
        training.result()
    assert all(module.training for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
