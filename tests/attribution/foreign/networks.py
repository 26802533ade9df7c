"""Networks whose forwards run their blocks in different ways, for `test_find`."""

from __future__ import annotations

import torch
from torch import nn

from .models import FRAMES, WIDTH


class Plain(nn.Module):
    """x + f(x, te), in any number of dimensions."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, te=None):
        return x + self.out(torch.tanh(self.mix(x)))


class Base(nn.Module):
    """Head and tail; the forward between them is `body`."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)
        self.build()

    def forward(self, x, t):
        return self.tail(self.body(self.head(x) + t[:, None, None]))


class Concatenated(Base):
    """As FLUX: blocks of two streams, then the streams as one."""

    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Plain(), Plain()

        def forward(self, text, image):
            both = torch.cat([text, image], 1).mean(1, keepdim=True)
            return self.a(text) + both.sin(), self.b(image) + both

    def build(self):
        self.double_stream, self.singles = nn.ModuleList(self.Joint() for _ in range(2)), nn.ModuleList()
        self.singles.extend(Plain() for _ in range(3))
        self.text = nn.Parameter(torch.zeros(4, WIDTH))

    def body(self, h):
        text = self.text.expand(len(h), -1, -1)
        for block in self.double_stream:
            text, h = block(text, h)
        both = torch.cat([text, h], 1)
        for block in self.singles:
            both = block(both)
        return both[:, text.shape[1] :]


class Interleaved(Base):
    """As Latte: blocks over frames and blocks over channels in turn, with a change of layout between them."""

    def build(self):
        self.spatial = nn.ModuleList(Plain() for _ in range(2))
        self.temporal = nn.ModuleList(Plain(FRAMES // 2) for _ in range(2))

    def body(self, h):
        n = h.shape[0]
        for a, b in zip(self.spatial, self.temporal):
            h = a(h.reshape(n * 2, FRAMES // 2, WIDTH))
            h = b(h.mT).mT.reshape(n, FRAMES, WIDTH)
        return h


class TakenApart(Base):
    """As F5-TTS's UNetT: a layer is a list that forward iterates, with a skip to the second half."""

    def build(self):
        self.layers = nn.ModuleList()
        for i in range(4):
            join = nn.Linear(2 * WIDTH, WIDTH) if i > 1 else None
            parts = [join, nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), Half()]
            self.layers.append(nn.ModuleList(parts))

    def body(self, h):
        kept = []
        for i, (join, norm, mix, half) in enumerate(self.layers):
            if i < 2:
                kept.append(h)
            else:
                h = join(torch.cat([h, kept.pop()], -1))
            h = mix(norm(h)) + h
            h = half(h) + h
        return h


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(x).sin()


class Normed(TakenApart):
    """The same without skips and with a norm behind each sum."""

    def build(self):
        parts = ([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.LayerNorm(WIDTH)] for _ in range(3))
        self.layers = nn.ModuleList(map(nn.ModuleList, parts))

    def body(self, h):
        for mix, norm in self.layers:
            h = norm(h + mix(h))
        return h


class AddedOutside(Base):
    """x = x + block(x), as in much research code."""

    def build(self):
        self.mixers = nn.ModuleList(Half() for _ in range(4))

    def body(self, h):
        for mixer in self.mixers:
            h = h + 0.5 * mixer(h)
        return h


class Unrolled(Base):
    """The forward calls the parts of its blocks, never the blocks."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Half(), Half()

    def build(self):
        self.blocks = nn.ModuleList(self.Parts() for _ in range(3))

    def body(self, h):
        for block in self.blocks:
            h = h + block.attn(block.norm(h))
            h = h + block.mlp(h)
        return h


class AroundTheMiddle(Base):
    """As U-ViT: lists before and after a single block of their class, and a stage of shape of its own."""

    def build(self):
        self.in_blocks = nn.ModuleList([Plain(), Plain()])
        self.mid_block = Plain()
        self.out_blocks = nn.ModuleList([Plain(), Plain()])

    def body(self, h):
        kept = []
        for block in self.in_blocks:
            h = block(h)
            kept.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h + kept.pop())
        return h


class InStages(Base):
    """As CosyVoice: a stage is a list of a convolution, a list of blocks and a change of shape."""

    def build(self):
        def stage(width, after):
            return nn.ModuleList([nn.Linear(width, width), nn.ModuleList([Plain(width), Plain(width)]), after])

        down, up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.stages = nn.ModuleList([stage(WIDTH, down), stage(2 * WIDTH, up)])

    def body(self, h):
        for first, blocks, after in self.stages:
            h = first(h)
            for block in blocks:
                h = block(h)
            h = after(h)
        return h
