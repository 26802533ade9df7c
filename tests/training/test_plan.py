"""`agrepa train --plan`: its numbers are those of the run, and it refuses what the run would refuse."""

from __future__ import annotations

import json

import pytest

from agrepa_fast import cli
from agrepa_fast.report import read_log
from agrepa_fast.teachers.store import Store
from agrepa_fast.training.config import load_config
from agrepa_fast.training.extract import Extraction
from agrepa_fast.training.plan import make_plan
from agrepa_fast.training.planned_memory import step_memory
from agrepa_fast.training.start import start_run


def test_the_numbers_are_those_of_the_run(tiny_config, tmp_path, state_bits):
    config = tiny_config("probe.every=2", "data.long=windows", "data.max_seconds=0.5")
    plan = make_plan(config)
    assert not (tmp_path / "runs").exists()
    trainer = start_run(config)
    assert plan.clips.frames == trainer.feed.clips.lengths
    assert plan.clips.held_out == len(trainer.data.valid)
    assert plan.batches.steps_per_epoch == trainer.feed.plan.steps_per_epoch
    assert plan.epochs == 8 / trainer.feed.plan.steps_per_epoch
    backbone = sum(p.numel() for p in trainer.objective.backbone.parameters())
    heads = sum(p.numel() for p in trainer.objective.heads().parameters())
    assert (plan.memory.parameters, plan.memory.heads) == (backbone, heads)
    assert plan.aligned == (trainer.aligner.schedule.start, trainer.aligner.schedule.stop)
    folder = trainer.run()
    assert plan.probes == sum(event["event"] == "probe" for event in read_log(folder / "log.jsonl"))
    written = sum(t.numel() * t.element_size() for t in state_bits(folder).values() if t.is_floating_point())
    assert plan.memory.checkpoint == pytest.approx(written, rel=0.02)

    stores = {}
    for form, options in {"float32": {}, "int8": {"int8": True}, "pooled": {"pool": True}}.items():
        own = tiny_config(f"data.features={tmp_path / form}")
        stores[form] = Store(Extraction(own, ["spectral"], **options).run()["spectral"].folder)
    frames = {form: int((store._ends - store._starts).sum()) for form, store in stores.items()}
    expected = (frames["float32"] * 60 * 4, frames["int8"] * (60 + 4), frames["pooled"] * 60 * 4)
    assert plan.features("spectral") == expected


def test_what_a_block_keeps_for_the_backward(tiny_config):
    """The difference between two depths, against a count by hand."""
    sizes = ["train.precision=fp32", "model.dropout=0", "alignment.enabled=false", "model.width=64"]
    kept = {}
    for depth in (3, 4):
        memory = step_memory(tiny_config(f"model.depth={depth}", *sizes), {"spectral": 60}, 2, 50)
        kept[depth] = memory.activations
    state = 2 * 50 * 64 * 4
    # Attention: its input, q, k, v, result, the result in another order, the branch; feed-forward: its input, the
    # inner activation before and after GELU, the branch; and the residual state before each branch.
    by_hand = (1 + 3 + 1 + 1 + 1 + 1 + 4 + 4 + 1 + 2) * state
    assert kept[4] - kept[3] == pytest.approx(by_hand, rel=0.05)


def test_memory_follows_the_batch_the_precision_and_recompute(tiny_config):
    def activations(samples: int, *changes: str) -> int:
        return step_memory(tiny_config("model.width=64", *changes), {"spectral": 60}, samples, 50).activations

    plain = activations(2)
    weights = step_memory(tiny_config("model.width=64"), {"spectral": 60}, 1, 50).parameters
    # What does not grow with the batch is the copy of the weights in bfloat16 that autocast keeps.
    assert 2 * plain - activations(4) == pytest.approx(2 * weights, rel=0.15)
    assert activations(2, "train.precision=fp32") > 1.3 * (plain - 2 * weights)
    assert activations(2, "train.recompute=true") < 0.5 * plain
    one_head, three = (activations(2, "alignment.pool=null", f"probe.k={k}") for k in (1, 3))
    assert plain < one_head < three


def test_a_plan_for_another_machine_needs_neither_clips_nor_teachers(capsys):
    changes = [
        "data.train=[/nowhere/LibriSpeech]",
        "train.device=cuda",
        "probe.every=200",
        "alignment.teachers={speech: {source: /nowhere/whisper-large-v3, domains: [speech]}, "
        "audio: {source: /nowhere/BEATs_iter3.pt, domains: [audio]}}",
    ]
    hours = {"speech": 10.0, "audio": 5.0}
    plan = make_plan(load_config("paper", changes), hours)
    frames = {"speech": 10 * 3600 * 50, "audio": int(3600 / 2) * 63}  # a clip of 10 s has 62.5 frames of BEATs
    assert plan.features("speech")[:2] == (frames["speech"] * 1280 * 4, frames["speech"] * 1284)
    assert plan.features("audio")[:2] == (frames["audio"] * 768 * 4, frames["audio"] * 772)
    assert len(plan.clips.frames) == 0.9 * (3600 + 1800)
    assert plan.probes == 2225  # at 5,000, 5,200, ... below 450,000
    # 24 (1 + 24 / 2 + 1 / 2) block evaluations against 3 x 24 of a training step, a sample
    assert 0 < plan.probe_flops / plan.train_flops < 0.2
    assert cli.main(["train", "paper", "--plan", "--hours", "speech=10,audio=5", *changes]) == 0
    out = capsys.readouterr().out
    assert "estimate" in out
    assert "teacher speech not known: its weights are not here" in " ".join(out.split())


def test_a_teacher_is_sized_by_its_configuration_alone(tiny_config, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32}
    whisper = transformers.WhisperConfig(
        **sizes, decoder_layers=1, decoder_attention_heads=2, num_mel_bins=80, vocab_size=60, pad_token_id=1
    )
    whisper.save_pretrained(tmp_path / "whisper")
    teachers = f"alignment.teachers={{w: {{source: {tmp_path / 'whisper'}, options: {{layer: 1}}}}}}"
    planned = make_plan(tiny_config(teachers)).teachers["w"]
    encoder = transformers.WhisperModel(whisper).encoder
    parameters = sum(p.numel() for p in encoder.parameters())
    assert (planned.width, planned.rate, planned.parameters, planned.bytes) == (32, 50.0, parameters, 4 * parameters)


REFUSED = {
    "no such manifest": (["data.train=[nowhere.csv]"], "nowhere.csv: no such manifest file or folder"),
    "an unknown teacher": (["alignment.teachers={x: {source: spectra}}"], "alignment.teachers.x: unknown teacher"),
    "no such teacher": (["alignment.teachers={x: {source: /nowhere/BEATs.pt}}"], "alignment.teachers.x: "),
    "a domain without clips": (["alignment.teachers.spectral.domains=[music]"], "no clip of domain 'music'"),
    "no such device": (["train.device=cuda:99"], "train.device: no cuda:99 here"),
    "graphs on a CPU": (["train.engine=graph", "train.device=cpu"], "train.engine: graph: it needs a CUDA device"),
    "no such selection": (["alignment.selection=nowhere.json"], "nowhere.json"),
    "too few layers": (["alignment.layers=[7]"], "alignment.layers"),
    "with --resume": (["--resume", "runs/x"], "--plan: give a preset or a YAML file, without --resume"),
    "unknown size": (
        ["--hours", "speech=1", "alignment.teachers={x: {source: /nowhere/mine}}"],
        "alignment.teachers.x: '/nowhere/mine' is neither here nor a published model whose size is known",
    ),
    "a teacher of no such hours": (
        ["--hours", "speech=1", "alignment.teachers.spectral.domains=[audio]"],
        "no clip of domain 'audio'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_train_refuses_the_plan_refuses(case, tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    changes, message = REFUSED[case]
    assert cli.main(["train", "demo", "--plan", *tiny(), *changes]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_selection_of_other_layers_and_a_run_that_exists_are_refused(tiny, capsys, tmp_path):
    selection = tmp_path / "selection.json"
    selection.write_text(json.dumps({"layers": [0, 9], "weights": [0.5, 0.5]}))
    assert cli.main(["train", "demo", "--plan", *tiny(f"alignment.selection={selection}")]) == 2
    assert "selection: layer 9 does not exist, the model has layers 0 to 2" in capsys.readouterr().err
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "log.jsonl").touch()
    assert cli.main(["train", "demo", "--plan", *tiny()]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "hours", ["speech", "speech=0", "speech=-1", "=3", "speech=1,speech=2", "speech=1e9", "speech=x"]
)
def test_hours_that_are_none(hours, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "demo", "--plan", "--hours", hours])
    assert stopped.value.code == 2
    assert "--hours: expected" in capsys.readouterr().err


def test_hours_belong_to_a_plan(capsys):
    assert cli.main(["train", "demo", "--hours", "speech=1"]) == 2
    assert "--hours: only with --plan" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["layersync", "self-flow"])
def test_the_network_as_its_own_teacher_has_no_features_to_plan(tiny_config, source):
    plan = make_plan(tiny_config(f"alignment.teachers={{self: {{source: {source}}}}}"))
    assert plan.teachers == {}
    assert "features of" not in plan.text()
    # A head of each layer: two Linears from the network's width to itself.
    assert plan.memory.heads == 3 * 2 * (16 * 16 + 16)
    # A forward of the average keeps nothing for the backward.
    assert (
        plan.memory.activations
        == make_plan(tiny_config("alignment.teachers={self: {source: layersync}}")).memory.activations
    )
