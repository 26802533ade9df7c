"""The tests of tests/gpu that a card has not run yet: their own control flow, on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

GPU = Path(__file__).parents[1] / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rehearsed_{name}", GPU / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_replay_of_all_ops_waits_for_its_inputs(cuda):
    """The side stream runs the warm-up behind what made the inputs, or it reads memory that is not written yet."""
    tests = load("test_kernels")
    tests.inputs = functools.partial(tests.inputs, 2, 5, 24, device="cpu")
    ran_on = []
    step = tests.step

    def watched(*arguments):
        ran_on.append((cuda.current, list(cuda.current.waited_for)))
        return step(*arguments)

    tests.step = watched
    tests.test_graph_replay_with_changed_inputs()
    [aside] = cuda.streams
    assert ran_on[0] == (aside, [cuda.default])
    assert cuda.default.waited_for == [aside]  # and the recording comes behind the warm-up
    assert cuda.recordings == 1


@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_the_small_captured_step(cuda, monkeypatch, engine):
    tests = load("test_step")
    tests.FRAMES = 36
    tests.SIZES = (*tests.SIZES, "model.width=16", "mel.mels=16")
    original = torch.compile
    monkeypatch.setattr("torch.compile", lambda module, **options: original(module, backend="eager", **options))
    torch._dynamo.reset()
    made = []
    build = tests.build
    tests.build = lambda *arguments: made.append(build(*arguments)) or made[-1]
    cuda.state = lambda: state(made[1])
    step = tests.check(engine, torch.device("cpu"), False)
    assert step.captures == cuda.recordings == (2 if engine == "graph" else 0)
    torch._dynamo.reset()


def state(step):
    """Every tensor that a step changes."""
    optimizer = [value for entry in step.optimizer.state.values() for value in entry.values()]
    objects = [*step.objective.state_dict().values(), *step.ema.module.state_dict().values()]
    return [*objects, *optimizer, *step.meter._sums.values(), step.skipped]


def test_only_whole_runs_need_sound_files(monkeypatch):
    """Without soundfile the tests of whole runs are skipped, and the others still load."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    skipped = []
    for path in sorted(GPU.glob("test_*.py")):
        try:
            load(path.stem)
        except pytest.skip.Exception as reason:
            skipped.append((path.stem, "soundfile cannot be imported" in str(reason)))
    assert skipped == [("test_training", True)]
