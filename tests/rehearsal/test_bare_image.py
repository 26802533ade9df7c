"""A machine with a GPU may have torch, Triton, NumPy and pytest, and nothing else: all tests load, the bench starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Everything that those four need is there; whatever else is installed here is not.
BARE = """
import importlib.metadata as metadata, re, sys

def key(name):
    return re.sub(r"[-_.]+", "-", name).lower()

kept, ahead = {"agrepa-fast"}, ["torch", "triton", "numpy", "pytest"]
while ahead:
    name = key(ahead.pop())
    if name in kept:
        continue
    kept.add(name)
    try:
        needs = metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        continue
    ahead += [re.match(r"[\\w.-]+", need).group() for need in needs if "extra ==" not in need]
absent = {m for m, owners in metadata.packages_distributions().items() if not kept & {key(o) for o in owners}}

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Bare, sys.meta_path)
assert {"yaml", "hypothesis", "soundfile", "transformers"} <= absent

import pytest, torch
from agrepa_fast.bench import cli, gpu

paths = [path for group in gpu.tests_of(gpu.checkout()) for path in group]
options = ["-q", "--collect-only", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
assert pytest.main([*options, *paths]) == 0
# All problems of a GPU; where a package is missing, the case is left out.
listed, without = cli._problems(["all"], "full", torch.device("cuda", 0))
print("left out:", [item["case"] for item in without])
print("listed:", [case for case, problems in listed.items() if problems])
"""


def test_a_bare_image_has_what_the_gpu_run_needs() -> None:
    options = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins need packages that are absent
    command = [sys.executable, "-c", BARE]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **options}, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    assert "tests/gpu/test_step.py::test_the_captured_step_trains_as_the_eager_one" in output
    assert "tests/kernels/values/test_residual.py::" in output
    assert "left out: []" in output
    for case in ("residual", "foga", "alignment", "train_step", "trainer"):
        assert f"'{case}'" in output.partition("listed:")[2]
