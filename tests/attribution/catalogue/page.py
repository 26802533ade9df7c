"""The page docs/attribution/catalogue.md: `python -m tests.attribution.catalogue.page > docs/attribution/catalogue.md`.

Every row comes from a probe of a tiny random model, run here and compared with the catalogue's own loop.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from agrepa_fast import LayerScores, attribute_layers
from agrepa_fast.attribution.foreign import register

from . import audio, encoders, images, more, others, videos
from .entry import Entry, scores_by_loop

NAMED = "names" in LayerScores.__dataclass_fields__  # until scores carry the model's own names
ROOMS = {
    "Images": [*images.ENTRIES, *more.IMAGES],
    "Videos": [*videos.ENTRIES, *more.VIDEOS],
    "Audio": audio.ENTRIES,
    "Encoders": encoders.ENTRIES,
    "Others": others.ENTRIES,
}
ENTRIES = [entry for entries in ROOMS.values() for entry in entries]

PAGE = """\
# The catalogue

<!-- Written by `python -m tests.attribution.catalogue.page > docs/attribution/catalogue.md`. -->

Each of these {count} cases is built with a tiny random configuration and probed in every run of the tests. Its scores
must equal a loop's that switches one block off at a time, and every block that the loop switches off must be there, by
the model's own name.

- **Blocks**: what `attribute_layers(model, inputs)` scores without being told anything.
- **Branches**: what `branches="auto"` finds in the blocks and scores apart; "-" where what a block adds to its state is
  no sum of its modules' results (a Linear joins a long skip, say), and is refused.
- **Streams**: the states of a joint block that `branches=["parts"]` scores apart.
- **How**: *staircase* where a block runs on those ablations alone that differ from the baseline by then, so that L
  blocks cost L(L+1)/2 block evaluations; *dense* where a block cannot run on a part of the batch, so that it runs on
  all. The scores are the same.

A class that is not here works as well if its forward calls its blocks in the ways that these do: see
[any list of blocks](any-model.md). Names of cases that start with a package's name come from that package; the others
are from diffusers and transformers.
{tables}"""


@dataclass
class Measured:
    """The scores of an entry, those of the loop, and what was warned of."""

    scores: LayerScores
    expected: np.ndarray
    warnings: list[str]


def probe(entry: Entry, model: nn.Module, inputs: object, **options: Any) -> tuple[LayerScores, list[str]]:
    """`attribute_layers` as its users call it; and the texts of its warnings."""
    adapters = dict(register._ADAPTERS)
    if entry.output is not None:
        register.register_adapter(type(model), register.Adapter(velocity=entry.output))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = attribute_layers(model, inputs, **options)  # type: ignore[arg-type]
    finally:
        register._ADAPTERS.clear()
        register._ADAPTERS.update(adapters)
    return scores, [str(warning.message) for warning in caught if warning.category is UserWarning]


@functools.cache
def measured(name: str) -> Measured:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model, inputs = entry.made()
    expected = scores_by_loop(entry, model, inputs)
    scores, caught = probe(entry, model.train(), inputs)
    return Measured(scores, expected, caught)


@functools.cache
def branches(name: str, which: str) -> LayerScores | None:
    """The scores of the parts of an entry's blocks; None where its blocks have none that can be scored apart.

    which: "auto" for branches, "parts" for streams."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model, inputs = entry.made()
    try:
        return probe(entry, model, inputs, branches="auto" if which == "auto" else ["parts"])[0]
    except ValueError as error:
        if not str(error).startswith("branches: "):
            raise
        return None


def short(names: Sequence[str]) -> str:
    """["a.0", "a.1", "a.2", "b.0"] -> "`a.0` to `a.2`, `b.0`"."""
    runs: list[list[str]] = []
    for name in names:
        if runs and name == following(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"`{run[0]}` to `{run[-1]}`" if len(run) > 1 else f"`{run[0]}`" for run in runs)


def following(name: str) -> str:
    """ "a.3" -> "a.4"."""
    return re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), name)


def cells(entry: Entry) -> list[str]:
    """The page's row of one entry."""
    scores = measured(entry.name).scores
    return [
        entry.name,
        str(len(scores.layers)),
        short(scores.names),
        listed(branches(entry.name, "auto")),
        listed(branches(entry.name, "parts"), several=True),
        engine(scores),
    ]


def listed(scores: LayerScores | None, several: bool = False) -> str:
    """The names of branches, each once; "-" where there are none, or (several) one in each block."""
    if scores is None or scores.branches is None or (several and len(set(scores.layers)) == len(scores.layers)):
        return "-"
    return ", ".join(f"`{branch}`" for branch in dict.fromkeys(scores.branches))


def engine(scores: LayerScores) -> str:
    return "dense" if scores.block_evaluations is None else "staircase"


def page() -> str:
    tables = []
    for room, entries in ROOMS.items():
        rows = [f"\n## {room}\n", "| class | units | blocks | branches | streams | how |", "|---|---:|---|---|---|---|"]
        tables += [*rows, *(f"| {' | '.join(cells(entry))} |" for entry in entries)]
    return PAGE.format(count=len(ENTRIES), tables="\n".join(tables) + "\n")


if __name__ == "__main__":
    print(page(), end="")
