"""A run's folder has one writer, a run knows its clips, and every end leaves what it should."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log, write_report
from agrepa_fast.training.checkpoint import MANIFEST, load_checkpoint, write_manifest
from agrepa_fast.training.clips import split_clips
from agrepa_fast.training.identity import _fraction, identify
from agrepa_fast.training.lock import RunLock
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep

SHORT = ("train.steps=2", "probe.start=1", "train.samples=0", "train.valid_every=2", "train.checkpoint_every=2")


@pytest.fixture
def run(tiny_config):
    return start_run(tiny_config(*SHORT, "train.keep=3")).run()


def test_one_writer(tmp_path):
    lock = RunLock(tmp_path)
    code = (
        "import sys; from pathlib import Path; from agrepa_fast.training.lock import RunLock\n"
        "try: RunLock(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)\n"
        "else: print('held')"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True).stdout

    assert f"process {os.getpid()} on" in other()
    with pytest.raises(UserError, match=r"writes this run; wait for its end or stop it"):
        RunLock(tmp_path)  # in the same process too
    lock.release()
    assert other() == "held\n"
    RunLock(tmp_path).release()  # the file that the other process has left is no obstacle


def test_the_second_start_and_a_resume_touch_nothing(tiny_config, run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    half = run / "checkpoints" / ".step_00000009.1"
    half.mkdir()
    lock = RunLock(run)
    assert main(["train", "--resume", str(run)]) == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert half.exists()  # the checkpoint that the holder is writing
    assert before == {path: path.stat().st_mtime_ns for path in before}
    lock.release()


def rewrite(manifest: Path, change) -> None:
    with open(manifest, newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file, delimiter="|"))
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="|").writerows([header, *change(rows)])


def sides(config, tmp_path) -> tuple[set[str], set[str], int]:
    split = split_clips(config, tmp_path)
    return {k.clip.path.name for k in split.train}, {k.clip.path.name for k in split.valid}, split.duplicates


def test_adding_clips_moves_none_across(tiny_config, clips, tmp_path):
    config = tiny_config(f"data.train=[{clips}]", "data.valid_share=0.4")
    train, valid, _ = sides(config, tmp_path)
    assert train.isdisjoint(valid)
    rewrite(clips, lambda rows: rows[::2])
    fewer_train, fewer_valid, _ = sides(config, tmp_path)
    # A domain keeps a clip on each side: with few clips the lowest is held out and the highest is not.
    moved = (fewer_train & valid) | (fewer_valid & train)
    assert len(moved) <= 2
    fractions = {k.clip.path.name: _fraction(k.identity.sound) for k in split_clips(config, tmp_path).train}
    assert all(fractions[name] >= 0.4 or name in moved for name in fewer_train)


@pytest.mark.parametrize("kind", ["rows twice", "manifest twice", "copied file", "link"])
def test_duplicates_are_dropped_and_counted(tiny_config, clips, tmp_path, kind):
    plain = sides(tiny_config(f"data.train=[{clips}]", "data.valid_share=0.4"), tmp_path)
    train = f"data.train=[{clips}]"
    if kind == "rows twice":
        rewrite(clips, lambda rows: rows + rows)
    elif kind == "manifest twice":
        train = f"data.train=[{clips},{clips}]"
    else:
        with open(clips, newline="", encoding="utf-8") as file:
            first = list(csv.reader(file, delimiter="|"))[1]
        copy = clips.parent / "again.wav"
        shutil.copy(clips.parent / first[0], copy) if kind == "copied file" else copy.symlink_to(
            clips.parent / first[0]
        )
        rewrite(clips, lambda rows: [*rows, ["again.wav", *first[1:]]])
    listed, held, duplicates = sides(tiny_config(train, "data.valid_share=0.4"), tmp_path)
    assert duplicates == (1 if kind in ("copied file", "link") else len(plain[0] | plain[1]))
    assert len(listed) + len(held) == len(plain[0]) + len(plain[1])
    assert listed.isdisjoint(held)


def test_a_resume_refuses_other_clips_unless_told(tiny_config, clips, capsys):
    config = tiny_config(f"data.train=[{clips}]", *SHORT)
    run_dir = start_run(config).run()
    before = load_checkpoint(run_dir).state["clips"]
    rewrite(clips, lambda rows: rows[1:])
    assert main(["train", "--resume", str(run_dir)]) == 2
    error = capsys.readouterr().err.strip()
    assert "0 added, 1 removed, 0 changed" in error
    assert "--accept-data-changes" in error
    assert "\n" not in error
    assert main(["train", "--resume", str(run_dir), "--accept-data-changes"]) == 0
    after = resume_run(run_dir, accept_data_changes=True)
    after.lock and after.lock.release()
    held = {row[0] for row in before["valid"].tolist()}
    assert {k.identity.sound for k in identify(after.data.train.clips)}.isdisjoint(held)


def test_a_diverged_run_says_so_and_ends_as_a_run(tiny, tmp_path, capsys):
    changes = ("optimizer.lr=1e20", "optimizer.clip=1e30", "train.steps=6", "probe.start=5", "train.checkpoint_every=6")
    assert main(["train", "demo", *tiny(*changes)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "the last checkpoint is in" not in error  # there is none
    [run_dir] = (tmp_path / "runs").iterdir()
    assert read_log(run_dir / "log.jsonl")[-1]["event"] == "stopped"
    assert (run_dir / "report.html").exists()


def test_a_hang_up_ends_the_run_with_a_checkpoint(tiny_config, monkeypatch):
    trainer = start_run(tiny_config("train.steps=6", "probe.start=5", "train.samples=0", "train.checkpoint_every=6"))
    step = TrainStep.__call__

    def hang_up(self, *arguments):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a run leaves that so
    try:
        run_dir = trainer.run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load_checkpoint(run_dir).state["step"] == 3


def damaged_states(state: dict):
    """Every key of the training state left out, and with values of other types and sizes."""
    for key in state:
        yield f"no {key}", {name: value for name, value in state.items() if name != key}
        for value in (None, "text", -1, float("nan"), [], {}, [[]], torch.zeros(0), 10**30):
            yield f"{key}={value!r}", {**state, key: value}
    yield "another format", {**state, "format": 10**6}
    yield "not a mapping", [1, 2]


def test_a_damaged_state_is_one_line_or_loads(run, tmp_path):
    folder = load_checkpoint(run).path
    state = torch.load(folder / "state.pt", weights_only=True)
    refused = 0
    for name, broken in damaged_states(state):
        torch.save(broken, folder / "state.pt")
        write_manifest(folder)
        reason = ""
        try:
            trainer = resume_run(run)
            trainer.lock and trainer.lock.release()
        except UserError as error:
            reason = str(error)
        refused += bool(reason)
        assert "\n" not in reason, name
    assert refused > 100


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": {}}',
        '{"files": []}',
        '{"files": {"../x": {}}}',
        "[" * 100_000,
        "1" * 10_000,
        "\x00",
        "null",
    ],
)
def test_a_damaged_manifest_is_one_line(run, text, capsys):
    folder = load_checkpoint(run).path
    (folder / MANIFEST).write_text(text)
    assert main(["train", "--resume", str(folder)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_a_manifest_that_is_no_file_does_not_hang(run, kind, capsys):
    manifest = load_checkpoint(run).path / MANIFEST
    manifest.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](manifest)
    assert main(["train", "--resume", str(manifest.parent)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_report_of_any_log(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for value in (10**400, "\ud800", None, [], {}, "text", True, -1, float("nan")):
        broken = [json.dumps({**entry, key: value}) for entry in entries for key in entry]
        (run / "log.jsonl").write_text("\n".join([*broken, *lines, '{"event": "unknown"}', "3", broken[0][:20]]))
        write_report(run)
    (run / "log.jsonl").write_bytes(b"\xff\x00{" * 100)
    write_report(run)
