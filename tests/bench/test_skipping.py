"""The table of skipped blocks in the docs says what the example stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agrepa_fast.bench import skipping
from agrepa_fast.errors import UserError

STORED = {
    "command": "python x",
    "models": {
        "DiT": {
            "blocks": 8,
            "change": {
                "foga": {"1": 0.2, "2": 0.25, "3": 0.3},
                "block-influence": {"1": 0.15, "2": 0.25, "3": 0.4},
                "random": {"1": 0.5, "2": 0.6, "3": 0.7},
            },
        }
    },
}


def test_the_least_change_is_bold_and_the_sentence_follows_the_numbers():
    lines = skipping.table(STORED).splitlines()
    assert lines[0] == "| DiT, 8 blocks | skip 1 | skip 2 | skip 3 |"
    assert lines[2:5] == [
        "| FoG-A, lowest first | 0.2000 | **0.2500** | **0.3000** |",
        "| block influence, lowest first | **0.1500** | **0.2500** | 0.4000 |",
        "| random, mean of four draws | 0.5000 | 0.6000 | 0.7000 |",
    ]
    assert lines[6] == (
        "The samples move by 15% or more with 1 block skipped. FoG-A's choice moves them more than block influence's "
        "with 1 skipped, and as far as block influence's with 2 skipped, and less than block "
        "influence's with 3 skipped."
    )
    assert lines[8] == "Made by `python x`."


def test_a_file_that_is_none_is_named(tmp_path: Path):
    assert skipping.blocks(tmp_path) == {"skip_layers": "not yet measured."}
    path = tmp_path / skipping.FILE
    path.parent.mkdir(parents=True)
    for content in ("{", "[]", json.dumps({"models": {}}), json.dumps({"models": {"DiT": {}}})):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"skip-layers\.json: not what examples/skip_layers\.py --json writes"):
            skipping.blocks(tmp_path)
