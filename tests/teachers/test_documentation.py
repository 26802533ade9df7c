"""The examples of docs/teachers.md run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agrepa_fast.teachers import registry

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(3))
def test_example_runs(index, monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    assert len(EXAMPLES) == 3
    exec(compile(EXAMPLES[index], f"{PAGE.name} example {index}", "exec"), {})
