"""The code of docs/ops/recipe.md, as printed there: blocks before and after give the same outputs and gradients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from agrepa_fast import ops

PAGE = Path(__file__).parents[3] / "docs" / "ops" / "recipe.md"
WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, frames, width = x.shape
        q, k, v = self.qkv(x).view(batch, frames, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, frames, width))


class Mlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


@pytest.fixture(scope="module")
def page() -> dict:
    """What the page defines."""
    names = {"nn": nn, "F": F, "ops": ops, "Attention": Attention, "Mlp": Mlp}
    names["modulate"] = lambda x, shift, scale: x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(code, names)
    return names


def compare(before, after, modules, device) -> None:
    """Outputs and the gradients of input, condition and every parameter."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, WIDTH, device=device, requires_grad=True)
    c = torch.randn(3, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(3, 5, WIDTH, device=device)
    leaves = [x, c, *(p for module in modules for p in module.parameters())]
    one, other = before(x, c), after(x, c)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert (one - x).abs().max() > 0.1
    for a, b in zip(
        torch.autograd.grad((one * weight).sum(), leaves), torch.autograd.grad((other * weight).sum(), leaves)
    ):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DiTBlock", "F5Block"])
def test_one_block(page, device, name) -> None:
    torch.manual_seed(1)
    before = page[name](WIDTH, HEADS).to(device)
    after = page[f"Fused{name}"](WIDTH, HEADS).to(device)
    after.load_state_dict(before.state_dict())
    after.__dict__["_modules"] = before._modules  # the very same parameters
    compare(before, after, [before], device)


def test_across_blocks(page, device) -> None:
    torch.manual_seed(1)
    blocks = nn.ModuleList(page["DiTBlock"](WIDTH, HEADS) for _ in range(3)).to(device)

    def one_by_one(x, c):
        for block in blocks:
            x = block(x, c)
        return x

    compare(one_by_one, lambda x, c: page["run_blocks"](blocks, x, c), [blocks], device)
