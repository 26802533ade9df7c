"""The command line: help, probe and sample of a finished run, doctor."""

from __future__ import annotations

import json

import pytest
import soundfile
import torch

from agrepa_fast.attribution.scores import read_scores
from agrepa_fast.cli import main
from agrepa_fast.training.trainer import start_run


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory):
    from agrepa_fast.training.config import load_config

    from .conftest import TINY

    out = tmp_path_factory.mktemp("runs")
    changes = [*TINY, f"data.train=[{manifest}]", f"train.out={out}", "train.samples=0"]
    return start_run(load_config("demo", changes)).run()


@pytest.mark.parametrize("command", ["train", "probe", "sample"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"agrepa {command} " in capsys.readouterr().out.partition("examples:")[2]


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in output
    assert "ops" in output


def test_probe_writes_scores_pictures_and_a_selection(capsys, finished, tmp_path):
    assert main(["probe", str(finished), "--out", str(tmp_path), "--t", "0.3", "0.6", "--k", "1"]) == 0
    scores = read_scores(tmp_path / "foga.csv")
    assert scores.layers == (0, 1, 2)
    assert sorted({round(t, 3) for t in scores.t.tolist()}) == [0.3, 0.6]
    selection = json.loads((tmp_path / "selection.json").read_text())
    assert selection["layers"] == [int(scores.mean.argmax())]
    assert {path.name for path in tmp_path.iterdir()} >= {"foga.png", "foga_map.png", "foga.json"}
    output = capsys.readouterr().out
    assert f"selected (0-based): {selection['layers'][0]} (1.000)" in output


def test_probe_of_branches_on_other_data(finished, manifest, tmp_path):
    arguments = ["probe", str(finished), "--data", str(manifest), "--branches", "attn", "ff", "--samples", "3"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    scores = read_scores(tmp_path / "foga.csv")
    assert scores.names == ("0.attn", "0.ff", "1.attn", "1.ff", "2.attn", "2.ff")
    assert scores.by_sample.shape[1] == 3 * 2


def test_sample_with_a_reference(finished, manifest, tmp_path):
    reference = manifest.parent / manifest.read_text().splitlines()[1].split("|")[0]
    out = tmp_path / "out.wav"
    arguments = ["sample", str(finished), "--text", "seven", "--seconds", "0.5", "--out", str(out)]
    assert main(arguments) == 0
    alone, rate = soundfile.read(out)
    assert rate == 16000
    assert abs(len(alone) - 0.5 * rate) <= 256
    assert main([*arguments, "--reference", str(reference), "--reference-text", "one", "--points", "4"]) == 0
    continued, _ = soundfile.read(out)
    assert abs(len(continued) - 0.5 * rate) <= 512
    assert (continued[: len(alone)] != alone[: len(continued)]).any()
