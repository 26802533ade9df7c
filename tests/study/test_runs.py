"""Runs of a study: the same bits as training from scratch, resumed at any kill, and errors that stay where they are."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.cli import main
from agrepa_fast.study import pool
from agrepa_fast.study import work as work_module
from agrepa_fast.study.plan import FINAL, make_plan
from agrepa_fast.study.pool import Progress
from agrepa_fast.study.spec import read_study
from agrepa_fast.study.work import Outcome, work
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.lock import RunLock
from agrepa_fast.training.start import start_run
from agrepa_fast.training.trainer import Trainer

EVERY_KIND = """\
seeds: [5]
arms:
  - none
  - foga
  - foga-by-time
  - foga-reselected
  - most-stored
  - gradient-norm
  - first-order
  - middle: [1]
  - frames: {arm: foga-soft, set: {alignment.pool: null}}
  - tied: {arm: shallowest, set: {alignment.bitc: true}}
  - teachers: {arm: deepest, set: {alignment.teachers: {one: {source: spectral}, other: {source: spectral}}}}
"""


BY_VALUE = {"most-stored": "stored", "gradient-norm": "gradient-norm", "first-order": "first-order"}


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    """The page has tests of its own, and its pictures take most of the time."""
    monkeypatch.setattr("agrepa_fast.study.session.write_study_page", lambda folder, result: folder / "report.html")


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """Everything trained: weights, EMA, heads, optimizer, random state."""
    checkpoint = load_checkpoint(folder)
    flat = {f"{name}.{key}": value for name, part in checkpoint.weights.items() for key, value in part.items()}
    for number, entry in checkpoint.state["optimizer"]["state"].items():
        flat |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    return flat | {"rng": checkpoint.state["rng"][0][0], "generator": checkpoint.state["generator"]}


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = bits(one), bits(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def run_all(plan) -> None:
    for job in [*plan.warmups, *plan.jobs]:
        assert work(job) == Outcome(), job.folder


def valid_losses(folder: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["flow_loss"]) for entry in entries if entry["event"] == "valid"]


def test_an_arm_ends_with_the_bits_of_training_from_scratch(plan_of, tmp_path):
    plan = plan_of(EVERY_KIND)
    run_all(plan)
    assert len(plan.warmups) == 2  # BiT-C has its own
    for run in plan.jobs:
        train = dataclasses.replace(run.config.train, out=str(tmp_path / "scratch"), name=run.arm.name)
        trainer = start_run(dataclasses.replace(run.config, train=train))
        trainer.reports = False
        trainer.run()
        assert_same_bits(run.folder, trainer.run_dir)
        assert valid_losses(run.folder) == valid_losses(trainer.run_dir), run.arm.name
        final = json.loads((run.folder / FINAL).read_text())
        assert (final["selection"] is None) == (run.arm.name == "none")
        if run.arm.name in BY_VALUE:
            assert final["selection"]["method"] == BY_VALUE[run.arm.name]
            assert final["needs_probe"]


def test_arms_of_a_seed_differ_only_after_the_warm_up(plan_of):
    plan = plan_of("seeds: [5]\narms: [none, deepest]\n")
    run_all(plan)
    none, deepest = (dict(valid_losses(run.folder)) for run in plan.jobs)
    assert none[0] == deepest[0]
    assert none[8] != deepest[8]


def test_the_final_loss_of_a_clip_is_that_of_validation(plan_of):
    """Over as many clips as validation takes, the mean of the clips' losses is the last validation loss."""
    plan = plan_of("seeds: [0]\narms: [foga]\n", "train.valid_samples=100")
    run_all(plan)
    final = json.loads((plan.jobs[0].folder / FINAL).read_text())
    losses = [clip["loss"] for clip in final["clips"]]
    assert len({clip["clip"] for clip in final["clips"]}) == len(losses) > 1
    assert len(set(losses)) == len(losses)
    assert sum(losses) / len(losses) == pytest.approx(valid_losses(plan.jobs[0].folder)[-1][1], rel=1e-6)
    assert final["flow_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the program handles it."""


@pytest.mark.parametrize("moment", ["in the warm-up", "while forking", "in the run", "before measuring"])
def test_a_killed_study_goes_on(plan_of, study_file, tmp_path, monkeypatch, moment):
    lines = "seeds: [5]\narms: [foga]\n"
    plan = plan_of(lines)
    run_all(plan)
    [run] = plan.jobs
    whole = tmp_path / "whole"
    shutil.copytree(run.folder, whole)
    shutil.rmtree(plan.folder)

    with monkeypatch.context() as patch:
        killed = {"in the warm-up": 2, "in the run": 6}.get(moment)
        save = Trainer.save

        def save_and_die(trainer):
            save(trainer)
            if trainer.step == killed:
                raise Killed

        def die(*_):
            raise Killed

        patch.setattr(Trainer, "save", save_and_die)
        if moment == "while forking":
            patch.setattr(work_module, "_without_heads", die)
        if moment == "before measuring":
            patch.setattr(work_module, "_measure", die)
        with pytest.raises(Killed):
            run_all(plan)
    assert not run.finished
    steps = []
    step = Trainer._train

    def train(trainer):
        steps.append(trainer.step)
        step(trainer)

    monkeypatch.setattr(Trainer, "_train", train)
    assert main(["study", str(study_file(lines)), "--workers", "0"]) == 0
    # The warm-up and the run begin where the last checkpoint was.
    assert (
        steps
        == {
            "in the warm-up": [2, 3],
            "while forking": [3],
            "in the run": [6],
            "before measuring": [8],
        }[moment]
    )
    assert_same_bits(run.folder, whole)
    assert json.loads((run.folder / FINAL).read_text())["clips"] == json.loads((whole / FINAL).read_text())["clips"]


def test_a_signal_stops_a_study_after_a_step(study_file, monkeypatch, capsys):
    path = study_file("seeds: [5]\narms: [none, even]\n")
    strength_at = Aligner.strength_at

    def stop_here(aligner, step):
        if step == 5:  # the sixth step is under way
            os.kill(os.getpid(), signal.SIGTERM)
        return strength_at(aligner, step)

    with monkeypatch.context() as patch:
        patch.setattr(Aligner, "strength_at", stop_here)
        assert main(["study", str(path), "--workers", "0"]) == 130
    error = capsys.readouterr().err
    assert error == "stopped; the same command goes on\n"
    [none, even] = make_plan(read_study(path)).jobs
    assert load_checkpoint(none.folder).state["step"] == 6
    assert not even.folder.exists()
    assert main(["study", str(path), "--workers", "0"]) == 0
    assert "[2/2] base/even/seed-5" in capsys.readouterr().err


def test_the_time_left_counts_the_steps_that_are_done(plan_of, monkeypatch):
    plan = plan_of("seeds: [5]\narms: [none, even]\n")  # 3 + 2 x 5 steps
    now = [100.0]
    monkeypatch.setattr("agrepa_fast.study.pool.time.monotonic", lambda: now[0])
    run = plan.jobs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "log.jsonl").write_text('{"event": "train", "step": 5}\n')
    progress = Progress(plan)
    assert (progress.total, progress.first) == (13, 2)
    assert progress.left() == "time left unknown"
    now[0] = 130.0
    with (run.folder / "log.jsonl").open("a") as log:
        log.write('{"event": "train", "step": 8}\n')
    # 3 steps in 30 s, and 8 are left.
    assert progress.left() == "about 1 min 20 s left"


@pytest.mark.parametrize(
    ("count", "visible", "device", "expected"),
    [
        (0, None, "auto", []),
        (1, None, "auto", []),
        (3, None, "auto", ["0", "1", "2"]),
        (2, "4,6", "cuda", ["4", "6"]),
        (2, None, "cuda:1", []),
        (2, None, "cpu", []),
    ],
)
def test_workers_share_out_the_devices(plan_of, monkeypatch, count, visible, device, expected):
    plan = plan_of("seeds: [5]\narms: [none]\n")
    config = dataclasses.replace(plan.config, train=dataclasses.replace(plan.config.train, device=device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pool._devices(dataclasses.replace(plan, config=config)) == expected


def test_a_finished_study_trains_nothing(study_file, monkeypatch, capsys):
    path = study_file("seeds: [0]\narms: [none, even]\n")
    assert main(["study", str(path), "--workers", "0"]) == 0
    monkeypatch.setattr(Trainer, "run", None)
    assert main(["study", str(path), "--workers", "0"]) == 0
    assert main(["study", str(path), "--report-only"]) == 0
    assert "report: " in capsys.readouterr().out


def test_another_configuration_is_refused_and_more_arms_are_welcome(study_file, capsys):
    path = study_file("seeds: [0]\narms: [even]\n")
    assert main(["study", str(path), "--workers", "0"]) == 0
    capsys.readouterr()
    assert main(["study", str(path), "--workers", "0", "optimizer.lr=1e-4"]) == 2
    error = capsys.readouterr().err
    assert "was trained with optimizer.lr 0.002, the study says 0.0001" in error
    assert error.count("\n") == 1
    more = study_file("seeds: [0, 1]\narms: [none, even]\n")
    assert main(["study", str(more), "--workers", "0"]) == 0
    assert "[4/4]" in capsys.readouterr().err


def test_a_study_without_its_clips_is_one_line(study_file, capsys, tmp_path):
    path = study_file("seeds: [5, 6]\narms: [none, foga]\n")
    assert main(["study", str(path), "data.train=[nowhere]"]) == 2
    expected = f"agrepa: error: {path}: nowhere: no such manifest file or folder; name yours: data.train=[...]\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "runs" / "tiny" / "warmups").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "alignment.teachers={t: {source: spectrall}}",
            "alignment.teachers.t: unknown teacher 'spectrall': did you mean 'spectral'?",
        ),
        ("train.device=cuda:99", "train.device: no cuda:99 here"),
    ],
)
def test_a_base_that_fails_every_run_is_one_line(study_file, capsys, tmp_path, override, message):
    path = study_file("seeds: [5, 6]\narms: [none, foga]\n")
    assert main(["study", str(path), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"agrepa: error: {path}: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs" / "tiny" / "warmups").exists()


def test_an_error_of_one_arm_is_named_and_the_others_go_on(study_file, read_results, capsys):
    bad = "{bad: {arm: foga, set: {alignment.teachers: {t: {source: no-such-teacher}}}}}"
    assert main(["study", str(study_file(f"seeds: [0]\narms: [none, {bad}, even]\n")), "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert "failed: base/bad/seed-0: " in error
    assert "no-such-teacher" in error
    result = read_results()
    assert result["runs"]["finished"] == 2
    assert list(result["runs"]["failed"]) == ["base/bad/seed-0"]
    [none, bad, even] = result["settings"][0]["arms"]
    assert (none["missing"], bad["missing"], even["missing"]) == (0, 1, 0)
    assert bad["loss"] is None
    # Without the broken arm the study is whole again.
    assert main(["study", str(study_file("seeds: [0]\narms: [none, even]\n")), "--workers", "0"]) == 0
    assert read_results()["runs"] == {"planned": 2, "finished": 2, "failed": {}}


def test_an_unforeseen_error_is_recorded_too(plan_of, monkeypatch):
    plan = plan_of("seeds: [0]\narms: [none]\n")

    def broken(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(Trainer, "__init__", broken)
    assert work(plan.warmups[0]) == Outcome("RuntimeError: first line\\nsecond line")
    output = plan.warmups[0].folder.parent / f"{plan.warmups[0].folder.name}.output.txt"
    assert "Traceback" in output.read_text()


def test_a_failed_warm_up_fails_its_arms_alone(study_file, read_results, monkeypatch, capsys):
    slow = "{slow: {arm: foga, set: {train.imports: [no_such_module_anywhere]}}}"
    assert main(["study", str(study_file(f"seeds: [0]\narms: [none, {slow}]\n")), "--workers", "0"]) == 1
    assert "its warm-up failed: " in capsys.readouterr().err
    assert list(read_results()["runs"]["failed"]) == ["base/slow/seed-0"]
    assert read_results()["runs"]["finished"] == 1


def test_one_process_for_a_study(study_file, plan_of, capsys):
    path = study_file("seeds: [0]\narms: [none]\n")
    folder = make_plan(read_study(path)).folder
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    try:
        assert main(["study", str(path), "--workers", "0"]) == 2
        error = capsys.readouterr().err
        assert "works on this study; wait for its end or stop it, or give this one another train.out" in error
    finally:
        lock.release()
    assert main(["study", str(path), "--report-only"]) == 2
    assert "none of the study's 1 runs is finished yet" in capsys.readouterr().err


def test_several_workers_and_one_that_dies(study_file, read_results, tmp_path, monkeypatch, capsys):
    """A worker that the system kills loses its own run only; the numbers are those of one process."""
    (tmp_path / "deadly.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # which the workers inherit
    deadly = "{deadly: {arm: foga, set: {train.imports: [deadly]}}}"
    path = study_file(f"seeds: [0]\narms: [none, {deadly}, even]\n")
    assert main(["study", str(path), "--workers", "2"]) == 1
    error = capsys.readouterr().err
    assert "base/deadly/seed-0: its warm-up failed: its process ended with signal 9" in error
    result = read_results()
    assert result["runs"]["finished"] == 2
    losses = {arm["arm"]: arm["runs"][0]["clip_losses"] for arm in result["settings"][0]["arms"] if arm["runs"]}
    shutil.rmtree(tmp_path / "runs")
    assert main(["study", str(study_file("seeds: [0]\narms: [none, even]\n")), "--workers", "0"]) == 0
    assert {a["arm"]: a["runs"][0]["clip_losses"] for a in read_results()["settings"][0]["arms"]} == losses
