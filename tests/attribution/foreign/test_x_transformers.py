"""Residual connections of x-transformers that are modules (gates, several streams): scores equal a loop of hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import x_transformers

from agrepa_fast import attribute_layers


def zeros(module, args, kwargs, result):
    return (torch.zeros_like(result[0]), *result[1:]) if isinstance(result, tuple) else torch.zeros_like(result)


def residual(module, args, kwargs, result):
    """GRUGating(branch, residual)"""
    return args[1]


@pytest.mark.parametrize("samples", [2, 6])  # 6 frames, too
@pytest.mark.parametrize(
    "option, off",
    [({"gate_residual": True}, {"1": zeros, "2": residual}), ({"num_residual_streams": 2}, {"1": zeros})],
)
@pytest.mark.filterwarnings("ignore:Encoder")  # the streams' connections are named
def test_residual_connections_that_are_modules(option, off, samples):
    torch.manual_seed(0)
    model = x_transformers.Encoder(dim=8, depth=2, heads=2, attn_dim_head=4, **option).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(samples, 6, 8).double()
    scores = attribute_layers(model, (x,))
    assert scores.names == tuple(f"layers.{i}.{part}" for i in range(4) for part in off)
    with torch.no_grad():
        base = model(x)
        for name, row in zip(scores.names, scores.by_sample.numpy()):
            hook = model.get_submodule(name).register_forward_hook(off[name[-1]], with_kwargs=True)
            changed = model(x)
            hook.remove()
            change, energy = (((v.square().mean((1, 2)) + 1e-8).sqrt()).numpy() for v in (changed - base, base))
            np.testing.assert_allclose(row, change / (energy + 1e-8), rtol=1e-9, err_msg=name)
