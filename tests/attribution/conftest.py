"""Small networks and batches for the probe's tests: x_t [3, 9, 5], t [3], cond [3, 9, 3], mask [3, 9]."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import DiT, DiTConfig

DEPTH, WIDTH, HEADS, MELS, COND, BATCH, FRAMES = 3, 16, 2, 5, 3, 3, 9


@pytest.fixture
def build():
    return build_model


@pytest.fixture
def draw():
    return draw_inputs


def build_model(dtype=torch.float32, cond=COND, dropout=0.0, depth=DEPTH, seed=0) -> DiT:
    """A network as after some training: every parameter random, so that no branch and no gate is zero."""
    config = DiTConfig(depth, WIDTH, HEADS, MELS, cond, ff_ratio=2, dropout=dropout, max_frames=16)
    model = DiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def draw_inputs(dtype=torch.float32, cond=COND, masked=True, batch=BATCH) -> dict[str, torch.Tensor]:
    """A batch; with a mask, its samples have 9, 6 and (with a hole) 4 valid frames and rubbish in the padding."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x_t": torch.randn(batch, FRAMES, MELS, generator=generator),
        "t": torch.tensor([0.1, 0.5, 0.9])[:batch],
    }
    if cond:
        inputs["cond"] = torch.randn(batch, FRAMES, cond, generator=generator)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    if masked:
        inputs["mask"] = torch.arange(FRAMES) < torch.tensor([[9], [6], [5]])[:batch]
        inputs["mask"][-1, 2] = False
        inputs["x_t"][~inputs["mask"]] = 37.0
    return inputs
