"""Small models of other people's kinds, in float64, and a loop that takes one block out of its list at a time."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

WIDTH, FRAMES, SAMPLES, DEPTH = 8, 6, 3, 4
ENGINES = ["auto", "prefix", "stacked", "loop"]


class Block(nn.Module):
    """Mixes frames and channels, by the time embedding, a table of positions and an optional mask."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.frames = nn.Linear(FRAMES, FRAMES)

    def forward(self, x, te, *, table, extra=None):
        h = torch.tanh(self.mix(x) * (1 + te[:, None]) + table)
        h = self.frames(h.mT).mT
        if extra is not None:
            h = h * extra["masks"][0][..., None]
        return x + h


class Off(nn.Module):
    """A block that is switched off, whatever it is called with."""

    def forward(self, x, *args, **kwargs):
        return x


class Chain(nn.Module):
    """A plain transformer: head, blocks, and a tail that uses the time embedding."""

    def __init__(self, depth=DEPTH):
        super().__init__()
        self.head = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.tail = nn.Linear(WIDTH, 5)

    def forward(self, x, t, mask=None):
        te = torch.stack([(t * (i + 1)).cos() for i in range(WIDTH)], -1)
        # As many rows as samples (3): it must not be repeated for that.
        table = torch.linspace(-1, 1, FRAMES, dtype=x.dtype)[:, None].expand(FRAMES, WIDTH)
        extra = None if mask is None else {"masks": [mask]}
        h = self.head(x)
        for block in self.blocks:
            h = block(h, te, table=table, extra=extra)
        return self.tail(h * (1 + te[:, None]))


class InPlace(Chain):
    """Blocks that write into their input."""

    class Block(Block):
        def forward(self, x, te, *, table, extra=None):
            return x.copy_(super().forward(x, te, table=table, extra=extra))

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.__class__ = InPlace.Block


class UNetSkips(Chain):
    """Long skips: the second half adds what the first half put out."""

    def __init__(self, extra_tail=False):
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, t, mask=None):
        te = torch.stack([(t * (i + 1)).cos() for i in range(WIDTH)], -1)
        table = torch.zeros(FRAMES, WIDTH, dtype=x.dtype)
        h, skips = self.head(x), []
        for i, block in enumerate(self.blocks):
            if i >= DEPTH // 2:
                h = self.join(torch.cat([h, skips.pop()], -1))
            h = block(h, te, table=table)
            skips.append(h)
        return SimpleNamespace(sample=self.tail(h))


class LateSkip(Chain):
    """A pure chain of blocks whose tail looks back at block 1."""

    def forward(self, x, t, mask=None):
        te = t[:, None].expand(-1, WIDTH)
        h, kept = self.head(x), []
        for block in self.blocks:
            h = block(h, te, table=torch.zeros(FRAMES, WIDTH, dtype=x.dtype))
            kept.append(h)
        return (self.tail(h + (kept[1] if kept[1].shape == h.shape else 0)),)


class TwoStates(nn.Module):
    """As in joint (image, text) transformers: blocks by keyword, two states, the last one returns only one."""

    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), last

        def forward(self, hidden, context, te):
            both = torch.tanh(self.a(hidden)).mean(1, keepdim=True) + torch.tanh(self.b(context)).mean(1, keepdim=True)
            moved = hidden + both * te[:, None] + torch.sin(hidden)
            return None if self.last else context + both.square(), moved

    class Off(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.last = last

        def forward(self, hidden, context, te):
            return None if self.last else context, hidden

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(TwoStates.Block(i + 1 == DEPTH) for i in range(DEPTH))
        self.head, self.tail = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x, context, timestep):
        hidden, te = self.head(x), timestep[:, None].expand(-1, WIDTH)
        for block in self.transformer_blocks:
            context, hidden = block(hidden=hidden, context=context, te=te)
        return self.tail(hidden)


class Encoder(nn.Module):
    """PyTorch's own encoder, frames first inside, with a key padding mask [samples, frames]."""

    class Off(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return src

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.3, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=batch_first)
        self.head, self.batch_first = nn.Linear(5, WIDTH), batch_first

    def forward(self, x, t, mask):
        h = self.head(x) + t[:, None, None]
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.encoder(h, src_key_padding_mask=~mask)
        return h if self.batch_first else h.transpose(0, 1)


def build(kind, *args, dtype=torch.float64):
    model = kind(*args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def draw(dtype=torch.float64, samples=SAMPLES, masked=False):
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(samples, FRAMES, 5, generator=generator).to(dtype),
        "t": torch.rand(samples, generator=generator).to(dtype),
    }
    if masked:
        inputs["mask"] = torch.arange(FRAMES) < torch.tensor([[6], [4], [5]])[:samples]
    return inputs


@torch.no_grad()
def scores_by_loop(model, blocks, inputs, off=lambda i: Off(), mask=None):
    """[L, N]: one forward for each sample and each block taken out of its list."""
    model = copy.deepcopy(model).eval()
    blocks = model.get_submodule(blocks)

    def forward(n):
        velocity = model(**{name: value[n : n + 1] for name, value in inputs.items()})
        velocity = velocity[0] if isinstance(velocity, tuple) else getattr(velocity, "sample", velocity)
        velocity = velocity[0].double().numpy()
        return velocity if mask is None else velocity[mask[n].numpy()[: len(velocity)]]

    samples = len(next(iter(inputs.values())))
    result = np.zeros((len(blocks), samples))
    for n in range(samples):
        base = forward(n)
        for k in range(len(blocks)):
            own = blocks[k]
            blocks[k] = off(k)
            change = np.mean((forward(n) - base) ** 2)
            blocks[k] = own
            result[k, n] = np.sqrt(change + 1e-8) / (np.sqrt(np.mean(base**2) + 1e-8) + 1e-8)
    assert (result > 5e-4).all()
    return result
