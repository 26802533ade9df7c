"""A run with a selection for each teacher, with weights by flow time or raw scores; and checkpoints of format 1."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from agrepa_fast import LayerSelection, read_selection
from agrepa_fast.alignment.selection import write_selection
from agrepa_fast.attribution.files import read_scores
from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import load_checkpoint, write_manifest
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.trainer import Trainer

TEACHERS = "alignment.teachers={voice: {domains: [speech]}, sound: {domains: [audio]}}"
EACH = (TEACHERS, "alignment.selection_per=teacher")
# Probes before the steps 1 to 4, and checkpoints after every step.
SHORT = ("train.samples=0", "train.steps=5", "train.valid_every=5", "train.keep=9", "train.checkpoint_every=1")
SHORT += ("probe.start=1", "probe.every=1", "alignment.stop=1.0")


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """The report takes longer than the steps: it is written where a test looks at it."""
    monkeypatch.setattr("agrepa_fast.training.trainer.write_report", lambda run_dir: run_dir)


@pytest.mark.parametrize(
    "changes",
    [
        ("alignment.weights=by-time", "train.diagnose_every=4"),
        ("alignment.weights=by-time", "alignment.pool=null", "alignment.timestep_weight=data"),
        ("alignment.weights=score", "alignment.pool=null"),
        ("alignment.policy=stored", "probe.samples=4", "data.valid_share=0.6"),
        ("alignment.policy=gradient-norm", "alignment.stop_similarity=0.02"),
    ],
    ids=["by-time", "by-time-frames", "score-frames", "stored", "gradient-norm"],
)
def test_a_run_with_a_selection_for_each_teacher_and_its_resume(
    tiny_config, capsys, changes, state_bits, assert_same_bits
):
    config = tiny_config(*EACH, *SHORT, "probe.margin=0.0", *changes)
    run_dir = start_run(config).run()
    whole = state_bits(run_dir)
    selection = read_selection(run_dir / "selection.json")
    log = read_log(run_dir / "log.jsonl")
    probes = [entry for entry in log if entry["event"] == "probe"]
    assert [entry["step"] for entry in probes] == [1, 2, 3, 4]
    assert set(selection) == set(probes[-1]["selection"]["teachers"]) == set(probes[-1]["scores"]) == {"voice", "sound"}
    assert probes[-1]["scores"]["voice"] != probes[-1]["scores"]["sound"]
    # Cosines are those of each teacher's own layers.
    valid = [entry for entry in log if entry["event"] == "valid"][-1]
    expected = {f"cosine/{name}/{layer}" for name, own in selection.items() for layer in own.layers}
    assert {key for key in valid if key.startswith("cosine/")} == expected
    # From a checkpoint after two probes to the same bits.
    resume_run(run_dir / "checkpoints" / "step_00000003").run()
    assert_same_bits(whole, state_bits(run_dir))
    assert read_selection(run_dir / "selection.json") == selection
    if config.alignment.weights == "share":
        return
    scores = read_scores(run_dir / "foga.csv")
    by_hand = {name: scores.domain(domain) for name, domain in (("voice", "speech"), ("sound", "audio"))}
    logged = probes[-1]["scores"]
    for name, own in by_hand.items():
        parts = [own.at(0.2), own.at(0.7)] if config.alignment.weights == "by-time" else [own]
        rows = logged[name] if config.alignment.weights == "by-time" else [logged[name]]
        assert rows == [pytest.approx(part.mean.tolist()) for part in parts]
    if config.alignment.weights == "score":
        average = probes[-1]["average"]["voice"]
        assert selection["voice"].weights == tuple(average[layer] for layer in selection["voice"].layers)
    else:
        assert selection["voice"].t_grid == (0.2, 0.7)
    if config.alignment.pool is not None:
        return
    capsys.readouterr()
    assert main(["probe", str(run_dir), "--out", str(run_dir / "probe")]) == 0
    again = read_selection(run_dir / "probe" / "selection.json")
    assert {name: own.weighting for name, own in again.items()} == dict.fromkeys(again, config.alignment.weights)
    assert "selected (0-based): voice: " in capsys.readouterr().out


def to_format_1(folder) -> None:
    """Write a checkpoint as the first version of the format had it."""
    heads = load_file(folder / "heads.safetensors")
    for name in ("weights", "selected"):
        values = [heads.pop(f"alignment.layer_weights.{teacher}.{name}") for teacher in ("voice", "sound")]
        assert values[0].equal(values[1])
        heads[f"alignment.{name}"] = values[0]
    save_file(heads, folder / "heads.safetensors")
    state = torch.load(folder / "state.pt", weights_only=True)
    state |= {"format": 1, "average": state["average"][""][0] if state["average"] else None}
    torch.save(state, folder / "state.pt")
    config = (folder / "config.yaml").read_text().splitlines()
    kept = [line for line in config if not line.strip().startswith(("selection_per:", "weights:"))]
    assert len(kept) == len(config) - 2
    (folder / "config.yaml").write_text("\n".join(kept) + "\n")
    write_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


@pytest.mark.parametrize("pool", ["mean", "null"])
def test_a_checkpoint_of_format_1_goes_on_to_the_same_bits(tiny_config, pool, state_bits, assert_same_bits):
    run_dir = start_run(tiny_config(TEACHERS, *SHORT, f"alignment.pool={pool}")).run()
    whole = state_bits(run_dir)
    for step in (1, 3):  # before the first probe, and after two
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        to_format_1(folder)
        resume_run(folder).run()
        assert_same_bits(whole, state_bits(run_dir))


def test_a_resume_with_another_kind_of_selection_is_refused_in_one_line(tiny_config):
    run_dir = start_run(tiny_config(TEACHERS, *SHORT)).run()
    folder = load_checkpoint(run_dir / "checkpoints" / "step_00000003").path
    for change, message in (
        (
            "alignment.selection_per=teacher",
            "^alignment.selection_per: the run has aligned with 'run' .* got 'teacher'",
        ),
        ("alignment.weights=by-time", "^alignment.weights: the run has aligned with 'share' .* got 'by-time'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            resume_run(folder, [change])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["alignment.weights=scores"], "alignment.weights: expected one of share, score, by-time, got 'scores'"),
        (["alignment.selection_per=domain"], "alignment.selection_per: expected one of run, teacher, got 'domain'"),
        (
            ["alignment.weights=by-time", "alignment.policy=deepest"],
            "alignment.weights: expected share with alignment.policy deepest, .* got by-time",
        ),
        (
            ["alignment.weights=score", "alignment.layers=[0]"],
            "alignment.weights: expected share with alignment.layers, .* got score",
        ),
        (
            ["alignment.weights=by-time", "alignment.objective=cka"],
            "alignment.weights: expected share or score with pooled cka, .* got by-time",
        ),
    ],
)
def test_wrong_choices_are_named(tiny_config, changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(*changes)


def test_a_teacher_without_a_probed_clip_is_named_before_training(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    config = tiny_config(*EACH, "probe.samples=1")
    with pytest.raises(UserError, match=r"alignment.selection_per: none of the probe's 1 clips .* '(voice|sound)' \("):
        Trainer(config, tmp_path / "run")


RELEASED = {"voice": LayerSelection((0, 2), (0.334, 0.118), "foga", "score"), "sound": LayerSelection.uniform([1])}
BY_TIME = LayerSelection.by_time((0.25, 0.75), {0: (1.0, 0.0), 2: (0.0, 1.0)})


def test_a_given_file_may_hold_a_selection_for_each_teacher(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "selection.json"

    def trainer(*changes) -> Trainer:
        return Trainer(tiny_config(f"alignment.selection={file}", TEACHERS, *changes), tmp_path / "run")

    write_selection(RELEASED, file)
    made = trainer()
    assert made.selection == RELEASED
    torch.testing.assert_close(made.objective.alignment.weights, torch.tensor([[0.334, 0, 0.118], [0, 1, 0]]))
    with pytest.raises(UserError, match=r"one for each of the teachers \['spectral'\], got \['voice', 'sound'\] \("):
        trainer("alignment.teachers={spectral: {}}")
    write_selection(BY_TIME, file)
    assert trainer("alignment.weights=by-time").objective.alignment.by_time
    with pytest.raises(UserError, match=r"built for weights that do not change with t \(.*alignment.weights"):
        trainer()
    with pytest.raises(UserError, match=r"at 2 times, the loss was built for .* at 3 times \(.*probe.t_grid\)"):
        trainer("alignment.weights=by-time", "probe.t_grid=[0.1,0.2,0.3]")
    write_selection({**RELEASED, "sound": LayerSelection.uniform([3])}, file)
    with pytest.raises(UserError, match="selection: layer 3 does not exist, the model has layers 0 to 2"):
        trainer()
