"""Networks with unusual forwards: scores equal a loop's over replaced blocks, or a refusal says why in one line."""

from __future__ import annotations

import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers

from . import unusual_order, unusual_writes  # noqa: F401 - these modules and unusual_sums add to CASES
from .entry import Draw, Entry, randomise
from .unusual import CASES, Case, N, T
from .unusual_sums import BlocksCalledByAnotherName


def made(case: Case) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    draw = Draw()
    torch.manual_seed(0)
    return randomise(case.network()), {"x": draw(N, T, 4), "c": draw(N, T, 4), "t": torch.tensor([0.3, 0.8]).double()}


def loop(case: Case, model: nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    method = "step" if case.network is BlocksCalledByAnotherName else "forward"

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs)

    base, rows = velocity(), []
    for name in Entry("", lambda: (model, inputs), case.units).units:
        module = model.get_submodule(name)
        setattr(module, method, partial(case.off, module))
        changed = velocity()
        delattr(module, method)
        change, energy = ((v.square().mean((1, 2)) + 1e-8).sqrt() for v in (changed - base, base))
        rows.append((change / (energy + 1e-8)).numpy())
    return np.array(rows)


@pytest.mark.parametrize("case", [c for c in CASES if c.units], ids=lambda case: case.network.__name__)
def test_scores_equal_the_loop(case: Case) -> None:
    model, inputs = made(case)
    expected = loop(case, model, inputs)
    assert (expected > 1e-3).all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = attribute_layers(model, inputs)
    assert list(scores.names) == Entry("", lambda: (model, inputs), case.units).units
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-8)
    assert scores.engine == case.engine
    texts = [str(warning.message) for warning in caught]
    assert any(re.search(case.says, text) for text in texts) if case.says else not texts


@pytest.mark.parametrize("case", [c for c in CASES if not c.units], ids=lambda case: case.network.__name__)
def test_refused_in_one_line(case: Case) -> None:
    model, inputs = made(case)
    with pytest.raises(ValueError, match=case.says) as caught:
        attribute_layers(model, inputs)
    assert "\n" not in str(caught.value)
