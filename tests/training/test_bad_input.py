"""Mistakes in the input end in one line that names what is wrong, and exit code 2."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.cli import main
from agrepa_fast.data import dataset
from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import write_manifest
from agrepa_fast.training.start import start_run


def fails(capsys, arguments: list[str]) -> str:
    """Run the command line; the one line of its error."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    [line] = [line for line in error.splitlines() if line.startswith("agrepa: error: ")]
    assert "Traceback" not in error
    return line


def damage(clips, kind: str):
    """Make the clip of the manifest's third line unreadable; returns its path."""
    path = clips.parent / clips.read_text().splitlines()[2].split("|")[0]
    rate, silence = 16000, np.zeros(16000, dtype=np.float32)
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "corrupt":
        path.write_bytes(b"RIFF not really a wave file")
    elif kind == "silent":
        soundfile.write(path, silence, rate)
    elif kind == "nan":
        soundfile.write(path, np.full(16000, np.nan, dtype=np.float32), rate, subtype="FLOAT")
    elif kind == "short":
        soundfile.write(path, np.ones(100, dtype=np.float32), rate)
    return path


NO_PROBE = ["alignment.enabled=false", "probe.start=9"]
KINDS = ["missing", "empty", "corrupt", "silent", "nan", "short"]


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_audio_beyond_the_share_stops_the_run(capsys, clips, tiny, kind):
    path = damage(clips, kind)
    line = fails(capsys, ["train", "demo", *tiny(f"data.train=[{clips}]", "data.unreadable_share=0")])
    assert path.name in line
    assert "metadata.csv:3" in line


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_audio_within_the_share_is_listed_and_skipped(clips, tiny_config, kind):
    path = damage(clips, kind)
    config = tiny_config(
        f"data.train=[{clips}]", "data.unreadable_share=0.6", "train.steps=1", "train.samples=0", *NO_PROBE
    )
    run_dir = start_run(config).run()
    [entry] = [e for e in read_log(run_dir / "log.jsonl") if e["event"] == "skipped"]
    assert entry["path"] == str(path)
    assert entry["source"].endswith("metadata.csv:3")
    assert path.name in (run_dir / "report.html").read_text()


def test_silence_in_a_large_data_set_is_found_where_it_is_used(capsys, clips, tiny, tiny_config, monkeypatch):
    monkeypatch.setattr(dataset, "SMALL_BYTES", 0)
    for row in clips.read_text().splitlines()[2:8]:
        soundfile.write(clips.parent / row.split("|")[0], np.zeros(16000 + len(row), dtype=np.float32), 16000)
    changes = [f"data.train=[{clips}]", "train.steps=4", *NO_PROBE]
    run_dir = start_run(tiny_config(*changes, "data.unreadable_share=0.9")).run()
    entries = [e for e in read_log(run_dir / "log.jsonl") if e["event"] == "skipped"]
    assert entries
    assert {entry["reason"] for entry in entries} == {"silent (no sample reaches 0.0001)"}
    line = fails(capsys, ["train", "demo", *tiny(*changes, "data.unreadable_share=0", "train.name=other")])
    assert "clips cannot be read, at most 0%" in line
    assert ".wav" in line


def test_a_single_missing_file_is_named(capsys, tmp_path, tiny):
    (tmp_path / "one.csv").write_text("audio_file|text\ngone.wav|hello\n")
    assert "gone.wav" in fails(capsys, ["train", "demo", *tiny(f"data.train=[{tmp_path / 'one.csv'}]")])


def test_too_few_clips_to_hold_any_out(capsys, clips, tiny):
    header, first, *_ = clips.read_text().splitlines()
    clips.write_text(f"{header}\n{first}\n")
    assert "data.valid" in fails(capsys, ["train", "demo", *tiny(f"data.train=[{clips}]")])


@pytest.mark.parametrize(
    "change, words",
    [
        ("train.stpes=3", ["train.stpes", "'steps'"]),
        ("modle.width=3", ["modle", "'model'"]),
        ("train.steps=many", ["train.steps", "int", "many"]),
        ("train.steps=0", ["train.steps", "at least 1"]),
        ("model.width=33", ["model", "width"]),
        ("probe.k=4", ["probe.k", "1 to model.depth (3)"]),
        ("data.train=[nowhere.csv]", ["nowhere.csv"]),
        ("train.device=cuda:7", ["cuda:7"]),
        ("train.precision=fp8", ["train.precision", "fp8"]),
        ("alignment.teachers={x: {source: spectrla}}", ["spectrla", "'spectral'"]),
        ("alignment.teachers={x: {source: spectral, domains: [speach]}}", ["alignment.teachers.x", "speach"]),
        ("alignment.selection=gone.json", ["gone.json"]),
        ("probe.start=8", ["probe.start", "8"]),
        ("train.vocoder=somewhere", ["train.vocoder", "griffin-lim"]),
        ("nonsense", ["nonsense", "section.field=value"]),
    ],
)
def test_configuration(capsys, tiny, change, words):
    line = fails(capsys, ["train", "demo", *tiny(change)])
    for word in words:
        assert word in line


def test_presets_and_files(capsys, tmp_path):
    assert "'demo'" in fails(capsys, ["train", "dmeo"])
    assert "gone.yaml" in fails(capsys, ["train", str(tmp_path / "gone.yaml")])
    (tmp_path / "bad.yaml").write_text("train:\n  steps: [1\n")
    assert "bad.yaml:3" in fails(capsys, ["train", str(tmp_path / "bad.yaml")])
    (tmp_path / "key.yaml").write_text("train:\n  setps: 3\n")
    line = fails(capsys, ["train", str(tmp_path / "key.yaml")])
    assert "key.yaml" in line
    assert "train.setps" in line
    assert "'steps'" in line


def test_an_empty_manifest(capsys, tmp_path, tiny):
    (tmp_path / "none.csv").write_text("audio_file|text\n")
    assert "none.csv" in fails(capsys, ["train", "demo", *tiny(f"data.train=[{tmp_path / 'none.csv'}]")])


def test_a_run_is_not_overwritten(capsys, tiny, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "log.jsonl").write_text("")
    assert "--resume" in fails(capsys, ["train", "demo", *tiny()])


@pytest.fixture
def finished(tiny_config):
    return start_run(tiny_config("train.steps=4", "train.samples=0")).run()


def test_checkpoints_that_do_not_fit(capsys, finished, tmp_path):
    newest = finished / "checkpoints" / "step_00000004"
    assert "nowhere" in fails(capsys, ["probe", str(tmp_path / "nowhere")])
    line = fails(capsys, ["train", "--resume", str(finished), "model.width=32"])
    assert "model.safetensors: conditioner" not in line
    assert "network.input.weight is [16, 40], the configuration needs [32, 40]" in line
    other = "alignment.teachers={other: {source: spectral}}"
    assert "heads.safetensors" in fails(capsys, ["train", "--resume", str(finished), other])
    assert "train.steps" in fails(capsys, ["train", "--resume", str(finished), "train.steps=9"])
    with open(newest / "ema.safetensors", "wb") as file:
        pickle.dump({"weights": [1, 2, 3]}, file)
    assert "ema.safetensors: damaged" in fails(capsys, ["sample", str(newest), "--text", "hi"])
    write_manifest(newest)
    line = fails(capsys, ["sample", str(finished), "--text", "hi"])
    assert "ema.safetensors" in line
    assert "pickle" in line


class Canary:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_checkpoint_is_executed(capsys, finished, tmp_path):
    newest = finished / "checkpoints" / "step_00000004"
    torch.save({"step": Canary(tmp_path / "canary")}, newest / "state.pt")
    write_manifest(newest)
    assert "state.pt" in fails(capsys, ["train", "--resume", str(finished)])
    assert not (tmp_path / "canary").exists()


def test_sample_arguments(capsys, finished, tmp_path):
    assert "--text" in fails(capsys, ["sample", str(finished), "--text", ""])
    # A shell's argument in bytes that are not UTF-8 reaches Python as a lone surrogate.
    assert "--text: the text is not valid: the byte 0xff" in fails(
        capsys, ["sample", str(finished), "--text", "\udcff"]
    )
    reference_text = ["sample", str(finished), "--text", "a", "--reference-text", "\ud83d"]
    assert "--reference-text: the text" in fails(capsys, reference_text)
    assert "--seconds" in fails(capsys, ["sample", str(finished), "--text", "a", "--seconds", "0"])
    assert "--seconds" in fails(capsys, ["sample", str(finished), "--text", "a", "--seconds", "999"])
    assert "gone.wav" in fails(capsys, ["sample", str(finished), "--text", "a", "--reference", "gone.wav"])
    where = str(tmp_path / "no" / "such" / "a.wav")
    assert where in fails(capsys, ["sample", str(finished), "--text", "a", "--out", where])


def test_no_place_to_write(capsys, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails(capsys, ["train", "demo", *tiny(f"train.out={tmp_path / 'file'}")])
