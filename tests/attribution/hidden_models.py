"""Small models with blocks of several forms, and what forward hooks see of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, FRAMES, SAMPLES, DEPTH = 8, 6, 3, 4
BACKEND = "eager"  # what Dynamo traces is the question here, not what a compiler makes of it


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, te):
        return hidden + torch.tanh(self.mix(hidden) + te[:, None, None])


class Plain(nn.Module):
    """Blocks of one state; `recompute` checkpoints them, `reentrant` in PyTorch's older way."""

    block = Block
    recompute = reentrant = False

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(DEPTH))
        self.tail = nn.Linear(WIDTH, 5)

    def forward(self, x, t):
        x = self.head(x)
        for block in self.blocks:
            x = checkpoint(block, x, t, use_reentrant=self.reentrant) if self.recompute else block(x, t)
        return self.tail(x)


class InPlaceBlock(Block):
    def forward(self, hidden, te):
        hidden += torch.tanh(self.mix(hidden.clone()) + te[:, None, None])
        return hidden.view_as(hidden)


class InPlace(Plain):
    block = InPlaceBlock


class Joint(nn.Module):
    """Two states, as SD3's blocks: the last one returns only the second."""

    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), last

        def forward(self, hidden, text, te=None):
            mixed = torch.tanh(self.a(hidden) + te[:, None, None]) + self.b(text).mean(1, keepdim=True)
            return None if self.last else text + self.b(text), hidden + mixed

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(i == DEPTH - 1) for i in range(DEPTH))
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t):
        text = x[:, :2].cos()
        for block in self.blocks:
            text, x = block(x, text=text, te=t)
        return self.tail(x)


def made(kind, **attributes):
    torch.manual_seed(0)
    model = kind()
    for name, value in attributes.items():
        setattr(model, name, value)
    size = WIDTH if kind is Joint else 5
    return model, (torch.randn(SAMPLES, FRAMES, size), torch.rand(SAMPLES))


def hooked(model, inputs, layers, pick=lambda output: output):
    """{layer: what the block returned}, by forward hooks, with the velocity."""
    found = {}
    handles = [
        model.blocks[layer].register_forward_hook(
            lambda _m, _a, output, layer=layer: found.__setitem__(layer, pick(output).clone())
        )
        for layer in layers
    ]
    velocity = model(*inputs)
    for handle in handles:
        handle.remove()
    return velocity, found


def same(states, expected):
    assert list(states) == list(expected)
    for layer, state in states.items():
        torch.testing.assert_close(state, expected[layer], rtol=0, atol=0)
