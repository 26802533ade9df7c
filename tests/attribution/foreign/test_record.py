"""The quick way to take a call's arguments apart gives what the general one gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from agrepa_fast.attribution.foreign import record

X, W = torch.zeros(2), nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    "value",
    [
        X,
        (X, None, 3, "a", True),
        (),
        ((), {}),
        ((X, W), {}),
        ((X,), {"a": X, "b": None}),
        ((X, (X, W)), {"a": X}),
        ((X,), {"a": [X, None]}),
        (X, {"a": X}),
        ((X,), {3: X}),
        [X, W],
        {"a": X},
        W,
        None,
    ],
)
def test_the_quick_way_is_the_general_one(value):
    paths, leaves, spec = record.flat(value)
    expected_paths, expected_leaves, expected_spec = record._flat(value)
    assert paths == expected_paths
    assert spec == expected_spec
    assert all(a is b for a, b in zip(leaves, expected_leaves, strict=True))
    assert repr(tree_unflatten(leaves, spec)) == repr(value)


def test_what_is_changed_in_a_list_of_paths_stays_there():
    record.flat((X, X))[0].append("mine")
    assert record.flat((X, X))[0] == ["[0]", "[1]"]
