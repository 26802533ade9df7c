"""Alignment heads: from a normalised hidden state [..., D] to a teacher's width [..., W].

One at a time (`loss`, the last Linear fused with the cosine), or many of one kind at once: as batched GEMMs
(`grouped`), or on a CPU one after the other (`one_by_one`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops


class Head(nn.Module):
    """Linears with one activation between them; a subclass names its layers."""

    activation: Callable[[Tensor], Tensor] = staticmethod(F.gelu)

    def linears(self) -> list[nn.Linear]:
        """The Linears in order: the children."""
        return [child for child in self.children() if isinstance(child, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., W]."""
        *inner, last = self.linears()
        for linear in inner:
            x = self.activation(linear(x))
        return last(x)

    def loss(self, x: Tensor, target: Tensor, mask: Tensor | None, reduction: str = "mean") -> Tensor:
        """1 - cos(head(x), target), by default its mean over the rows that count; `forward`'s output is not kept.

        x [..., D], target [..., W], mask [...] -> [] or, with reduction "none", [...]."""
        *inner, last = self.linears()
        for linear in inner:
            x = self.activation(linear(x))
        return ops.projection_cosine_loss(x, last.weight, last.bias, target, mask=mask, reduction=reduction)


class MLPHead(Head):
    """Linear D to D, GELU, Linear D to teacher width (AG-REPA, arXiv 2603.01006)."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, teacher_width)


class REPAHead(Head):
    """Linear, SiLU, Linear, SiLU, Linear with 2048 inner channels (REPA, arXiv 2410.06940)."""

    activation = staticmethod(F.silu)

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2048)
        self.second = nn.Linear(2048, 2048)
        self.output = nn.Linear(2048, teacher_width)


class LinearHead(Head):
    """One Linear; the loss has normalised what enters it, so this is LayerNorm + Linear."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, teacher_width)


class LowRankHead(Head):
    """Linear D to 64, without activation, Linear 64 to teacher width."""

    activation = nn.Identity()

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, 64, bias=False)
        self.output = nn.Linear(64, teacher_width)


class ConvHead(nn.Module):
    """A convolution over time, kernel 3 (iREPA): only frame by frame."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, teacher_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D], zero where a frame is padding, -> [B, T, W]."""
        return self.conv(x.transpose(1, 2)).transpose(1, 2)

    def loss(self, x: Tensor, target: Tensor, mask: Tensor | None, reduction: str = "mean") -> Tensor:
        """As `Head.loss`: x [B, T, D], target [B, T, W]."""
        return ops.cosine_loss(self(x), target, mask=mask, reduction=reduction)


HEADS: dict[str, type[Head] | type[ConvHead]] = {
    "mlp": MLPHead,
    "repa": REPAHead,
    "linear": LinearHead,
    "low-rank": LowRankHead,
    "conv": ConvHead,
}


def grouped(heads: Sequence[Head], x: Tensor) -> list[tuple[list[int], Tensor]]:
    """Each head on its own rows: G heads of one kind, x [G, B, D] -> (which heads, [their number, B, W]) by width W.

    A batched GEMM per Linear, the last one once for each teacher width. The weights are stacked on the way: the
    heads stay modules of their own, in the state dict and in the optimizer."""
    *stages, last = zip(*(head.linears() for head in heads))
    for linears in stages:
        x = heads[0].activation(_batched(linears, x))
    outputs = []
    for width in dict.fromkeys(linear.out_features for linear in last):
        members = [i for i, linear in enumerate(last) if linear.out_features == width]
        rows = x if len(members) == len(last) else torch.stack([x[i] for i in members])
        outputs.append((members, _batched([last[i] for i in members], rows)))
    return outputs


def one_by_one(heads: Sequence[Head], x: Tensor) -> list[tuple[list[int], Tensor]]:
    """As `grouped`, a call for each head and no weight stacked: on a CPU the copies cost more than the calls."""
    widths = [head.linears()[-1].out_features for head in heads]
    outputs = []
    for width in dict.fromkeys(widths):
        members = [i for i, other in enumerate(widths) if other == width]
        outputs.append((members, torch.stack([heads[i](x[i]) for i in members])))
    return outputs


def _batched(linears: Sequence[nn.Linear], x: Tensor) -> Tensor:
    weight = torch.stack([linear.weight for linear in linears]).transpose(1, 2)
    if linears[0].bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(torch.stack([linear.bias for linear in linears]).unsqueeze(1), x, weight)
