"""Every class of the catalogue: complete, by its own names, and equal to a loop that takes one block out at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .entry import Entry, call, plain
from .page import ENTRIES, NAMED, branches, engine, measured, page
from .test_parts import scored, zeros

PAGE = Path(__file__).resolve().parents[3] / "docs" / "attribution" / "catalogue.md"


def rows(entries):
    return [pytest.param(entry, id=entry.name.replace(" ", "_")) for entry in entries]


@pytest.mark.parametrize("entry", rows(ENTRIES))
def test_complete_by_name_and_equal_to_the_loop(entry: Entry) -> None:
    result = measured(entry.name)
    assert list(result.scores.names) == entry.units or (not NAMED and len(result.scores.names) == len(entry.units))
    assert (result.expected > 1e-3).all(), "a block of the entry does nothing: its score cannot fail"
    np.testing.assert_allclose(result.scores.by_sample.numpy(), result.expected, rtol=1e-5 if entry.single else 1e-8)
    assert engine(result.scores) == entry.engine
    if entry.engine == "staircase":
        assert result.scores.block_evaluations == len(entry.units) * (len(entry.units) + 1) / 2


# Their blocks do not add the results of modules to the state: a Linear joins a long skip, a block adds a function of
# its modules' results, or the first block makes a second state. In x-transformers the layers are branches already.
WITHOUT_BRANCHES = {
    "HunyuanDiT2DModel",
    "x_transformers ContinuousTransformerWrapper",
    "MMAudio-like network",
    "WavLMModel",
    "x_transformers Encoder, scaled residuals",
}


@pytest.mark.parametrize("entry", rows(ENTRIES))
def test_branches_are_found_and_equal_to_the_loop(entry: Entry) -> None:
    scores = branches(entry.name, "auto")
    assert (scores is None) == (entry.name in WITHOUT_BRANCHES)
    if scores is None:
        return
    assert list(dict.fromkeys(scores.layers)) == list(range(len(entry.units))), "a block without a branch"
    model, inputs = entry.made()
    rtol = 1e-5 if entry.single else 1e-7
    for name, row in zip(scores.names, scores.by_sample.tolist()):
        expected = scored(entry, model, inputs, model.get_submodule(name), zeros)
        np.testing.assert_allclose(row, expected, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name.replace(" ", "_"))
def test_the_entry_names_every_list_that_runs(entry: Entry) -> None:
    """The entry is complete: a module of a list, if it has parts and returns a sequence of the shape that it was given,
    is a unit, a part of one, or explained."""
    model, inputs = entry.made()
    ran: set[str] = set()

    def note(name: str, args: tuple, kwargs: dict, result: Any) -> None:
        taken, given = (
            {leaf.shape for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.dim() > 2}
            for values in ((args, kwargs), result)
        )
        if taken & given:
            ran.add(name)

    for name, module in model.named_modules():
        for i, child in module.named_children() if isinstance(module, nn.ModuleList | nn.Sequential) else ():
            if not any(child.children()):
                continue  # a single layer, as a norm or a projection
            child.register_forward_hook(lambda _, *call, name=f"{name}.{i}": note(name, *call), with_kwargs=True)
    with plain():
        call(model, inputs)
    known = tuple(f"{name}." for name in (*entry.units, *entry.beside))
    assert not {name for name in ran if not f"{name}.".startswith(known)}
    assert ran >= set(entry.units) or entry.zeroed
    assert all(any(f"{name}.".startswith(f"{beside}.") for name in ran) for beside in entry.beside)


def test_the_page_is_what_the_probes_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run the command that stands in the page"
