"""A whole run at toy size: what it leaves, and that an interrupted one ends with the same bits."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from agrepa_fast.attribution.files import read_scores
from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import checkpoints, load_checkpoint
from agrepa_fast.training.config import OptimizerConfig
from agrepa_fast.training.optimizer import build_optimizer, one_cycle
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep


def interrupt_after(monkeypatch, steps: int) -> None:
    """Raise a real SIGINT during the given step of the session."""
    original = TrainStep.__call__
    done = 0

    def step(self, *arguments):
        nonlocal done
        done += 1
        if done == steps:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)


def test_a_run_leaves_everything(tiny_config):
    run_dir = start_run(tiny_config()).run()
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "log.jsonl", "foga.csv", "selection.json", "report.html", "samples", "checkpoints"}
    assert names >= {"loss.png", "cosine.png", "foga.png", "foga_map.png"}
    log = read_log(run_dir / "log.jsonl")
    by_event = {
        event: [e for e in log if e["event"] == event] for event in ("train", "valid", "probe", "sample", "end")
    }
    assert [e["step"] for e in by_event["valid"]] == [0, 4, 8]
    assert [e["step"] for e in by_event["train"]] == [2, 4, 6, 8]
    scores = read_scores(run_dir / "foga.csv")
    assert scores.layers == (0, 1, 2)  # every layer is scored in the one probe
    assert scores.by_sample.shape == (3, 4)  # 2 clips at 2 values of t
    chosen = json.loads((run_dir / "selection.json").read_text())
    assert chosen["layers"] == by_event["probe"][0]["selection"]["layers"]
    assert sum(chosen["weights"]) == pytest.approx(1)
    expected = {f"cosine/spectral/{layer}" for layer in chosen["layers"]}
    assert {key for key in by_event["valid"][-1] if key.startswith("cosine/")} == expected
    assert (run_dir / by_event["sample"][0]["path"]).stat().st_size > 1000
    assert by_event["end"][0]["seconds"] > 0
    assert "<html" in (run_dir / "report.html").read_text()


@pytest.mark.usefixtures("_no_report")
def test_training_lowers_the_validation_loss(tiny_config):
    config = tiny_config("train.steps=120", "probe.start=40", "train.valid_every=120", "train.samples=0")
    log = read_log(start_run(config).run() / "log.jsonl")
    first, last = [e["flow_loss"] for e in log if e["event"] == "valid"]
    assert last < 0.8 * first


@pytest.fixture
def _no_report(monkeypatch):
    """For tests of many short runs: the report is tested elsewhere and takes longer than their steps."""
    monkeypatch.setattr("agrepa_fast.training.trainer.write_report", lambda run_dir: run_dir)


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("pool", ["mean", "null"])
def test_interrupted_at_every_step_and_resumed_ends_with_the_same_bits(
    tiny_config, monkeypatch, pool, state_bits, assert_same_bits
):
    changes = [f"alignment.pool={pool}", "alignment.bitc=true", "train.samples=0", "train.steps=6"]
    changes += ["alignment.policy=first-order", "alignment.timestep_weight=noise", "alignment.stop_similarity=0.02"]
    whole = start_run(tiny_config(*changes)).run()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        run_dir = start_run(tiny_config(*changes, "train.name=broken")).run()
    for step in range(1, 6):
        checkpoint = load_checkpoint(run_dir)
        assert checkpoint.state["step"] == step
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            resume_run(checkpoint.path).run()
    assert read_log(run_dir / "log.jsonl")[-1]["event"] == "interrupted"
    bits = state_bits(run_dir)
    assert_same_bits(state_bits(whole), bits)
    assert bits["heads.stop.mean"].isfinite()


@pytest.mark.usefixtures("_no_report")
def test_worker_processes_do_not_change_the_bits(tiny_config, state_bits, assert_same_bits):
    alone = start_run(tiny_config("train.samples=0", "train.steps=4")).run()
    helped = start_run(tiny_config("train.samples=0", "train.steps=4", "data.workers=2", "train.name=workers")).run()
    assert_same_bits(state_bits(alone), state_bits(helped))


def test_sigterm_saves_and_exits_0(tiny, tmp_path):
    command = [sys.executable, "-m", "agrepa_fast", "train", "demo", *tiny("train.steps=100000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "runs" / "tiny" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"event": "train"' in log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # SIGINT: the test above
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "--resume" in output
    [*_, last] = read_log(log)
    assert last["event"] == "interrupted"
    assert load_checkpoint(tmp_path / "runs" / "tiny").state["step"] == last["step"]


@pytest.mark.usefixtures("_no_report")
def test_the_log_holds_the_weight_that_was_applied(tiny_config):
    changes = ("train.log_every=1", "train.samples=0", "alignment.weight=0.25")
    log = read_log(start_run(tiny_config(*changes)).run() / "log.jsonl")
    weights = {e["step"]: e["align_weight"] for e in log if e["event"] == "train"}
    # probe before the fourth step; ramp of 2; decay from step 6 of 8; stop at 0.9 of 8, rounded up
    assert [weights[step] for step in (1, 2, 3)] == [0, 0, 0]
    assert [weights[step] for step in (4, 5, 6)] == [0.125, 0.25, 0.25]
    assert 0 < weights[8] < 0.25
    for entry in log:
        if entry["event"] == "train":
            aligned_part = entry["align_weight"] * entry.get("align_loss", 0.0)
            assert entry["loss"] == pytest.approx(entry["flow_loss"] + aligned_part, rel=1e-5)
    aligned = {e["step"]: "align_loss" in e for e in log if e["event"] == "train"}
    assert aligned == {step: step > 3 for step in range(1, 9)}


@pytest.mark.usefixtures("_no_report")
def test_a_given_selection_is_used_from_the_start(tiny_config, tmp_path):
    (tmp_path / "selection.json").write_text('{"layers": [1], "weights": [1.0]}')
    config = tiny_config(f"alignment.selection={tmp_path / 'selection.json'}", "train.log_every=1", "train.samples=0")
    run_dir = start_run(config).run()
    first = next(e for e in read_log(run_dir / "log.jsonl") if e["event"] == "train")
    assert {key for key in first if key.startswith("cosine/")} == {"cosine/spectral/1"}
    assert first["align_weight"] == 0.25  # half of the ramp, of alignment.weight 0.5


@pytest.mark.usefixtures("_no_report")
def test_alignment_can_be_off(tiny_config):
    run_dir = start_run(tiny_config("alignment.enabled=false", "train.samples=0")).run()
    assert not any("align_loss" in entry for entry in read_log(run_dir / "log.jsonl"))
    assert (run_dir / "foga.csv").exists()


@pytest.mark.usefixtures("_no_report")
def test_a_run_with_another_objective(tiny_config):
    """Relations of standardised frames; the metric bears the objective's name, of the chosen layers only."""
    changes = ("alignment.objective=relation", "alignment.pool=null", "alignment.standardise_targets=true")
    run_dir = start_run(tiny_config(*changes, "alignment.layers=[1]", "train.samples=0", "train.steps=4")).run()
    last = next(e for e in reversed(read_log(run_dir / "log.jsonl")) if e["event"] == "train")
    assert {key for key in last if "spectral" in key} == {"relation/spectral/1"}
    assert last["relation/spectral/1"] == pytest.approx(1 - last["align_loss"], abs=1e-6)
    assert last["align_loss"] > 0.01


@pytest.mark.usefixtures("_no_report")
def test_heads_stay_outside_the_model(tiny_config):
    trainer = start_run(tiny_config("alignment.bitc=true", "train.steps=4", "train.samples=0"))
    heads = {id(p) for p in trainer.objective.heads().parameters()}
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {id(p) for p in groups["heads"]["params"]} == heads
    assert groups["heads"]["weight_decay"] == 0
    checkpoint = load_checkpoint(trainer.run())
    assert set(checkpoint.weights["model"]) == set(trainer.objective.backbone.state_dict())
    assert set(checkpoint.weights["ema"]) == set(checkpoint.weights["model"])
    assert set(checkpoint.weights["heads"]) == set(trainer.objective.heads().state_dict())


def test_weight_decay_spares_biases_norms_and_embeddings(tiny_config):
    trainer = start_run(tiny_config())
    optimizer = build_optimizer(trainer.objective, tiny_config())
    names = {id(p): name for name, p in trainer.objective.backbone.named_parameters()}
    decayed = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    modules = dict(trainer.objective.backbone.named_modules())
    linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
    assert decayed == linear
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainer.objective.parameters())


@pytest.mark.usefixtures("_no_report")
def test_ema_is_the_exponential_mean_of_the_weights(tiny_config):
    trainer = start_run(tiny_config("optimizer.ema_decay=0.9", "train.samples=0", "train.steps=5"))
    backbone = trainer.objective.backbone
    followed = {k: v.detach().double().clone() for k, v in backbone.named_parameters()}
    original = trainer.ema.update

    def update():
        original()
        for k, v in backbone.named_parameters():
            followed[k] = 0.9 * followed[k] + 0.1 * v.detach().double()

    trainer.ema.update = update
    trainer.run()
    for name, parameter in trainer.ema.module.named_parameters():
        torch.testing.assert_close(parameter.double(), followed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("_no_report")
def test_only_the_newest_checkpoints_are_kept(tiny_config):
    run_dir = start_run(tiny_config("train.checkpoint_every=2", "train.keep=2", "train.samples=0")).run()
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == ["step_00000006", "step_00000008"]


@pytest.mark.usefixtures("_no_report")
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tiny_config, state_bits, assert_same_bits):
    trainer = start_run(tiny_config("train.steps=4", "train.checkpoint_every=4", "train.samples=0"))
    run_dir = trainer.run()
    before = state_bits(run_dir)
    trainer.step = 5
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"step_00000005: cannot write the checkpoint"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000004"]
    assert_same_bits(before, state_bits(run_dir))


@pytest.mark.usefixtures("_no_report")
def test_teacher_sources_and_domains(tiny_config):
    config = tiny_config(
        "alignment.teachers={voice: {domains: [speech]}, sound: {domains: [audio]}}",
        "train.samples=0",
    )
    run_dir = start_run(config).run()
    last = [e for e in read_log(run_dir / "log.jsonl") if e["event"] == "valid"][-1]
    assert {key.split("/")[1] for key in last if key.startswith("cosine/")} == {"voice", "sound"}


@pytest.mark.usefixtures("_no_report")
def test_a_transformers_teacher_from_a_folder(tiny_config, tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    teacher = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8, 8),
            conv_stride=(16, 20),
            conv_kernel=(16, 20),
            feat_extract_norm="layer",
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        )
    )
    teacher.save_pretrained(tmp_path / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "teacher")
    config = tiny_config(
        f"alignment.teachers={{speech: {{source: {tmp_path / 'teacher'}}}}}", "alignment.pool=null", "train.samples=0"
    )
    trainer = start_run(config)
    run_dir = trainer.run()
    assert trainer.objective.alignment.teachers == {"speech": 16}
    assert not any(p.requires_grad for p in trainer.teachers["speech"].parameters())
    assert not trainer.teachers["speech"].training
    checkpoint = load_checkpoint(run_dir)
    assert not any("conv" in key for part in checkpoint.weights.values() for key in part)


@pytest.mark.parametrize("steps", [1, 9, 10, 500])
def test_the_learning_rate_is_one_cycle(steps):
    optimizer = OptimizerConfig(lr=1e-3, initial_lr=1e-4, final_lr=1e-6, warmup_share=0.1)
    rate = one_cycle(optimizer, steps)
    rates = [rate(step) for step in range(steps)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) <= 1e-3
    if steps >= 9:
        warmup = round(0.1 * steps)
        assert rates[warmup] == pytest.approx(1e-3)
        assert rates[-1] == pytest.approx(1e-6)
        assert sorted(rates[:warmup]) == rates[:warmup]
        assert sorted(rates[warmup:], reverse=True) == rates[warmup:]
    if steps == 500:
        # the published shape, as torch has it (its cycle is counted from 1)
        weight = torch.nn.Parameter(torch.zeros(1))
        adam = torch.optim.AdamW([weight], lr=1e-3)
        theirs = torch.optim.lr_scheduler.OneCycleLR(
            adam, 1e-3, total_steps=501, pct_start=51 / 501, div_factor=10, final_div_factor=100, cycle_momentum=False
        )
        for step in range(steps - 1):
            assert rates[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-5)
            adam.step()
            theirs.step()
