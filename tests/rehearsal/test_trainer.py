"""Whole runs with the captured step, on a stand-in for CUDA: warm-up, probe, alignment, later probes, resume."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.graphs import Beside
from agrepa_fast.report import read_log
from agrepa_fast.teachers.spectral import SpectralTeacher
from agrepa_fast.training import trainer as trainer_module
from agrepa_fast.training.config import load_config
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep

CHANGES = (
    "mel.mels=16",
    "model.depth=3",
    "model.width=16",
    "model.heads=2",
    "model.dropout=0",
    "model.token_width=8",
    "data.max_seconds=1.0",
    "data.buckets=1",
    "data.frames_per_batch=126",
    "probe.start=8",
    "probe.every=8",
    "probe.samples=2",
    "probe.t_grid=[0.2,0.7]",
    "probe.k=2",
    "alignment.ramp=2",
    "alignment.decay_start=1",
    "alignment.stop=1",
    "flow.points=3",
    "train.steps=24",
    "train.log_every=4",
    "train.valid_every=12",
    "train.valid_samples=2",
    "train.checkpoint_every=12",
    "train.samples=0",
    "train.threads=1",
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("clips") / "corpus", speech=6, audio=6)


@pytest.fixture
def captured(cuda, monkeypatch):
    """The captured engine on the CPU; torch.compile without its code generator."""
    original = torch.compile
    monkeypatch.setattr("torch.compile", lambda module, **options: original(module, backend="eager", **options))
    monkeypatch.setattr(trainer_module, "pick_engine", lambda config, device, ranks: "graph")
    torch._dynamo.reset()

    def follow(trainer):
        step = trainer.train_step

        def state():
            optimizer = [value for entry in step.optimizer.state.values() for value in entry.values()]
            modules = (*step.objective.state_dict().values(), *step.ema.module.state_dict().values())
            return [*modules, *optimizer, *step.meter._sums.values(), step.skipped]

        cuda.state = state
        return trainer

    yield follow
    torch._dynamo.reset()


def lines(run_dir) -> list[dict]:
    return [entry for entry in read_log(run_dir / "log.jsonl") if entry["event"] in ("train", "valid", "probe")]


@pytest.mark.parametrize("teacher", ["source: spectral", "source: self-flow"])
def test_a_captured_run_is_the_eager_run(clips, tmp_path, captured, cuda, monkeypatch, teacher):
    changes = [*CHANGES, f"data.train=[{clips}]", f"train.out={tmp_path}", f"alignment.teachers={{one: {{{teacher}}}}}"]
    graph = lines(captured(start_run(load_config("demo", [*changes, "train.name=graph"]))).run())
    assert cuda.recordings == 2  # one length, without and with alignment
    assert cuda.compiled_while_recording == 0
    monkeypatch.setattr(trainer_module, "pick_engine", lambda config, device, ranks: "eager")
    eager = lines(start_run(load_config("demo", [*changes, "train.name=eager"])).run())
    assert [entry["event"] for entry in graph] == [entry["event"] for entry in eager]
    for mine, other in zip(graph, eager):
        if mine["event"] == "probe":
            assert mine["selection"]["layers"] == other["selection"]["layers"]
        else:
            assert mine["flow_loss"] == pytest.approx(other["flow_loss"], rel=1e-3)
    train = [entry for entry in graph if entry["event"] == "train"]
    assert train[-1]["captures"] == 2
    assert "align_loss" in train[-1]


def test_live_teachers_hear_a_batch_beside_the_step_before(clips, tmp_path, cuda, monkeypatch):
    changes = [*CHANGES, f"data.train=[{clips}]", f"train.out={tmp_path}"]
    alone = start_run(load_config("demo", [*changes, "train.name=alone"]))
    assert alone.feed.beside is None  # on the CPU
    expected = [entry.get("flow_loss") for entry in lines(alone.run())]

    trainer = start_run(load_config("demo", [*changes, "train.name=beside"]))
    trainer.feed.beside = Beside(torch.device("cuda"))
    side, main = trainer.feed.beside.stream, cuda.default
    assert side.waited_for == [main]  # for the teachers' weights, and for nothing after
    read_on: dict[int, object] = {}
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: read_on.update({id(tensor): stream}))
    heard, stepped = [], []
    encode, step = SpectralTeacher.encode, TrainStep.__call__

    def listen(self, *arguments):
        heard.append((cuda.current, len(stepped)))
        return encode(self, *arguments)

    def follow(self, inputs, lr):
        assert cuda.current is main
        if self.aligner.on:
            assert {read_on.get(id(tensor)) for batch in inputs for tensor in batch.tensors()} == {main}
            assert main.waited_for.count(side) == len(stepped) + 1
            stepped.append(len(heard))
        return step(self, inputs, lr)

    monkeypatch.setattr(SpectralTeacher, "encode", listen)
    monkeypatch.setattr(TrainStep, "__call__", follow)
    assert [entry.get("flow_loss") for entry in lines(trainer.run())] == expected
    assert len(stepped) == 16
    assert side.waited_for == [main]
    # Probes and validation hear their clips in the trainer's own order.
    assert [place for place, (stream, _) in enumerate(heard) if stream is side] == [count - 1 for count in stepped]


def test_a_captured_run_goes_on_after_a_resume(clips, tmp_path, captured, cuda):
    changes = [*CHANGES, f"data.train=[{clips}]", f"train.out={tmp_path}"]
    whole = lines(captured(start_run(load_config("demo", [*changes, "train.name=whole"]))).run())
    broken = captured(start_run(load_config("demo", [*changes, "train.name=broken"])))
    call = broken.train_step.__call__
    monkey = pytest.MonkeyPatch()

    def stop(self, *arguments):
        broken.signals.received = broken.step == 15  # the run ends after it, at a line of the log
        return call(*arguments)

    with monkey.context() as patch:
        patch.setattr(type(broken.train_step), "__call__", stop)
        run_dir = broken.run()
    recorded = cuda.recordings
    again = lines(captured(resume_run(run_dir)).run())
    assert cuda.recordings == recorded + 1  # the alignment's; what came before it is over
    assert len(again) == len(whole)
    for mine, other in zip(again, whole):
        if mine["event"] == "train":
            assert mine["flow_loss"] == pytest.approx(other["flow_loss"], rel=1e-3)
