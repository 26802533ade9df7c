"""What the models and `probe_inputs` say about arguments of the wrong kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import agrepa_fast as ag

SIZES = {"depth": 2, "width": 16, "heads": 2, "mels": 5, "cond": 3, "dropout": 0.0}
X, T, COND = torch.randn(2, 6, 5), torch.rand(2), torch.randn(2, 6, 3)


@pytest.mark.parametrize("name", ["depth", "width", "heads", "mels", "cond", "ff_ratio", "max_frames"])
@pytest.mark.parametrize("value", [2.0, True, "2", None])
def test_sizes_are_integers(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected an integer, got {value!r}$"):
        ag.DiTConfig(**SIZES | {name: value})


def test_a_network_of_numpys_integers():
    model = ag.DiT(
        ag.DiTConfig(**{name: np.int64(value) if name != "dropout" else value for name, value in SIZES.items()})
    )
    velocity, hidden = model(X, T, COND, hidden_layers=np.array([0, 1]))
    assert (velocity.shape, list(hidden)) == (X.shape, [0, 1])
    with pytest.raises(TypeError, match=r"^config: expected a DiTConfig, got dict$"):
        ag.DiT(SIZES)


@pytest.mark.parametrize(
    ("name", "value"), [("x_t", [1.0]), ("t", 0.5), ("cond", X.numpy()), ("mask", True), ("t", None)]
)
def test_inputs_are_tensors(name, value):
    model = ag.DiT(ag.DiTConfig(**SIZES))
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got {type(value).__name__}$"):
        model(**{"x_t": X, "t": T, "cond": COND} | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [1.0]}, r"x: expected non-empty floating \[batch, ...\], got list"),
        ({"x": X.long()}, r"x: expected non-empty floating \[batch, ...\], got torch.int64"),
        ({"x": X[:0]}, r"x: expected non-empty floating \[batch, ...\], got torch.float32 \[0, 6, 5\]"),
        ({"t_grid": 0.5}, r"t_grid: expected values in \[0, 1\], got 0.5"),
        ({"t_grid": "0.5"}, r"t_grid: expected values in \[0, 1\], got '0.5'"),
        ({"cond": torch.randn(3, 6, 2)}, r"cond: expected a tensor of x's 2 samples, got \[3, 6, 2\]"),
        ({"mask": [True, True]}, r"mask: expected a tensor of x's 2 samples, got list"),
        ({"generator": 0}, r"process, generator: .* got Process and int"),
        ({"process": "vp-cosine"}, r"process, generator: .* got str and NoneType"),
        ({"names": ["x"]}, r"names, extra: expected mappings, got list and NoneType"),
        ({"sigma": "1"}, r"sigma: expected a standard deviation above 0, got '1'"),
    ],
)
def test_probe_inputs(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ag.probe_inputs(**{"x": X, "cond": None, "mask": None, "t_grid": (0.1, 0.5)} | changes)
