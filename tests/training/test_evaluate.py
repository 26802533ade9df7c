"""`agrepa evaluate` from end to end on a tiny run; recogniser, opinion and speaker are small functions."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.cli import main
from agrepa_fast.data.audio import read_audio
from agrepa_fast.data.mel import LogMel
from agrepa_fast.training import synthesis
from agrepa_fast.training.config import load_config
from agrepa_fast.training.start import start_run

FUNCTIONS = """
import numpy as np

def listen(x, rate):
    return "one two"

def opinion(x, rate):
    return float(np.abs(x).mean())

def embed(x, rate):
    return [1.0, float(np.abs(x).mean()), len(x) / rate]
"""
LIGHT = ["--asr", "mymetrics:listen", "--mos", "mymetrics:opinion", "--speaker", "mymetrics:embed"]
NOTHING = ["--fad", "none", "--asr", "none", "--mos", "none", "--speaker", "none"]


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory) -> Path:
    from .conftest import TINY

    out = tmp_path_factory.mktemp("runs")
    changes = [*TINY, f"data.train=[{manifest}]", f"train.out={out}", "train.samples=0", "data.valid_share=0.4"]
    return start_run(load_config("demo", changes)).run()


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "mymetrics.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mymetrics", None)


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """The run and its first checkpoint, side by side: the run's folder and what was written."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "mymetrics.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first = finished / "checkpoints" / "step_00000004"
        assert main(["evaluate", str(finished), str(first), *LIGHT, "--clips", "6"]) == 0
    sys.modules.pop("mymetrics", None)
    return finished, json.loads((finished / "evaluation" / "evaluation.json").read_text())


def table(result, key):
    return next(metric for metric in result["metrics"] if metric["key"] == key)


def test_every_table_has_every_row(evaluated) -> None:
    _, result = evaluated
    names = ["reference", "resynthesised (griffin-lim)", "tiny", "tiny-step_00000004"]
    keys = ["fad/spectral", "wer", "mos/mymetrics:opinion", "speaker", "spectral"]
    assert [metric["key"] for metric in result["metrics"]] == keys
    for metric in result["metrics"]:
        assert list(dict.fromkeys(row["name"] for row in metric["rows"])) == names
        assert metric["problem"] == ""
        for row in metric["rows"]:
            assert row["values"] or row["note"]
    assert [target["step"] for target in result["targets"]] == [8, 4]
    assert result["targets"][0]["sampler"]["points"] == 3
    domains = {row["domain"] for row in table(result, "spectral")["rows"] if row["kind"] == "run"}
    assert domains == {"all", "speech", "audio"}
    assert {row["domain"] for row in table(result, "wer")["rows"]} == {"speech"}
    [line] = [r for r in table(result, "spectral")["rows"] if r["name"] == names[3] and r["domain"] == "all"]
    assert line["clips"] == line["of"] > 2
    assert set(line["differences"]) == {"MCD (dB)", "log-mel"}
    # The vocoder alone is nearer to the recordings than a network of eight steps.
    means = {r["name"]: r["values"]["MCD (dB)"]["value"] for r in table(result, "spectral")["rows"] if r["values"]}
    assert means[names[1]] < means[names[2]]


def test_the_report_has_the_section(evaluated) -> None:
    run, _ = evaluated
    section = (run / "report.html").read_text().split('<section id="evaluation">')[1].split("</section>")[0]
    assert "Mel-cepstral distortion" in section
    assert "tiny-step_00000004" in section
    assert "Mel-cepstral distortion" in (run / "evaluation" / "evaluation.html").read_text()


def test_held_out_clips_and_no_others_are_generated(evaluated) -> None:
    run, _ = evaluated
    folder = run / "evaluation" / "audio"
    generated = {path.stem for path in (folder / "tiny").glob("*.wav")}
    assert generated == {path.stem for path in (folder / "resynthesised").glob("*.wav")}
    opened = synthesis.open_run(run, [])
    [clips, notes] = synthesis.held_out_clips([opened], [], 100)
    assert generated == {clip.path.stem for clip in clips}
    assert notes == []


def test_some_clips_of_a_list_are_not_its_first_ones(evaluated, manifest) -> None:
    run, _ = evaluated
    opened = synthesis.open_run(run, [])
    held_out, _ = synthesis.held_out_clips([opened], [], 100)
    header, *rows = manifest.read_text().splitlines()
    chosen = []
    for name, order in {"forward": rows, "backward": rows[::-1]}.items():
        manifest.with_name(f"{name}.csv").write_text("\n".join([header, *order]))
        clips, _ = synthesis.held_out_clips([opened], [str(manifest.with_name(f"{name}.csv"))], 3)
        chosen.append([clip.path for clip in clips])
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) < {clip.path for clip in held_out}


def test_the_same_numbers_again_and_in_other_batches(evaluated, capsys) -> None:
    run, result = evaluated
    assert main(["evaluate", str(run), *LIGHT, "--clips", "6", "--out", "again"]) == 0
    again = json.loads(Path("again/evaluation.json").read_text())
    for metric in result["metrics"]:
        kept = [row for row in metric["rows"] if row["name"] != "tiny-step_00000004"]
        for row, before in zip(table(again, metric["key"])["rows"], kept, strict=True):
            assert [row[key] for key in ("name", "domain", "clips", "note")] == [
                before[key] for key in ("name", "domain", "clips", "note")
            ]
            # The fixture may have run with other threads, which round otherwise.
            for name, estimate in row["values"].items():
                for bound, value in before["values"][name].items():
                    expected = value if value is None else pytest.approx(value, rel=1e-2, abs=1e-3)
                    assert estimate[bound] == expected
    assert "FAD (lower is better)" in capsys.readouterr().out


def test_noise_belongs_to_the_clip(evaluated, tmp_path) -> None:
    """One clip a batch or all in one: the same sound, apart from rounding."""
    run, _ = evaluated
    sounds = []
    for frames in (1, 10_000):
        opened = synthesis.open_run(run, [f"data.frames_per_batch={frames}"])
        clips, _ = synthesis.held_out_clips([opened], [], 3)
        reference, by_key = synthesis.reference_recordings(clips, 1.0, 0.0)
        folder = tmp_path / str(frames)
        options = {"name": "x", "seed": 1, "device": torch.device("cpu"), "weights": "ema"}
        made = synthesis.generated(opened, reference, by_key, folder, **options, progress=lambda label, items: items)
        sounds.append([read_audio(clip.path, 16_000, silent=True) for clip in made.clips])
    for one, other in zip(*sounds, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


def test_the_prompt_is_the_recording_itself(evaluated, tmp_path, monkeypatch) -> None:
    run, _ = evaluated
    opened = synthesis.open_run(run, [])
    clips, _ = synthesis.held_out_clips([opened], [], 2)
    reference, by_key = synthesis.reference_recordings(clips, 1.0, 0.25)
    mels = []
    monkeypatch.setattr(synthesis, "build_vocoder", lambda *_: lambda mel: mels.append(mel) or torch.ones(999))
    options = {"name": "x", "seed": 1, "device": torch.device("cpu"), "weights": "ema"}
    made = synthesis.generated(
        opened, reference, by_key, tmp_path / "x", **options, progress=lambda label, items: items
    )
    frames = round(0.25 * 62.5)
    sounds = [read_audio(clip.path, 16_000) for clip in by_key.values()]
    expected = [LogMel(opened.config.mel)(sound[: opened.config.mel.samples(62)]) for sound in sounds]
    for mel in mels:
        assert any(torch.equal(mel[:frames], whole[:frames]) for whole in expected)
        assert not any(torch.equal(mel[: frames + 1], whole[: frames + 1]) for whole in expected)
    assert all(clip.start == 0.25 and clip.seconds <= 0.75 for clip in made.clips)


def test_clips_that_the_run_trained_on_are_left_out(evaluated, manifest, capsys) -> None:
    run, _ = evaluated
    assert main(["evaluate", str(run), *NOTHING, "--reference", str(manifest), "--out", "x"]) == 0
    notes = json.loads(Path("x/evaluation.json").read_text())["notes"]
    trained = len(synthesis.open_run(run, []).recorded["train"])
    assert notes == [f"{trained} of 12 clips are left out, because tiny was trained on them"]
    assert notes[0] in capsys.readouterr().err


def test_what_is_not_finite_is_named(evaluated, monkeypatch) -> None:
    run, _ = evaluated
    monkeypatch.setattr(synthesis, "generate", lambda backbone, batch, *_, noise: torch.full_like(batch.mel, torch.nan))
    assert main(["evaluate", str(run), *NOTHING, "--clips", "2", "--out", "x"]) == 0
    rows = table(json.loads(Path("x/evaluation.json").read_text()), "spectral")["rows"]
    reason = "what the model generates is not finite"
    assert [(r["domain"], r["clips"], r["of"], r["values"], r["note"]) for r in rows if r["name"] == "tiny"] == [
        ("all", 0, 2, {}, f"left out 2: {reason}"),
        ("audio", 0, 1, {}, f"left out 1: {reason}"),
        ("speech", 0, 1, {}, f"left out 1: {reason}"),
    ]


def test_missing_packages_are_named_and_the_rest_is_reported(evaluated, monkeypatch, capsys) -> None:
    run, _ = evaluated
    for package in ("jiwer", "speechmos", "resemblyzer"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["evaluate", str(run), "--clips", "2", "--out", "x"]) == 0
    out = capsys.readouterr().out
    for extra in ("wer", "mos", "speaker"):
        assert f"pip install 'agrepa-fast[{extra}]'" in out
    problems = {m["title"]: bool(m["problem"]) for m in json.loads(Path("x/evaluation.json").read_text())["metrics"]}
    assert list(problems.values()) == [False, False, True, True, True]


def test_folders(evaluated, capsys) -> None:
    """What a run has written is a folder like any other: with the same text, opinions and distances."""
    run, result = evaluated
    audio = run / "evaluation" / "audio"
    tiny, reference = audio / "tiny", audio / "resynthesised"
    assert main(["evaluate", str(tiny), "--reference", str(reference), *LIGHT, "--out", "x"]) == 0
    folder = json.loads(Path("x/evaluation.json").read_text())
    for key in ("wer", "mos/mymetrics:opinion"):
        before, after = ([r for r in table(x, key)["rows"] if r["name"] == "tiny"] for x in (result, folder))
        assert [(r["domain"], r["clips"], r["values"]) for r in before] == [
            (r["domain"], r["clips"], r["values"]) for r in after
        ]
    assert {row["name"] for row in table(folder, "spectral")["rows"]} == {
        "reference",
        "resynthesised (griffin-lim)",
        "tiny",
    }
    shutil.copytree(tiny, "plain", ignore=shutil.ignore_patterns("metadata.csv"))
    capsys.readouterr()
    assert main(["evaluate", "plain", *LIGHT, "--out", "y"]) == 0
    out = capsys.readouterr().out
    assert "no recordings to compare with: give --reference" in out
    assert "no text to compare with" in out


BAD = {
    "empty": ["empty"],
    "nosuch": ["nosuch"],
    "one and a lost reference": ["sounds", "--reference", "nosuch"],
    "unknown teacher": ["sounds", "--fad", "spectrall"],
    "unknown function": ["sounds", "--mos", "mymetrics:nosuch"],
    "unknown speaker module": ["sounds", "--speaker", "nosuchmodule:f"],
    "unknown opinion": ["sounds", "--mos", "dnsmoss"],
    "unknown form": ["sounds", "--asr", "mymetrics:listen", "--text-form", "plane"],
    "no clips": ["sounds", "--clips", "0"],
    "negative prompt": ["sounds", "--prompt", "-1"],
    "prompt of a folder": ["sounds", "--prompt", "1"],
    "points of a folder": ["sounds", "--points", "3"],
    "no such device": ["sounds", "--device", "cuda:77"],
    "out is a file": ["sounds", "--out", "mymetrics.py"],
    "out is inside": ["sounds", "--out", "sounds/out"],
    "two references": ["sounds", "--reference", "sounds", "empty"],
    "no such module": ["sounds", "--imports", "nosuchmodule"],
    "nothing to read": ["broken"],
    "no reference to read": ["sounds", "--reference", "broken"],
    "no domain": ["sounds", "--domain", "A B"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, capsys, monkeypatch) -> None:
    Path("empty").mkdir()
    Path("sounds").mkdir()
    soundfile.write("sounds/a.wav", np.full(8000, 0.1), 16_000)
    Path("broken").mkdir()
    for name in "ab":
        Path("broken", f"{name}.wav").write_bytes(b"no sound")
    chosen = {word for word in BAD[case] if word.startswith("--")}
    rest = ["--fad", "none", "--asr", "none", "--mos", "none", "--speaker", "none"]
    light = [word for name, none in zip(rest[::2], rest[1::2]) if name not in chosen for word in (name, none)]
    assert main(["evaluate", *BAD[case], *light]) == 2
    error = capsys.readouterr().err
    assert error.startswith("agrepa: error: ")
    assert error.count("\n") == 1
    assert not Path("evaluation").exists()


def test_a_prompt_longer_than_every_clip(evaluated, capsys) -> None:
    run, _ = evaluated
    assert main(["evaluate", str(run), *NOTHING, "--prompt", "100", "--out", "x"]) == 2
    assert capsys.readouterr().err == "agrepa: error: --prompt: no clip lasts longer than 100 s\n"
