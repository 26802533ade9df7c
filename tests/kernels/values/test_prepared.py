"""A second call of a layout launches the kernel prepared in the first: with other values, gradients, views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agrepa_fast import ops
from agrepa_fast.kernels import residual as kernels
from agrepa_fast.reference import residual as reference

NAMES = ("x", "branch", "gate", "shift", "scale", "weight", "bias", "stream_scale")
SEQUENCES, FRAMES, WIDTH = 2, 3, 24


def arguments(device: torch.device, layout: str) -> dict[str, Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    x, branch = randn(2, SEQUENCES, FRAMES, WIDTH)
    gate, shift, scale = randn(SEQUENCES, 3 * WIDTH).chunk(3, dim=1)
    weight, bias = randn(2, WIDTH)
    if layout == "columns apart":
        x, scale = (randn(*value.shape, 2)[..., 0] for value in (x, scale))
        weight = randn(WIDTH, 2)[:, 0]
    elif layout == "frames before sequences":
        x, branch = randn(2, FRAMES, SEQUENCES, WIDTH).transpose(1, 2)
    elif layout == "shift per token":
        shift = randn(SEQUENCES, FRAMES, WIDTH)
    elif layout == "scale per token":
        scale = randn(SEQUENCES, FRAMES, WIDTH)
    return dict(zip(NAMES, (x, branch, gate, shift, scale, weight, bias, randn(SEQUENCES))))


LAYOUTS = ("contiguous", "columns apart", "frames before sequences", "shift per token", "scale per token")


def test_calls_of_many_layouts_in_turn(device, monkeypatch) -> None:
    """Each layout is prepared once, for calls with and without a gradient, and no call takes another's kernel."""
    prepared = []
    prepare = kernels.prepare
    monkeypatch.setattr(kernels, "prepare", lambda *a, **k: prepared.append(a) or prepare(*a, **k))
    for turn in range(2):
        for layout in LAYOUTS:
            for eps in (1e-6, 0.5):
                inputs = arguments(device, layout)
                wide = {name: value.double() for name, value in inputs.items()}
                wanted = reference.gated_residual_norm(**wide, eps=eps)
                with torch.no_grad():
                    found = ops.gated_residual_norm(**inputs, eps=eps)
                for one, other in zip(found, wanted, strict=True):
                    torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
                gradients(inputs, wide, eps)
        assert len(prepared) == 2 * len(LAYOUTS), f"turn {turn}"


def gradients(inputs: dict[str, Tensor], wide: dict[str, Tensor], eps: float) -> None:
    results = []
    for op, values in ((ops.gated_residual_norm, inputs), (reference.gated_residual_norm, wide)):
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        x, h = op(**leaves, eps=eps)
        assert x.requires_grad, "the op is differentiated"
        results.append(torch.autograd.grad((x.square() + h.square()).sum(), list(leaves.values())))
    for name, one, other in zip(inputs, *results):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("gradient", [False, True])
def test_statistics_are_written_for_a_gradient_alone(device, monkeypatch, gradient) -> None:
    launched = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *a, **k: launched.append(a) or launch(*a, **k))
    inputs = arguments(device, "contiguous")
    inputs["shift"].requires_grad_(gradient)
    ops.gated_residual_norm(**inputs)
    with torch.no_grad():
        ops.gated_residual_norm(**inputs)
    written = [next(a for a in arguments if isinstance(a, kernels.Results)) for arguments in launched]
    assert [each.rstd is not None for each in written] == [gradient, False]
    assert [each.mean is not None for each in written] == [gradient, False]
