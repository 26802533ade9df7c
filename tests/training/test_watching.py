"""What a run says about itself: rates, skipped steps, probes, gradient cosines; and that its memory is flat."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from agrepa_fast.alignment.choice import LayerChoice
from agrepa_fast.errors import UserError
from agrepa_fast.models.cost import forward_flops
from agrepa_fast.report import read_log
from agrepa_fast.training.meter import Meter
from agrepa_fast.training.objective import Draws
from agrepa_fast.training.rates import Rates, _memory
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("agrepa_fast.training.trainer.write_report", lambda run_dir: run_dir)


def events(run_dir, name: str) -> list[dict]:
    return [entry for entry in read_log(run_dir / "log.jsonl") if entry["event"] == name]


def test_meter_means_leave_out_what_is_not_finite():
    meter = Meter()
    for a, b in ((1.0, 4.0), (3.0, float("nan")), (float("inf"), float("nan"))):
        meter.add({"a": torch.tensor(a), "b": torch.tensor(b)})
    meter.add({"a": torch.tensor(5.0)})  # a step of another kind
    meter.add({"c": torch.tensor(float("nan"))})
    assert meter.read(torch.tensor([7.0, 8.0])) == ({"a": 3.0, "b": 4.0}, [7.0, 8.0])
    assert meter.read(torch.zeros(1)) == ({}, [0.0])


def test_rates_count_work_and_leave_out_pauses(tiny_config):
    rates = Rates(tiny_config().dit, torch.device("cpu"), bf16=False)
    rates.go_on()
    began = time.perf_counter()
    rates.count(4, 50)
    rates.count(2, 100)
    rates.pause()
    lasted = time.perf_counter() - began
    time.sleep(0.2)
    rates.go_on()
    found = rates.read()
    assert found["samples_per_second"] > 6 / (lasted + 0.1)
    assert found["frames_per_second"] == pytest.approx(found["samples_per_second"] * 400 / 6)
    dit = tiny_config().dit
    flops = 3 * (forward_flops(dit, 4, 50) + forward_flops(dit, 2, 100))
    assert found["mfu"] == pytest.approx(found["samples_per_second"] / 6 * flops / rates.matmul)
    assert 1e8 < rates.matmul < 1e14
    assert found["memory_bytes"] > 1e8


def test_flops_are_those_of_the_matrix_products(tiny_config):
    from torch.utils.flop_counter import FlopCounterMode

    from agrepa_fast import DiT

    config = tiny_config().dit
    model = DiT(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 30, config.mels), torch.rand(2), torch.randn(2, 30, config.cond))
    assert counter.get_total_flops() == forward_flops(config, 2, 30)


@pytest.mark.usefixtures("quick")
def test_a_log_line_has_rates_and_losses_by_time(tiny_config):
    run_dir = start_run(tiny_config("train.samples=0", "train.steps=4")).run()
    [*_, last] = events(run_dir, "train")
    assert {"samples_per_second", "frames_per_second", "mfu", "memory_bytes", "skipped_steps"} <= last.keys()
    assert last["skipped_steps"] == 0
    lines = events(run_dir, "train")
    # The corpus has clips of one bucket here: 62 frames.
    for line in lines:
        assert 0 < line["mfu"] < 1
        assert line["frames_per_second"] / line["samples_per_second"] == pytest.approx(62)
    by_time = [last[key] for key in last if key.startswith("flow_loss_t/")]
    assert 1 <= len(by_time) <= 4
    assert min(by_time) <= last["flow_loss"] <= max(by_time)
    [start] = events(run_dir, "start")
    assert (start["engine"], start["ranks"]) == ("eager", 1)


def test_gradients_that_stay_not_finite_stop_the_run_with_a_report(tiny_config):
    changes = ("optimizer.lr=1e30", "train.max_skipped=3", "train.samples=0", "train.steps=40")
    config = tiny_config(*changes, "probe.start=30", "alignment.stop=1")
    with pytest.raises(UserError, match=r"steps in a row by step \d+ had gradients that are not finite: lower optim"):
        start_run(config).run()
    folder = Path(config.train.out) / "tiny"
    [stopped] = events(folder, "stopped")
    assert stopped["step"] < 40
    assert (folder / "report.html").exists()
    assert events(folder, "train")[-1]["skipped_steps"] >= 3


@pytest.mark.usefixtures("quick")
def test_probes_while_training_choose_again(tiny_config, monkeypatch):
    """The scores of each probe are made up: what is chosen, logged and aligned follows from them."""
    from agrepa_fast.training import choice as module

    original, made_up = module.score_layers, iter([[3, 2, 1.0], [3, 2, 2.1], [3, 2, 9.0]])

    def score_layers(*arguments):
        scores = original(*arguments)
        values = torch.tensor(next(made_up), dtype=scores.by_sample.dtype)
        scores.by_sample.copy_(values.unsqueeze(1).expand_as(scores.by_sample))
        return scores

    monkeypatch.setattr(module, "score_layers", score_layers)
    due = LayerChoice.due
    monkeypatch.setattr(LayerChoice, "due", lambda self, step, stop: step <= 6 and due(self, step, stop))
    config = tiny_config("probe.every=2", "train.steps=12", "probe.start=2", "train.samples=0", "train.log_every=1")
    trainer = start_run(config)
    run_dir = trainer.run()
    probes = events(run_dir, "probe")
    assert [entry["step"] for entry in probes][:3] == [2, 4, 6]
    # Averages with momentum 0.5: (3, 2, 1), (3, 2, 1.55), (3, 2, 5.275)
    assert [entry["selection"]["layers"] for entry in probes[:3]] == [[0, 1], [0, 1], [0, 2]]
    assert [entry["changed"] for entry in probes[:3]] == [False, False, True]
    assert probes[2]["average"] == pytest.approx([3, 2, 5.275])
    assert probes[2]["selection"]["weights"] == pytest.approx([3 / 8.275, 5.275 / 8.275])
    assert trainer.objective.alignment.weights[0].tolist() == pytest.approx([3 / 8.275, 0, 5.275 / 8.275])
    assert all(0 < entry["share"] < 1 for entry in probes)
    aligned = {e["step"]: {k for k in e if k.startswith("cosine/")} for e in events(run_dir, "train")}
    assert aligned[6] == {"cosine/spectral/0", "cosine/spectral/1"}
    assert aligned[8] == {"cosine/spectral/0", "cosine/spectral/2"}


@pytest.mark.usefixtures("quick")
def test_the_gradients_cosine_is_that_of_the_two_losses(tiny_config, monkeypatch):
    from agrepa_fast.training.objective import Objective

    seen = {}
    original = Objective.gradient_cosines

    def watched(self, inputs, draws):
        found = original(self, inputs, draws)
        seen.update(objective=self, inputs=inputs, draws=Draws(*draws), found=found)
        return found

    monkeypatch.setattr(Objective, "gradient_cosines", watched)
    changes = ("train.diagnose_every=5", "train.steps=6", "alignment.layers=[0,2]", "train.samples=0")
    run_dir = start_run(tiny_config(*changes, "train.checkpoint_every=6")).run()
    [event] = events(run_dir, "gradients")
    assert event["step"] == 5
    assert {key for key in event if "/" in key} == {"gradient_cosine/0", "gradient_cosine/2"}
    plain = start_run(tiny_config(*changes[1:], "train.checkpoint_every=6", "train.name=plain")).run()
    losses = [[e["loss"] for e in events(folder, "train")] for folder in (run_dir, plain)]
    assert losses[0] == losses[1]  # looking changes nothing

    objective, inputs, draws = seen["objective"].eval(), seen["inputs"], seen["draws"]
    cond, _ = objective.backbone.condition(inputs)
    x_t = draws.noise + draws.t[:, None, None] * (inputs.mel - draws.noise)
    velocity, hidden = objective.backbone.network(x_t, draws.t, cond, inputs.mask, hidden_layers=[0, 1, 2])
    frames = inputs.mask.unsqueeze(-1)
    error = ((velocity - (inputs.mel - draws.noise)).square() * frames).mean(-1).sum(1) / inputs.mask.sum(1)
    aligned, _ = objective.alignment(hidden, inputs.targets, inputs.target_mask, inputs.domains)
    for layer in (0, 2):
        one, two = (
            torch.autograd.grad(loss, hidden[layer], retain_graph=True)[0].flatten() for loss in (error.mean(), aligned)
        )
        expected = F.cosine_similarity(one, two, dim=0)
        found = objective.gradient_cosines(inputs, draws)[f"gradient_cosine/{layer}"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_report_is_kept_current(tiny_config, monkeypatch):
    written = []
    monkeypatch.setattr("agrepa_fast.training.trainer.write_report", lambda run_dir: written.append(run_dir))
    monkeypatch.setattr("agrepa_fast.training.trainer.REPORT_SECONDS", 0)
    start_run(tiny_config("train.samples=0")).run()
    assert len(written) == 4  # validations at 0, 4 and 8, and the end


@pytest.mark.usefixtures("quick")
def test_a_damaged_checkpoint_is_in_the_log_and_the_run_goes_on(tiny_config, capfd, state_bits, assert_same_bits):
    run_dir = start_run(tiny_config("train.samples=0")).run()
    before = state_bits(run_dir)
    newest = run_dir / "checkpoints" / "step_00000008" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    resume_run(run_dir).run()
    [entry] = events(run_dir, "damaged")
    assert str(newest) in entry["reason"]
    assert f"passed over: {newest}" in capfd.readouterr().err
    assert_same_bits(state_bits(run_dir), before)


@pytest.mark.usefixtures("quick")
def test_memory_is_flat_over_a_thousand_steps(tiny_config, monkeypatch):
    """Resident memory and live tensors, between step 300 and step 1,300."""
    small = ("model.depth=1", "model.width=8", "probe.k=1", "data.max_seconds=0.3", "data.frames_per_batch=20")
    run = ("train.steps=1301", "train.samples=0", "train.valid_every=5000", "train.checkpoint_every=500")
    config = tiny_config(*small, *run, "train.log_every=100")
    call, steps, seen = TrainStep.__call__, 0, []

    def watched(self, *arguments):
        nonlocal steps
        call(self, *arguments)
        steps += 1
        if steps in (300, 1300):
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            seen.append((_memory(torch.device("cpu")), tensors))

    monkeypatch.setattr(TrainStep, "__call__", watched)
    start_run(config).run()
    (memory, tensors), (later_memory, later_tensors) = seen
    assert later_memory < 1.01 * memory
    assert later_tensors <= tensors + 2
