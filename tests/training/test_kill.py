"""SIGKILL at random moments, also inside a checkpoint write, and a restart each time: the bits of an unbroken run."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
import traceback

import torch

from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep

STEPS = 60


def live(config, run_dir, *, call: int | None = None) -> tuple[int, int]:
    """A child that begins or resumes the run, its standard error in a file; (process, pipe that tells of its first
    step). With `call` it SIGKILLs itself at that call that flushes or renames, as a checkpoint's write does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    # After a fork torch replaces its thread pool at the next use; two threads that do so at once fail an assertion.
    torch.set_num_threads(1)
    os.dup2(os.open(run_dir.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    counter = itertools.count()

    def trap(original):
        def counted(*arguments, **options):
            if next(counter) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return counted

    def tell(self, *arguments):
        os.write(writing, b".")
        TrainStep.__call__ = original
        return original(self, *arguments)

    for name in ("fsync", "rename", "replace", "mkdir", "unlink"):
        setattr(os, name, trap(getattr(os, name)))
    original, TrainStep.__call__ = TrainStep.__call__, tell
    try:
        trainer = resume_run(run_dir) if (run_dir / "config.yaml").exists() else start_run(config)
        trainer.run()
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)


def killed(child: int, run_dir) -> bool:
    """Wait for the child; whether it was killed. Another end than a good one is a failure."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, run_dir.with_suffix(".txt").read_text()
    return os.WIFSIGNALED(status)


def test_killed_twenty_times_it_ends_with_the_bits_of_an_unbroken_run(
    tiny_config, monkeypatch, state_bits, assert_same_bits
):
    monkeypatch.setattr("agrepa_fast.training.trainer.write_report", lambda run_dir: run_dir)
    changes = ["train.checkpoint_every=2", f"train.steps={STEPS}", "train.samples=0", "train.valid_every=20"]
    changes += ["probe.every=10", "alignment.bitc=true"]
    whole = start_run(tiny_config(*changes)).run()
    config = tiny_config(*changes, "train.name=killed")
    run_dir = whole.with_name("killed")
    draw = random.Random(0)
    reached, kills = [0], 0
    while kills < 20:
        # By turns: at any time, while loading; some time into training; in the middle of a checkpoint's write.
        how = kills % 4
        child, pipe = live(config, run_dir, call=draw.randrange(3, 20) if how > 1 else None)
        if how == 0:
            time.sleep(draw.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
        elif how == 1:
            os.read(pipe, 1)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        assert killed(child, run_dir), "it was to be killed, and came to its end"
        os.close(pipe)
        kills += 1
        if (run_dir / "checkpoints").exists() and reached[-1] + any((run_dir / "checkpoints").glob("step_*")):
            reached.append(load_checkpoint(run_dir).state["step"])
            assert reached[-1] >= reached[-2], "a checkpoint was lost"
    assert reached[-1] >= 10
    child, pipe = live(config, run_dir)
    assert not killed(child, run_dir)
    os.close(pipe)
    assert_same_bits(state_bits(whole), state_bits(run_dir))
    logs = [
        [
            (e["event"], e["step"], e.get("flow_loss"))
            for e in read_log(folder / "log.jsonl")
            if e["event"] in ("train", "valid", "probe")
        ]
        for folder in (whole, run_dir)
    ]
    assert [entry[:2] for entry in logs[0]] == [entry[:2] for entry in logs[1]]
    assert [e for e in logs[0] if e[0] == "valid"] == [e for e in logs[1] if e[0] == "valid"]
