"""A short run on a device: no host sync in a step, and the captured step trains as the eager one does."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.data.libraries import import_soundfile
from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log
from agrepa_fast.training.config import load_config
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep

try:
    import_soundfile()
except UserError as error:
    pytest.skip(f"the demo corpus is sound files: {error}", allow_module_level=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CHANGES = (
    "train.device=cuda",
    "train.steps=60",
    "train.log_every=5",
    "train.valid_every=60",
    "train.checkpoint_every=30",
    "train.samples=0",
    "probe.start=15",
    "probe.every=15",
    "alignment.ramp=5",
)


def train(tmp_path, name: str, *changes: str) -> list[dict]:
    config = load_config("demo", [*CHANGES, f"train.out={tmp_path}", f"train.name={name}", *changes])
    return [entry for entry in read_log(start_run(config).run() / "log.jsonl") if entry["event"] == "train"]


@pytest.fixture
def no_sync(monkeypatch):
    """Whatever waits for the device inside a step is an error; captures, which may, are left out."""
    original = TrainStep.__call__

    def step(self, *arguments):
        captures = self.captures
        torch.cuda.set_sync_debug_mode("warn" if self.engine == "graph" and captures == 0 else "error")
        try:
            original(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TrainStep, "__call__", step)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["compile", "graph"])
def test_the_fast_step_trains_as_the_eager_one(tmp_path, engine, precision):
    eager = train(tmp_path, "eager", "train.engine=eager", f"train.precision={precision}")
    fast = train(tmp_path, engine, f"train.engine={engine}", f"train.precision={precision}")
    tolerance = 1e-2 if precision == "fp32" else 5e-2
    for one, other in zip(eager, fast, strict=True):
        assert other["flow_loss"] == pytest.approx(one["flow_loss"], rel=tolerance)
    assert fast[-1]["skipped_steps"] == 0
    if engine == "graph":
        assert 1 <= fast[-1]["captures"] <= 8
        # Re-selection of pooled layers captures nothing: the last captures are those of the aligned shapes.
        assert fast[-1]["captures"] == fast[-3]["captures"]


def test_an_interrupted_run_goes_on_along_the_same_curve(tmp_path):
    whole = train(tmp_path, "whole", "train.engine=graph")
    config = load_config("demo", [*CHANGES, f"train.out={tmp_path}", "train.name=broken", "train.engine=graph"])
    trainer = start_run(config)
    call = TrainStep.__call__

    def stop(self, *arguments):
        trainer.signals.received = trainer.step == 29
        call(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stop)
        run_dir = trainer.run()
    resume_run(run_dir).run()
    again = [entry for entry in read_log(run_dir / "log.jsonl") if entry["event"] == "train"]
    for one, other in zip(whole, again, strict=True):
        assert other["flow_loss"] == pytest.approx(one["flow_loss"], rel=2e-2)


def test_packed_attention_trains_as_padded_attention(tmp_path):
    pytest.importorskip("xformers")
    padded = train(tmp_path, "padded", "train.engine=eager", "train.precision=bf16")
    packed = train(tmp_path, "packed", "model.attention=xformers", "train.precision=bf16")
    for one, other in zip(padded, packed, strict=True):
        assert other["flow_loss"] == pytest.approx(one["flow_loss"], rel=5e-2)
