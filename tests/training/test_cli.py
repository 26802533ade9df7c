"""The command line: help, probe and sample of a finished run, doctor."""

from __future__ import annotations

import builtins
import json
import re
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from agrepa_fast.attribution.files import read_scores
from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.teachers import build_teacher
from agrepa_fast.training.start import start_run


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


@pytest.mark.parametrize("error", [OSError("undefined symbol: _ZN2at4_ops"), RuntimeError("different CUDA versions")])
def test_a_torchaudio_that_does_not_fit_is_named(capsys, monkeypatch, error):
    """So it fails where it was built for another torch; teachers and audio say the same as doctor."""
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == "torchaudio":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    message = f"torchaudio does not fit torch {torch.__version__} ({error})"
    assert main(["doctor"]) == 0
    assert message in capsys.readouterr().out
    with pytest.raises(UserError, match=re.escape(message)):
        build_teacher("spectral")


def test_probe_writes_scores_pictures_and_a_selection(capsys, finished, tmp_path):
    assert main(["probe", str(finished), "--out", str(tmp_path), "--t", "0.3", "0.6", "--k", "1"]) == 0
    scores = read_scores(tmp_path / "foga.csv")
    assert scores.layers == (0, 1, 2)
    assert sorted({round(t, 3) for t in scores.t.tolist()}) == [0.3, 0.6]
    selection = json.loads((tmp_path / "selection.json").read_text())
    assert selection["layers"] == [int(scores.mean.argmax())]
    assert {path.name for path in tmp_path.iterdir()} >= {
        "foga.png",
        "foga_map.png",
        "foga.json",
        "foga_layers.csv",
        "foga_map.csv",
        "foga_map.json",
    }
    output = capsys.readouterr().out
    assert f"selected (0-based): {selection['layers'][0]} (1.000)" in output
    assert f"a layer without effect would score {scores.noise_floor:.2g}; not above it: none" in output


def test_probe_with_lasp(capsys, finished, manifest, tmp_path):
    arguments = ["probe", str(finished), "--data", str(manifest), "--out", str(tmp_path), "--k", "1"]
    assert main([*arguments, "--lasp"]) == 0
    lines = (tmp_path / "lasp_layers.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,layer,sem_sim,evt_sim,sem_cka,evt_cka"
    assert [line.split(",")[0] for line in lines[1:]] == ["8"] * 3
    assert {path.name for path in tmp_path.iterdir()} >= {"scd.json", "scd.csv", "scd.png", "foga_layers.csv"}
    output = capsys.readouterr().out
    assert "speech: " in output
    assert "of the 1 most used layers are among the most stored, Spearman " in output
    assert main([*arguments, "--lasp", "--branches", "ff"]) == 2
    assert "--lasp: what a layer stores is asked of whole layers" in capsys.readouterr().err
    assert main(["probe", str(finished), "--out", str(tmp_path), "--lasp"]) == 2
    assert "--lasp: no domain has three clips" in capsys.readouterr().err


FACTORY = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for size in (0.1, 2.0, 0.5))

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return x * t[:, None, None]


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x * (1 + self.size)


def named():
    return Model(), {"x": torch.ones(4, 2, 3), "t": torch.rand(4) + 0.5}


def with_options():
    return Model(), (torch.ones(4, 2, 3), torch.ones(4)), {"domains": ["a", "b"] * 2, "metric": "squared"}


def wrong():
    return Model()


def integers():
    return Model(), {"x": torch.ones(4, 2, 3).long(), "t": torch.ones(4).long()}


def one_value():
    return Model(), {"x": torch.tensor(1.0), "t": torch.tensor(1.0)}


def strange_options():
    return Model(), (torch.ones(4, 2, 3), torch.ones(4)), 3


def unknown_option():
    return Model(), (torch.ones(4, 2, 3), torch.ones(4)), {"colour": 3}


def needs(argument):
    return argument


def raises():
    raise RuntimeError("no weights\\nat all")


def leaves():
    raise SystemExit(3)


number = 3


def bad_inputs():
    return Model(), {"x": torch.ones(0, 2, 3), "t": torch.ones(0)}
"""


@pytest.fixture
def factory_module(tmp_path, monkeypatch):
    (tmp_path / "probed_model.py").write_text(FACTORY)
    (tmp_path / "broken_syntax.py").write_text("def (:\n")
    (tmp_path / "broken_exit.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "probed_model", raising=False)
    yield "probed_model"
    sys.modules.pop("probed_model", None)


def test_probe_of_an_importable_model(capsys, factory_module):
    """Without block k the velocity is 1 / (1 + size) of what it was: a change of size / (1 + size)."""
    path = list(sys.path)
    assert main(["probe", f"{factory_module}:named", "--k", "2"]) == 0
    scores = read_scores("probe/foga.csv")
    assert scores.mean.tolist() == pytest.approx([0.1 / 1.1, 2 / 3, 0.5 / 1.5], rel=1e-5)
    assert json.loads(Path("probe/selection.json").read_text())["layers"] == [1, 2]
    assert Path("probe/foga_map.png").exists()
    assert "selected (0-based): 1 (0.667), 2 (0.333)" in capsys.readouterr().out
    assert sys.path == path


def test_options_of_the_factory_and_of_the_command_line(factory_module):
    assert main(["probe", f"{factory_module}:with_options", "--out", "one"]) == 0
    scores = read_scores("one/foga.csv")
    assert scores.domains == ("a", "b") * 2
    assert scores.mean.tolist() == pytest.approx([(0.1 / 1.1) ** 2, 4 / 9, 1 / 9], rel=1e-5)
    assert main(["probe", f"{factory_module}:with_options", "--out", "two", "--metric", "rms"]) == 0
    assert read_scores("two/foga.csv").mean.tolist() == pytest.approx([0.1 / 1.1, 2 / 3, 1 / 3], rel=1e-5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("probed_model:missing", [], "the module probed_model has no 'missing'"),
        ("no_such_module:named", [], "No module named 'no_such_module'"),
        (":f", [], "expected the name of a module"),
        ("..:f", [], "expected the name of a module"),
        ("probed_model:", [], "has no ''"),
        ("probed_model:number", [], "expected a function, got int"),
        ("probed_model:integers", [], "floating"),
        ("probed_model:one_value", [], "expected at least one tensor with the samples"),
        ("probed_model:strange_options", [], "expected options as a dict, got int"),
        ("probed_model:unknown_option", [], "unexpected keyword argument 'colour'"),
        ("probed_model:needs", [], "missing 1 required positional argument"),
        ("probed_model:raises", [], "RuntimeError: no weights"),
        ("probed_model:leaves", [], "SystemExit: 3"),
        ("broken_syntax:f", [], "SyntaxError"),
        ("broken_exit:f", [], "SystemExit"),
        ("probed_model:wrong", [], "expected it to return (model, inputs)"),
        ("probed_model:bad_inputs", [], "inputs: expected at least one sample"),
        ("probed_model:named", ["--data", "x.csv"], "--data: only for a checkpoint"),
        ("probed_model:named", ["--lasp"], "--lasp: only for a checkpoint"),
        (
            "probed_model:named",
            ["--branches", "attn"],
            "branches: no block has a module 'attn'; the modules of blocks.0 are: none",
        ),
        ("probed_model:named", ["--k", "4"], "--k: expected 1 to 3 layers, got 4"),
    ],
)
def test_mistakes_with_a_factory_are_one_line(capsys, factory_module, name, options, message):
    assert main(["probe", name, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


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


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seconds", "0.001"], "--seconds: expected 0."),
        (["--seconds", "-1"], "--seconds: expected more than 0"),
        (["--seconds", "inf"], "argument --seconds: expected a finite number, got 'inf'"),
        (["--seconds", "nan"], "argument --seconds: expected a finite number"),
        (["--seconds", "1e300"], "--seconds: expected 0."),
        (["--seed", "99999999999999999999"], "argument --seed: expected a whole number from 0 to"),
        (["--seed", "-1"], "argument --seed: expected a whole number"),
        (["--guidance", "inf"], "argument --guidance: expected a finite number"),
        (["--guidance", "nan"], "argument --guidance: expected a finite number"),
        (["--guidance", "1e300"], "flow.guidance: expected"),
        (["--points", "0"], "flow.points: expected"),
        (["--points", "9" * 30], "flow.points: expected"),
        (["--out", "missing/folder/a.wav"], "missing/folder/a.wav"),
        (["--out", "."], "--out .: expected a file"),
    ],
)
def test_mistakes_with_sample_are_one_line(capsys, finished, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["sample", str(finished), "--text", "seven", *options])
    except SystemExit as error:  # of argparse, after its usage
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "sample.wav").exists()


def test_sample_without_finite_audio_is_one_line(capsys, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("agrepa_fast.training.inference.generate", lambda *_: torch.full((1, 20, 80), torch.nan))
    assert main(["sample", str(finished), "--text", "seven", "--out", str(tmp_path / "a.wav")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite: give a smaller --guidance" in line
