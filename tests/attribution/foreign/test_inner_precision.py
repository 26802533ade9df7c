"""Forwards that compute in another precision than that of their weights and results, as accelerate's bf16 does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import agrepa_fast as ag


class Inner(nn.Module):
    """Adds to the state; beside other samples by 1 % more, as much as kernels in bfloat16 may differ by batch size."""

    def __init__(self, dtype):
        super().__init__()
        self.linear, self.dtype = nn.Linear(8, 8), dtype

    def forward(self, x):
        more = 0.01 if len(x) > 1 else 0.0
        return (x + (1 + more) * self.linear(x)).to(self.dtype)


class Network(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Inner(dtype) for _ in range(3))

    def forward(self, x, t):
        x = x + t[:, None, None]
        for block in self.blocks:
            x = block(x.float())
        return x.float()


def test_the_precision_inside_a_forward_is_what_counts():
    inputs = {"x": torch.randn(4, 5, 8), "t": torch.rand(4)}
    assert len(ag.attribute_layers(Network(torch.bfloat16), inputs).mean) == 3
    with pytest.raises(ValueError, match="depends on which samples run beside it"):
        ag.attribute_layers(Network(torch.float32), inputs)
