"""Text and table of the docs about skipping blocks, made from bench/results/examples/skip-layers.json.

`examples/skip_layers.py --json FILE` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agrepa_fast.errors import UserError

from .tables import UNMEASURED, markdown

FILE = Path("bench", "results", "examples", "skip-layers.json")
NAMES = {
    "foga": "FoG-A, lowest first",
    "block-influence": "block influence, lowest first",
    "shallowest": "shallowest first",
    "random": "random, mean of four draws",
}


def blocks(root: Path) -> dict[str, str]:
    """The text of the marker skip_layers: {marker's name: text}.

    Raises:
        UserError: the file is not what the example writes."""
    path = root / FILE
    if not path.exists():
        return {"skip_layers": f"{UNMEASURED}."}
    try:
        return {"skip_layers": table(json.loads(path.read_text(encoding="utf-8")))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what examples/skip_layers.py --json writes ({error!r})") from None


def table(stored: Mapping[str, Any]) -> str:
    """The change of the samples by rule and number of skipped blocks; bold: the least change. Below it, the command."""
    [(name, facts)] = stored["models"].items()
    change = facts["change"]
    counts = list(next(iter(change.values())))
    least = {k: min(change[rule][k] for rule in change) for k in counts}
    rows = []
    for rule, by_count in change.items():
        cells = [f"{by_count[k]:.4f}" for k in counts]
        rows.append([NAMES[rule], *(f"**{c}**" if by_count[k] == least[k] else c for k, c in zip(counts, cells))])
    header = [f"{name}, {facts['blocks']} blocks", *(f"skip {k}" for k in counts)]
    return f"{markdown(header, rows)}\n\n{_sentences(change, counts, least)}\n\nMade by `{stored['command']}`."


def _sentences(change: Mapping[str, Mapping[str, float]], counts: Sequence[str], least: Mapping[str, float]) -> str:
    """How far the samples move at least, and which of the two measured rules moved them less."""
    told = [f"The samples move by {least[counts[0]]:.0%} or more with {counts[0]} block skipped."]
    outcomes: dict[str, list[str]] = {}
    for k in counts:
        ours, theirs = change["foga"][k], change["block-influence"][k]
        words = "as far as" if ours == theirs else "less than" if ours < theirs else "more than"
        outcomes.setdefault(words, []).append(k)
    parts = [f"{words} block influence's with {', '.join(ks)} skipped" for words, ks in outcomes.items()]
    return " ".join([*told, f"FoG-A's choice moves them {', and '.join(parts)}."])
