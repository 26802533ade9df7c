"""Checkpoints on disk: killed at every system call of a write or a removal, damaged, and found again."""

from __future__ import annotations

import itertools
import os
import shutil
import signal

import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import checkpoints, drop_old, find_checkpoint, load_checkpoint, save_checkpoint
from agrepa_fast.training.config import RUN_PRESETS
from agrepa_fast.training.log import RunLog


@pytest.fixture
def save(training_state):
    def write(run_dir, step: int, value: float | None = None) -> None:
        weight = {"weight": torch.full((1000,), float(step if value is None else value))}
        parts = {"model": weight, "ema": weight, "heads": weight}
        save_checkpoint(run_dir / "checkpoints", step, parts, training_state(step), RUN_PRESETS["demo"])

    return write


def held(run_dir) -> tuple[int, float]:
    """Step and the value in the weights of the newest intact checkpoint."""
    checkpoint = load_checkpoint(run_dir)
    values = {float(v) for part in checkpoint.weights.values() for v in part["weight"].unique()}
    assert len(values) == 1
    return checkpoint.state["step"], values.pop()


def killed_at(call: int, action, *arguments, **options) -> bool:
    """Run `action` in a child that SIGKILLs itself at its `call`-th system call that changes the disk's names or
    flushes; whether it lived that long."""
    child = os.fork()
    if child == 0:
        counter = itertools.count()

        def trap(original):
            def counted(*given, **named):
                if next(counter) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*given, **named)

            return counted

        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, trap(getattr(os, name)))
        action(*arguments, **options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def copies(source, folder):
    """Fresh copies of a run's folder, one for each kill."""
    for number in itertools.count():
        yield number, shutil.copytree(source, folder / str(number))


def test_killed_anywhere_in_a_write_the_run_keeps_a_whole_checkpoint(save, tmp_path):
    save(tmp_path / "run", 1)
    seen = set()
    for call, run_dir in copies(tmp_path / "run", tmp_path / "killed"):
        alive = not killed_at(call, save, run_dir, 2)
        seen.add(held(run_dir))
        save(run_dir, 3)  # the next write tidies up
        assert held(run_dir) == (3, 3.0)
        assert not list((run_dir / "checkpoints").glob(".*"))
        if alive:
            break
    assert seen == {(1, 1.0), (2, 2.0)}
    assert call > 8


def test_killed_anywhere_in_writing_a_step_again_the_step_stays(save, tmp_path):
    save(tmp_path / "run", 1, value=10)
    seen = set()
    for call, run_dir in copies(tmp_path / "run", tmp_path / "killed"):
        alive = not killed_at(call, save, run_dir, 1, value=11)
        seen.add(held(run_dir))
        if alive:
            break
    assert seen == {(1, 10.0), (1, 11.0)}


def test_killed_anywhere_in_a_removal_nothing_else_is_lost(save, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "run", step)
    for call, run_dir in copies(tmp_path / "run", tmp_path / "killed"):
        alive = not killed_at(call, drop_old, run_dir / "checkpoints", keep=1)
        assert held(run_dir) == (3, 3.0)
        save(run_dir, 4)
        drop_old(run_dir / "checkpoints", keep=1)
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000004"]
        if alive:
            break
    assert call > 5


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "heads.safetensors", "state.pt", "config.yaml"]
)
def test_a_damaged_checkpoint_is_passed_over_and_named(save, tmp_path, file):
    for step in (1, 2):
        save(tmp_path, step)
    damaged = checkpoints(tmp_path / "checkpoints")[-1] / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, where no reader would notice
    damaged.write_bytes(content)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.state["step"] == 1
    assert checkpoint.damaged == (f"{damaged}: damaged (not the bytes that were written)",)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(damaged.parent)
    damaged.unlink()
    assert load_checkpoint(tmp_path).state["step"] == 1
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000001")
    with pytest.raises(UserError, match=f"no checkpoint is intact: .*{file}: no such file"):
        find_checkpoint(tmp_path)


def test_the_log_goes_back_to_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, RUN_PRESETS["demo"])
    log.write("train", step=1)
    position = log.position
    log.write("train", step=2)
    log._file.write('{"event": "tra')  # what a kill leaves
    log.close()
    log = RunLog(tmp_path, RUN_PRESETS["demo"], resume=(1, position))
    log.write("resume", step=1)
    log.close()
    assert [(entry["event"], entry["step"]) for entry in read_log(tmp_path / "log.jsonl")] == [
        ("train", 1),
        ("resume", 1),
    ]
