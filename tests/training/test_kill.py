"""SIGKILL at random moments, also inside a checkpoint write, and a restart each time: the bits of an unbroken run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import runpy
import signal
import time

import torch

from agrepa_fast.report import read_log
from agrepa_fast.training import trainer
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep

STEPS = 60


# Forks of a process that has run nothing: a child of pytest's own could not train after some tests of autograd.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["agrepa_fast.training.start", "pytest"])
CHILD = "a run that is to be killed"  # the name of this file when a child runs it


def begin(config, run_dir, *, call: int | None = None):
    """A child that begins or resumes the run: (process, pipe that tells of its first step).

    With `call` it SIGKILLs itself at that call that flushes or renames, as a checkpoint's write does."""
    reading, writing = SERVER.Pipe(duplex=False)
    # The child cannot import a test, but it can run its file.
    child = SERVER.Process(target=runpy.run_path, args=(__file__, {"RUN": (config, run_dir, call, writing)}, CHILD))
    child.start()
    writing.close()
    return child, reading


def live(config, run_dir, call, writing) -> None:
    # After a fork torch replaces its thread pool at the next use; two threads that do so at once fail an assertion.
    torch.set_num_threads(1)
    os.dup2(os.open(run_dir.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    trainer.write_report = lambda run_dir: run_dir
    counter = itertools.count()

    def trap(original):
        def counted(*arguments, **options):
            if next(counter) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return counted

    def tell(self, *arguments):
        writing.send_bytes(b".")
        TrainStep.__call__ = original
        return original(self, *arguments)

    for name in ("fsync", "rename", "replace", "mkdir", "unlink"):
        setattr(os, name, trap(getattr(os, name)))
    original, TrainStep.__call__ = TrainStep.__call__, tell
    run = resume_run(run_dir) if (run_dir / "config.yaml").exists() else start_run(config)
    run.run()


def killed(child, run_dir) -> bool:
    """Wait for the child; whether it was killed. Another end than a good one is a failure."""
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), run_dir.with_suffix(".txt").read_text()
    return child.exitcode != 0


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
        child, pipe = begin(config, run_dir, call=draw.randrange(3, 20) if how > 1 else None)
        if how == 0:
            time.sleep(draw.uniform(0, 0.4))
            child.kill()
        elif how == 1:
            pipe.recv_bytes()
            time.sleep(draw.uniform(0, 0.1))
            child.kill()
        assert killed(child, run_dir), "it was to be killed, and came to its end"
        pipe.close()
        kills += 1
        if (run_dir / "checkpoints").exists() and reached[-1] + any((run_dir / "checkpoints").glob("step_*")):
            reached.append(load_checkpoint(run_dir).state["step"])
            assert reached[-1] >= reached[-2], "a checkpoint was lost"
    assert reached[-1] >= 10
    child, _ = begin(config, run_dir)
    assert not killed(child, run_dir)
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


if __name__ == CHILD:
    live(*RUN)  # noqa: F821
