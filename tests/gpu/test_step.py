"""The captured training step on a device, small: one length, two layers, compiled by Inductor. Needs no sound files.

`make gpu` runs this first: the captured step is where most parts meet that no other machine can show.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from agrepa_fast.graphs import Beside, Recording
from agrepa_fast.training.config import load_config
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.objective import Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.step import WARMUP, TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TEACHERS = {"speech": 64, "audio": 48}
SAMPLES, FRAMES = 4, 128
SIZES = (
    "mel.mels=80",
    "model.depth=2",
    "model.width=128",
    "model.heads=2",
    "model.token_width=32",
    "model.dropout=0.0",
    "data.buckets=1",
    "probe.k=2",
    "alignment.pool=mean",
)


def build(engine: str, device: torch.device, bf16: bool) -> TrainStep:
    config = load_config("demo", [*SIZES])
    torch.manual_seed(0)
    objective = Objective(config, TEACHERS, torch.Generator(device).manual_seed(1)).to(device)
    for parameter in objective.backbone.network.parameters():  # away from the zeros of adaLN-zero
        torch.nn.init.normal_(parameter, std=0.05)
    optimizer = build_optimizer(objective, config, capturable=engine == "graph")
    return TrainStep(objective, optimizer, Ema(objective.backbone, 0.9), config, device, bf16, engine)


def batch(config, device: torch.device, seed: int) -> StepInputs:
    """The aligned frames are the valid ones, and one tensor with them, as in the trainer."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(FRAMES) < torch.tensor([FRAMES, FRAMES - 30] * (SAMPLES // 2))[:, None]
    mask = mask.to(device)
    speech = torch.arange(SAMPLES, device=device) % 2 == 0

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device)

    return StepInputs(
        mel=randn(SAMPLES, FRAMES, config.mel.mels) * mask[..., None],
        mask=mask,
        prompt=(torch.arange(FRAMES, device=device) < 20).expand(SAMPLES, FRAMES),
        tokens=torch.randint(1, 256, (SAMPLES, 64, 1), generator=g).to(device),
        token_lengths=torch.tensor([64, 40] * (SAMPLES // 2)).to(device),
        vocabulary=torch.zeros(SAMPLES, dtype=torch.int64, device=device),
        targets={name: randn(SAMPLES, width) for name, width in TEACHERS.items()},
        target_mask=mask,
        domains={"speech": speech, "audio": ~speech},
    )


def check(engine: str, device: torch.device, bf16: bool) -> TrainStep:
    """Unaligned steps, then aligned ones; the losses of the eager engine after every step."""
    eager, fast = build("eager", device, bf16), build(engine, device, bf16)
    for number in range(2 * (WARMUP + 3)):
        given = batch(fast.objective.config, device, number)
        means = []
        for step in (eager, fast):
            step.aligner.align(0.0 if number < WARMUP + 3 else 0.5)
            step([given], 1e-3)
            means.append(step.read()[0])
        for name, value in means[0].items():
            assert means[1][name] == pytest.approx(value, rel=5e-2 if bf16 else 1e-2, abs=1e-4), (number, name)
    return fast


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_captured_step_trains_as_the_eager_one(monkeypatch, bf16: bool) -> None:
    """Without a compilation inside a recording: one graph unaligned, one aligned."""
    compiled = []
    original = Recording.__init__

    def record(self, *arguments, **options) -> None:
        before = counters["stats"]["unique_graphs"]
        original(self, *arguments, **options)
        compiled.append(counters["stats"]["unique_graphs"] - before)

    monkeypatch.setattr(Recording, "__init__", record)
    torch._dynamo.reset()
    step = check("graph", torch.device("cuda", torch.cuda.current_device()), bf16)
    assert step.captures == 2
    assert compiled == [0, 0]


def test_a_replayed_step_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    step = build("graph", device, True)
    step.aligner.align(0.5)
    given = [batch(step.objective.config, device, seed) for seed in range(WARMUP + 4)]
    for inputs in given[: WARMUP + 2]:
        step([inputs], 1e-3)
    assert step.captures == 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs in given[WARMUP + 2 :]:
            step([inputs], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_beside_overlaps_and_is_read_whole():
    device = torch.device("cuda")
    beside = Beside(device)
    made = [torch.full((2048, 2048), float(number)).pin_memory() for number in range(6)]

    def work(host):
        return host.to(device, non_blocking=True) * 2

    def range_of(result):
        return torch.stack([result.amin(), result.amax()])

    # Memory for all rounds, and every kernel loaded: either may wait for the device the first time.
    beside(lambda: [torch.empty_like(made[0], device=device) for _ in range(16)], lambda made: [])
    range_of(beside(lambda: work(made[0]), lambda result: [result]))
    torch.cuda.synchronize()
    seen = []
    for host in made:
        torch.cuda._sleep(50_000_000)  # the step before, some tens of milliseconds
        busy = torch.cuda.Event()
        busy.record()
        result = beside(lambda host=host: work(host), lambda result: [result])
        beside.stream.synchronize()
        assert not busy.query(), "the work waited for the step before"
        seen.append(range_of(result))
        del result  # its memory must not go to the next work before this stream has read it
    assert torch.stack(seen).tolist() == [[2.0 * number] * 2 for number in range(6)]
