"""Packed attention on the CPU: xformers' mask with its attention written out, against SDPA on the padded batch."""

from __future__ import annotations

import pytest
import torch
import xformers.ops

from agrepa_fast import DiT, DiTConfig
from agrepa_fast.errors import UserError
from agrepa_fast.models.packed import check
from agrepa_fast.training.trainer import Trainer

LENGTHS = [7, 12, 1]


@pytest.fixture
def written_out(monkeypatch):
    """xformers' kernels need a GPU; its masks and its layout [1, N, H, d] do not."""

    def attend(q, k, v, attn_bias, p):
        assert p == 0
        assert isinstance(attn_bias, xformers.ops.fmha.attn_bias.BlockDiagonalMask)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        bias = attn_bias.materialize((q.shape[1], k.shape[1])).to(scores.dtype)
        return torch.einsum("bhij,bjhd->bihd", (scores + bias).softmax(-1), v)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", attend)


def test_packed_attention_is_padded_attention_on_the_valid_frames(written_out):
    torch.manual_seed(0)
    model = DiT(DiTConfig(depth=2, width=16, heads=2, mels=5, cond=3, dropout=0.0, max_frames=16)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    x, cond, t = torch.randn(3, 12, 5).double(), torch.randn(3, 12, 3).double(), torch.rand(3).double()
    results = []
    for packed in (False, True):
        model.packed = packed
        model.zero_grad()
        velocity = model(x, t, cond, mask)
        velocity[mask].square().sum().backward()
        results.append((velocity[mask].detach(), [p.grad.clone() for p in model.parameters()]))
    (padded, padded_grads), (packed_, packed_grads) = results
    torch.testing.assert_close(packed_, padded, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(packed_grads, padded_grads, rtol=1e-8, atol=1e-8)
    # One frame alone attends to itself: another sample's frames must not reach it.
    x[0] += 1
    assert torch.equal(model(x, t, cond, mask)[2, 0], velocity.detach()[2, 0])


def test_without_a_gpu_it_is_refused(tmp_path):
    from agrepa_fast.training.config import load_config

    assert check(torch.device("cpu")) == "xformers' attention needs a CUDA device, this is cpu"
    with pytest.raises(UserError, match=r"train\.engine: expected auto or eager, as model.attention is xformers"):
        load_config("demo", ["model.attention=xformers", "train.engine=compile"])
    config = load_config("demo", ["model.attention=xformers", "train.device=cpu", f"train.out={tmp_path}"])
    with pytest.raises(UserError, match=r"model\.attention: xformers' attention needs a CUDA device"):
        Trainer(config, tmp_path)
