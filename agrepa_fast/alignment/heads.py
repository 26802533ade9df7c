"""Alignment heads: from a hidden state to a teacher's width. The last Linear is fused with the loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops


class MLPHead(nn.Module):
    """Linear D to D, GELU, Linear D to teacher width (AG-REPA, arXiv 2603.01006)."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, teacher_width)

    def loss(self, x: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """1 - cos(head(x), target) per row: x [..., D], target [..., W], mask [...] -> [...]."""
        inner = F.gelu(self.hidden(x))
        return ops.projection_cosine_loss(
            inner, self.output.weight, self.output.bias, target, mask=mask, reduction="none"
        )
