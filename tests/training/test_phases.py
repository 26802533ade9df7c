"""A later phase of a run: what it may begin that its checkpoint was made without, and what it says about it."""

from __future__ import annotations

import shutil

import pytest
import torch

from agrepa_fast import LayerSelection
from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.start import resume_run, start_run

QUIET = ("train.samples=0", "train.valid_every=8")
SPEECH = "alignment.teachers={speech: {}}"


@pytest.fixture
def first_phase(tiny_config):
    """The checkpoint of step 4, in a folder of its own, of a run that has chosen layers at step 3."""
    run = start_run(tiny_config(*QUIET, SPEECH)).run()
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    return run


def notes(run) -> list[str]:
    return [entry["note"] for entry in read_log(run / "log.jsonl") if entry["event"] == "note"]


@pytest.mark.parametrize("change, part", [("bitc=true", "interface"), ("stop_similarity=-1", "stop")])
def test_a_later_phase_may_begin(first_phase, change, part, state_bits, assert_same_bits, capsys):
    """Its heads start fresh, everything else goes on as it was; and the phase itself can be resumed exactly."""
    before = load_checkpoint(first_phase)
    trainer = resume_run(first_phase, [f"alignment.{change}"])
    heads = trainer.objective.heads()
    for name, value in before.weights["heads"].items():
        assert torch.equal(heads.state_dict()[name], value)
    moments = [trainer.optimizer.state[p] for p in trainer.aligner.loss_fn.parameters()]
    saved = list(before.state["optimizer"]["state"].values())
    assert any(entry["exp_avg"].any() for entry in moments)
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(moments, saved[-len(moments) :], strict=True))
    assert not any(p in trainer.optimizer.state for p in heads[part].parameters())
    begun = {name: value.clone() for name, value in heads[part].state_dict().items()}
    trainer.run()
    line = f"alignment.{change.partition('=')[0]} begins here: the checkpoint was made without it"
    assert notes(first_phase) == [line]
    assert line in capsys.readouterr().err
    whole, newest = state_bits(first_phase), load_checkpoint(first_phase)
    assert all(not torch.equal(begun[name], newest.weights["heads"][f"{part}.{name}"]) for name in begun)
    again = resume_run(newest.path)
    assert again.notes == []
    again.lock.release()
    assert_same_bits(whole, state_bits(first_phase))


def test_a_phase_with_bitc_is_resumed_exactly(first_phase, state_bits, assert_same_bits):
    resume_run(first_phase, ["alignment.bitc=true", "train.checkpoint_every=2"]).run()
    whole = state_bits(first_phase)
    resume_run(first_phase / "checkpoints" / "step_00000006").run()
    assert_same_bits(whole, state_bits(first_phase))


def test_heads_that_training_has_dropped_or_changed_are_refused(tiny_config, first_phase):
    for change, before, now in (
        ("alignment.head=repa", "'mlp'", "'repa'"),
        ("alignment.pool=null", "'mean'", "None"),
        ("alignment.objective=relation", "'cosine'", "'relation'"),
        ("alignment.policy=even", "'foga'", "'even'"),
        ("alignment.weights=score", "'share'", "'score'"),
        ("probe.k=1", "2", "1"),
    ):
        name = change.partition("=")[0]
        with pytest.raises(UserError, match=f"^{name}: the run has aligned with {before} by step_0+4, .* got {now}: "):
            resume_run(first_phase, [change, "alignment.bitc=true"])
    run = start_run(tiny_config(*QUIET, SPEECH, "alignment.bitc=true", "train.name=with", "train.steps=4")).run()
    with pytest.raises(UserError, match=r"heads.safetensors: unexpected tensor 'interface.heads.speech.weight'"):
        resume_run(run, ["alignment.bitc=false"])


def test_the_layers_of_the_configuration_replace_the_checkpoints(first_phase, tmp_path, capsys):
    """The first phase has chosen by its probe; the second one is told."""
    chosen = load_checkpoint(first_phase).state["selection"]["layers"]
    other = next(layer for layer in range(3) if layer not in chosen)
    file = tmp_path / "selection.json"
    LayerSelection((other,), (1.0,)).to_json(file)
    trainer = resume_run(first_phase, [f"alignment.selection={file}"])
    assert trainer.selection.layers == (other,)
    assert trainer.aligner.strength_at(trainer.step) > 0
    trainer.run()
    assert notes(first_phase) == [f"the configuration's layers, {other} (1.000), replace the checkpoint's"]
    assert load_checkpoint(first_phase).state["selection"]["layers"] == [other]
    newest = load_checkpoint(first_phase).path
    again = resume_run(newest)
    assert again.notes == []
    again.lock.release()


def test_layers_given_after_a_warm_up_without_any_are_aligned(tiny_config, tmp_path):
    run = start_run(tiny_config(*QUIET, SPEECH, "probe.start=6", "train.checkpoint_every=2")).run(until=4)
    trainer = resume_run(run, ["alignment.layers=[1]"])
    assert trainer.notes == []
    assert trainer.selection == LayerSelection.uniform([1], "fixed")
    assert trainer.aligner.strength_at(trainer.step) > 0
    trainer.lock.release()
