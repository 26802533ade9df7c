"""examples/skip_layers.py with tiny weights."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "skip_layers.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE), run_name="example")


def test_a_table_for_each_model_and_rule(example, capsys, tmp_path):
    path = tmp_path / "skipped.json"
    results = example["main"](["--skip", "1", "2", "--json", str(path)])
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["command"] == f"python examples/skip_layers.py --skip 1 2 --json {path}"
    assert stored["models"]["DiT"]["blocks"] == 6
    assert stored["models"]["WanTransformer3DModel"]["change"]["foga"]["2"] == results[1]["foga", 2]
    torch.manual_seed(1)  # the state of torch's generator makes no difference
    assert example["main"](["--skip", "1", "2"]) == results
    assert [set(result) for result in results] == [{(rule, k) for rule in example["RULES"] for k in (1, 2)}] * 2
    assert all(0.001 < change < 2 for result in results for change in result.values())
    printed = capsys.readouterr().out
    assert f"{results[1]['foga', 2]:.4f}" in printed


@pytest.mark.parametrize("name", ["tiny_dit", "tiny_wan"])
def test_models_are_left_as_they_were_and_skip_what_they_are_told(example, name):
    model = example[name]()
    whole = model.sample(())
    one = model.sample([1])
    assert not torch.equal(one, whole)
    assert not torch.allclose(model.sample([1, 3]), one)
    assert torch.equal(model.sample(()), whole)
    influence = model.influence()
    assert influence.shape == (6,)
    assert ((influence > 0) & (influence < 2)).all()
    assert model.scores().layers == tuple(range(6))
