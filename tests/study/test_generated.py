"""What a study measures of generated audio: which runs, what is kept, and its means and differences over seeds."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest

from agrepa_fast.cli import main
from agrepa_fast.evaluation.metric import MissingPackage
from agrepa_fast.study import generated
from agrepa_fast.study.generated import EVALUATED, Number, read_numbers, summary
from agrepa_fast.study.plan import FINAL
from agrepa_fast.study.tables import generated_table
from agrepa_fast.study.work import Outcome, work

LINES = "seeds: [0]\narms: [none, shallowest]\nevaluate: {arms: [none], clips: 2, mos: none}\n"
EVALUATION = {
    "metrics": [
        {
            "title": "Word error rate",
            "columns": {"WER": "lower", "CER": "lower"},
            "rows": [
                {
                    "name": "reference",
                    "kind": "reference",
                    "domain": "speech",
                    "clips": 2,
                    "values": {"WER": {"value": 0.25}},
                },
                {"name": "seed-0", "kind": "run", "domain": "speech", "clips": 2, "values": {"WER": {"value": 0.75}}},
            ],
        }
    ]
}


def wer(of: str, value: float) -> Number:
    return Number("Word error rate", "WER", "speech", of, "lower", 2, value)


@pytest.fixture
def evaluations(monkeypatch):
    """The options of each call of `agrepa evaluate`, which a function stands in for; `answer` is what it ends with."""
    calls = SimpleNamespace(options=[], answer=0)

    def run(command, **_):
        assert command[1:4] == ["-m", "agrepa_fast", "evaluate"]
        calls.options.append(command[5:])
        folder = generated.Path(command[4]) / "evaluation"
        if calls.answer == 0:
            folder.mkdir(exist_ok=True)
            (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
        return subprocess.CompletedProcess(command, calls.answer, "table", "note\nagrepa: error: no such list\n")

    monkeypatch.setattr(generated.subprocess, "run", run)
    return calls


def trained(plan, name):
    """A run of the plan, trained."""
    [run] = [run for run in plan.jobs if run.arm.name == name]
    assert work(run.warmup) == work(run) == Outcome()
    return run


def test_a_run_is_evaluated_once_with_the_same_options(plan_of, evaluations):
    plan = plan_of(LINES)
    run, other = trained(plan, "none"), trained(plan, "shallowest")
    assert evaluations.options == [["--clips", "2", "--mos", "none"]]
    assert read_numbers(run.folder) == [wer("reference", 0.25), wer("run", 0.75)]
    assert run.finished
    assert other.finished
    assert not (other.folder / EVALUATED).exists()
    final = (run.folder / FINAL).read_bytes()
    assert work(run) == Outcome()
    assert len(evaluations.options) == 1
    changed = next(each for each in plan_of(LINES.replace("clips: 2", "clips: 3")).jobs if each.arm.name == "none")
    assert not changed.finished
    assert changed.trained
    assert work(changed) == Outcome()
    assert evaluations.options[1:] == [["--clips", "3", "--mos", "none"]]
    assert (run.folder / FINAL).read_bytes() == final, "nothing is trained again"


def test_a_failed_evaluation_is_named_and_tried_again(plan_of, evaluations):
    [run] = plan_of(LINES.replace("[none, shallowest]", "[none]")).jobs
    evaluations.answer = 2
    assert work(run.warmup) == Outcome()
    assert work(run) == Outcome("agrepa evaluate: no such list")
    assert run.trained
    assert not run.finished
    evaluations.answer = 0
    assert work(run) == Outcome()
    assert run.finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("reference: nowhere", "nowhere: no such manifest file or folder"),
        ("device: cuda:99", "--device: no cuda:99 here"),
        ("imports: no_such_module", "--imports"),
        ("mos: nope", "nope"),
        ("speaker: resemblyzer", "resemblyzer needs x: pip install 'agrepa-fast[speaker]', or leave the metric out"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_before_the_training(
    study_file, tmp_path, capsys, monkeypatch, options, message
):
    def without_package(*_):
        raise MissingPackage("resemblyzer needs x: pip install 'agrepa-fast[speaker]'")

    monkeypatch.setattr("agrepa_fast.evaluation.speaker.build_speaker", without_package)
    rest = {"fad": "none", "asr": "none", "mos": "none", "speaker": "none"}
    rest.pop(options.partition(":")[0], None)
    lines = ", ".join([options, *(f"{name}: {value}" for name, value in rest.items())])
    path = study_file(f"seeds: [0]\narms: [none]\nevaluate: {{{lines}}}\n")
    assert main(["study", str(path), "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"agrepa: error: {path}: evaluate: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_means_and_differences_are_over_seeds_and_draws_first():
    arms = {
        "none": {1: [[wer("reference", 0.2), wer("run", 0.8)]], 2: [[wer("reference", 0.4), wer("run", 0.6)]]},
        "random": {1: [[wer("run", 0.5)], [wer("run", 0.7)]], 3: [[wer("run", 0.1)]]},
        "foga": {},
    }
    [number] = summary(arms, 200)
    assert (number["column"], number["better"], number["clips"]) == ("WER", "lower", [2])
    assert number["recordings"]["reference"]["value"] == pytest.approx(0.3)
    assert number["recordings"]["resynthesised"] is None
    none, random = number["arms"]
    assert none["mean"]["value"] == pytest.approx(0.7)
    assert none["less_none"] is None
    assert random["mean"]["by_seed"] == pytest.approx({"1": 0.6, "3": 0.1})
    assert random["less_none"]["by_seed"] == pytest.approx({"1": -0.2})
    assert (random["less_none"]["lower"], random["less_none"]["seeds"]) == (1, 1)
    assert random["less_none"]["low"] is None, "one seed has no interval"
    both = summary({**arms, "foga": {1: [[wer("run", 0.7)]], 2: [[wer("run", 0.4)]]}}, 200)[0]["arms"][2]["less_none"]
    assert both["value"] == pytest.approx(-0.15)
    assert (both["low"], both["high"]) == pytest.approx((-0.2, -0.1)), "resamples of two seeds"
    _, rows = generated_table({"generated": [number]})
    assert [row[1] for row in rows] == ["reference", "none", "random"]
    assert rows[2][0] == "WER (speech, lower is better)"
    assert rows[2][3] == "-0.20000 (1 of 1)"


def test_agrepa_evaluate_measures_a_run_of_a_study(study_file, read_results):
    """The command itself, with the one metric that needs no package of its own."""
    path = study_file(
        "seeds: [0]\narms: [none]\nevaluate: {clips: 2, fad: none, asr: none, mos: none, speaker: none}\n"
    )
    assert main(["study", str(path), "--workers", "0"]) == 0
    generated_numbers = read_results()["settings"][0]["generated"]
    assert {number["column"] for number in generated_numbers} == {"MCD (dB)", "log-mel"}
    for number in generated_numbers:
        assert number["arms"][0]["mean"]["value"] > number["recordings"]["resynthesised"]["value"] > 0
