"""One job of a study: train a warm-up up to the probe, or a run from its warm-up to the end, and measure it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..alignment.policy import POLICIES
from ..alignment.selection import selection_state
from ..data.manifest import Clip
from ..errors import UserError, one_line, writing
from ..training.checkpoint import checkpoints, find_checkpoint, write_manifest, write_whole
from ..training.config import RunConfig, dump_config, load_config
from ..training.evaluation import clip_losses
from ..training.lock import RunLock
from ..training.start import resume_run, start_run
from ..training.trainer import Trainer
from .generated import evaluate
from .plan import FINAL, Run, Warmup

PATIENCE = 30.0  # seconds to wait for a run that another process still writes
OUTPUT = "output.txt"  # in a run's folder: what the run printed


@dataclass(frozen=True)
class Outcome:
    """How a job ended. error: one line, empty where it went well. stopped: by a signal, to go on later."""

    error: str = ""
    stopped: bool = False


def work(job: Warmup | Run) -> Outcome:
    """Do a job, or go on with it. Whatever goes wrong is the outcome, so that the other jobs go on."""
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with _printing_to(job.folder.parent / f"{job.folder.name}.{OUTPUT}"):
            try:
                done = _warm_up(job) if isinstance(job, Warmup) else _train(job)
            except Exception:  # the traceback goes to the run's file, one line of it to the user
                traceback.print_exc()
                raise
        return Outcome(stopped=not done)
    except UserError as error:
        return Outcome(str(error))
    except Exception as error:
        return Outcome(one_line(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Append what is printed to a file: several runs at a time would mix their lines."""
    with open(path, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def failure(run: Run) -> Path:
    """The file that holds the error with which a run ended last; absent where it went well."""
    return run.folder.parent / f"{run.folder.name}.error.txt"


def is_warm(warmup: Warmup) -> bool:
    """Whether a warm-up has been trained to its end."""
    return (warmup.folder / "checkpoints" / f"step_{warmup.step:08d}").is_dir()


def _warm_up(warmup: Warmup) -> bool:
    if is_warm(warmup):
        return True
    trainer = _open(warmup.folder, warmup.config)
    trainer.run(until=warmup.step)
    return trainer.step == warmup.step


def _open(folder: Path, config: RunConfig) -> Trainer:
    """The trainer of a run that begins, or goes on. Of dozens of runs nobody reads each report."""
    if folder.is_dir():
        _wait_for_lock(folder)
    begun = (folder / "config.yaml").is_file() or checkpoints(folder / "checkpoints")
    trainer = resume_run(folder) if begun else start_run(config)
    trainer.reports = False
    return trainer


def _wait_for_lock(folder: Path) -> None:
    """Wait for the process of a study that was killed: it stops after its present step."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return RunLock(folder).release()
        except UserError:
            if time.monotonic() > deadline:
                raise


def _train(run: Run) -> bool:
    check_same(run)
    if run.trained:
        return _evaluate(run)
    if run.warmup is not None and not run.folder.exists():
        _fork(run.warmup, run)
    trainer = _open(run.folder, run.config)
    trainer.run()
    if trainer.step < run.config.train.steps:
        return False
    write_whole(run.folder / FINAL, json.dumps(_measure(trainer), allow_nan=False) + "\n")
    del trainer  # the evaluation has a process of its own, which needs the memory
    return _evaluate(run)


def _evaluate(run: Run) -> bool:
    if run.evaluate is not None and not run.evaluated:
        evaluate(run.folder, run.evaluate, run.config.train.threads)
    return True


def check_same(run: Run) -> None:
    """Refuse to go on with a run that another configuration has begun.

    Raises:
        UserError: names the folder and the first field that differs."""
    file = run.folder / "config.yaml"
    if not file.is_file():
        return
    before, now = _flat(load_config(file)), _flat(run.config)
    for key in now:
        # The study's folder may have been moved.
        if before.get(key) != now[key] and key not in ("train.out", "data.features"):
            raise UserError(
                f"{run.folder}: was trained with {key} {before.get(key)!r}, the study says {now[key]!r}: change it "
                "back, or give the study another name or train.out"
            )


def _flat(config: RunConfig) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, fields in vars(config).items() for name, value in vars(fields).items()
    }


def _fork(warmup: Warmup, run: Run) -> None:
    """Make a run's folder, as if the run itself had trained up to the end of the warm-up. It appears whole or not."""
    building = run.folder.with_name(f".{run.folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    checkpoint, _ = find_checkpoint(warmup.folder / "checkpoints" / f"step_{warmup.step:08d}")
    target = building / "checkpoints" / checkpoint.name
    with writing(building):
        shutil.copytree(checkpoint, target, copy_function=_link)
        _rewrite(target / "config.yaml", dump_config(run.config))
        if not warmup.keeps_heads:
            _without_heads(target / "heads.safetensors")
        (target / "manifest.json").unlink()
        write_manifest(target)
        shutil.copy(warmup.folder / "log.jsonl", building)
        write_whole(building / "config.yaml", dump_config(run.config))
        corpus = warmup.folder / "corpus"
        if corpus.is_dir():
            (building / "corpus").symlink_to(os.path.relpath(corpus, run.folder))
        os.rename(building, run.folder)


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody changes; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _rewrite(path: Path, text: str) -> None:
    path.unlink()  # it may be a second name of the warm-up's file
    path.write_text(text, encoding="utf-8")


def _without_heads(path: Path) -> None:
    """The heads of a warm-up are untrained: a run begins with its own, which depend on its teachers and its seed."""
    import safetensors.torch

    path.unlink()
    safetensors.torch.save_file({}, path)


def _names(clips: Sequence[Clip]) -> list[str]:
    """A name for each clip that no other has: the file's, with a number where several clips share it."""
    counts: Counter[str] = Counter()
    names = []
    for clip in clips:
        counts[clip.path.name] += 1
        times = counts[clip.path.name]
        names.append(clip.path.name if times == 1 else f"{clip.path.name} #{times}")
    return names


def _measure(trainer: Trainer) -> dict[str, Any]:
    """What is kept of a finished run: the loss of every held-out clip, and what was aligned."""
    data, config = trainer.data.valid, trainer.config
    clips, losses, _ = clip_losses(
        trainer.objective,
        trainer.teachers,
        trainer.domain_tables,
        data,
        config,
        trainer.device,
        trainer.bf16,
        len(data.clips),
    )
    a = config.alignment
    needs_probe = a.enabled and not a.layers and not a.selection and POLICIES[a.policy] in ("values", "scores")
    aligned = trainer.selection if a.enabled else None
    return {
        "step": trainer.step,
        "flow_loss": losses.mean().item(),
        "clips": [
            {"clip": name, "domain": clip.domain, "loss": loss}
            for name, clip, loss in zip(_names(clips), clips, losses.tolist())
        ],
        "selection": None if aligned is None else selection_state(aligned),
        "seconds": trainer.seconds(),
        "probe_seconds": trainer.probe_seconds,
        "needs_probe": needs_probe,  # the others would do without it
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
    }
