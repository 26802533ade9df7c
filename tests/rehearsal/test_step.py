"""The captured training step on a stand-in for CUDA, with torch.compile's own tracing and guards."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._dynamo.utils import counters

from agrepa_fast import LayerSelection
from agrepa_fast.bench.cases import trainer as trainer_case
from agrepa_fast.training.config import load_config
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.objective import Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.step import WARMUP, TrainStep

from .small import SIZES, TEACHERS

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiler(monkeypatch, request):
    """torch.compile without its code generator, which takes minutes and on which tracing and guards do not depend.

    backend "aot_eager" compiles the backward at its first call, as the generator does; "eager" is quicker."""
    backend = getattr(request, "param", "eager")
    original = torch.compile
    monkeypatch.setattr("torch.compile", lambda module, **options: original(module, backend=backend, **options))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(config, engine) -> TrainStep:
    torch.manual_seed(0)
    objective = Objective(config, TEACHERS, torch.Generator().manual_seed(1))
    for parameter in objective.backbone.network.parameters():  # away from the zeros of adaLN-zero
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = build_optimizer(objective, config, capturable=engine == "graph")
    return TrainStep(objective, optimizer, Ema(objective.backbone, 0.9), config, DEVICE, False, engine)


def state(step: TrainStep) -> list[torch.Tensor]:
    """Every tensor that a step changes."""
    optimizer = [value for entry in step.optimizer.state.values() for value in entry.values()]
    meter = list(step.meter._sums.values())
    return [
        *step.objective.state_dict().values(),
        *step.ema.module.state_dict().values(),
        *optimizer,
        *meter,
        step.skipped,
    ]


def same(one: TrainStep, other: TrainStep) -> None:
    """Up to the rounding of compiled code, which AdamW makes larger where a gradient is nearly zero."""
    for mine, its in zip(state(one), state(other), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


def batch(config, frames=12, size=4, seed=0, aliased=True) -> StepInputs:
    """A batch whose aligned frames are its valid ones: the same tensor, as `teacher_targets` gives it, or a copy."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(frames) < torch.tensor([frames, frames - 3] * (size // 2))[:, None]
    pooled = config.alignment.pool is not None
    shape = (size,) if pooled else (size, frames)
    speech = torch.arange(size) % 2 == 0
    return StepInputs(
        mel=torch.randn(size, frames, config.mel.mels, generator=g) * mask[..., None],
        mask=mask,
        prompt=(torch.arange(frames) < 2).expand(size, frames),  # a stride of 0, which a copy does not have
        tokens=torch.randint(1, 256, (size, 16, 1), generator=g),
        token_lengths=torch.tensor([16, 9] * (size // 2)),
        vocabulary=torch.zeros(size, dtype=torch.int64),
        targets={name: torch.randn(*shape, width, generator=g) for name, width in TEACHERS.items()},
        target_mask=mask if aliased else mask.clone(),
        domains={"speech": speech, "audio": ~speech},
    )


def weight_at(number: int) -> float:
    """Unaligned warm-up long enough to be recorded, then alignment."""
    return 0.0 if number < 2 * (WARMUP + 2) else 0.5


@pytest.mark.parametrize("compiler", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("pool", ["mean", "null"])
def test_the_captured_step_is_the_eager_one(cuda, pool):
    """Two lengths, before and after alignment begins: four recordings, and the numbers of the eager engine."""
    config = load_config("demo", [*SIZES, f"alignment.pool={pool}"])
    eager, graph = make(config, "eager"), make(config, "graph")
    cuda.state = lambda: state(graph)
    compiled = {}
    for number in range(4 * (WARMUP + 2)):
        given = batch(config, frames=12 + 4 * (number % 2), seed=number)
        for step in (eager, graph):
            torch.manual_seed(number)
            step.aligner.align(weight_at(number))
            step([given], 1e-3 / (number + 1))
        compiled[number] = counters["stats"]["unique_graphs"]
    assert graph.captures == cuda.recordings == 4
    assert cuda.compiled_while_recording == 0
    # One compilation for each length with and without alignment, each in the first step that needs it.
    assert compiled[1] == compiled[2 * (WARMUP + 2) - 1] == 2
    assert compiled[2 * (WARMUP + 2) + 1] == compiled[4 * (WARMUP + 2) - 1] == 4
    same(graph, eager)
    assert len(cuda.streams) == 1


def test_the_learning_rate_and_the_weight_are_read_from_the_device(cuda):
    """A number of Python would be frozen in the recording."""
    step = make(load_config("demo", [*SIZES]), "graph")
    assert all(isinstance(group["lr"], torch.Tensor) for group in step.optimizer.param_groups)
    read = [step.aligner.strength, *(group["lr"] for group in step.optimizer.param_groups)]
    held = [tensor.data_ptr() for tensor in read]
    cuda.state = lambda: state(step)
    for number in range(WARMUP + 3):
        step.aligner.align(0.5 / (number + 1))
        step([batch(step.objective.config, seed=number)], 1e-3 / (number + 1))
    now = [step.aligner.strength, *(group["lr"] for group in step.optimizer.param_groups)]
    assert held == [tensor.data_ptr() for tensor in now]
    assert float(step.aligner.strength) == pytest.approx(0.5 / (WARMUP + 3))


def test_two_tensors_where_there_was_one_make_another_recording(cuda):
    """The static inputs of the first have one tensor for both masks, so they cannot take the second's."""
    config = load_config("demo", [*SIZES])
    eager, graph = make(config, "eager"), make(config, "graph")
    cuda.state = lambda: state(graph)
    for number in range(2 * (WARMUP + 2)):
        given = batch(config, seed=number, aliased=number % 2 == 0)
        if number % 2:
            given.target_mask[:, :5] = False  # the aligned frames are fewer than the valid ones
        for step in (eager, graph):
            torch.manual_seed(number)
            step.aligner.align(0.5)
            step([given], 1e-3)
    assert graph.captures == 2
    same(graph, eager)


def test_static_inputs_keep_what_is_one_tensor_one(cuda):
    config = load_config("demo", [*SIZES])
    given = batch(config)
    own = given.clone()
    assert own.mask is own.target_mask
    assert own.mask is not given.mask
    assert own.layout() == given.layout() != batch(config, aliased=False).layout()
    apart = batch(config, aliased=False).clone()
    assert apart.mask is not apart.target_mask
    own.copy_(batch(config, seed=3))
    for mine, other in zip(own.tensors(), batch(config, seed=3).tensors(), strict=True):
        assert mine.equal(other)


def test_recordings_of_one_topology_share_a_pool_that_dies_with_them(cuda):
    config = load_config("demo", [*SIZES])
    step = make(config, "graph")
    cuda.state = lambda: state(step)
    pools = []
    for weight in (0.0, 0.5, 0.0):
        step.aligner.align(weight)
        for number in range(2 * (WARMUP + 1)):
            step([batch(config, frames=12 + 4 * (number % 2), seed=number)], 1e-3)
        gc.collect()
        pools.append({graph.pool() for graph in cuda.living})
    # Each time both lengths in one pool; the fake, like torch, refuses the pool of recordings that are gone.
    assert [len(pool) for pool in pools] == [1, 1, 1]
    assert len(set.union(*pools)) == 3
    assert len(cuda.living) == 2


def test_reselection_of_pooled_layers_records_nothing(cuda):
    config = load_config("demo", [*SIZES])
    step = make(config, "graph")
    cuda.state = lambda: state(step)
    for number in range(3 * (WARMUP + 2)):
        if number % (WARMUP + 2) == 0:
            step.aligner.select(LayerSelection((number // (WARMUP + 2) % 2,), (1.0,)))
        step.aligner.align(0.5)
        step([batch(config, seed=number)], 1e-3)
    assert step.captures == 1


def test_the_benchmark_times_replays_alone(cuda):
    """Two lengths, each recorded while the provider is built: a recording takes many times as long as a step."""
    config = load_config("demo", [*SIZES])
    drawn = [trainer_case._draw(config, 2, frames, DEVICE) for frames in (8, 12)]
    objective = Objective(config, trainer_case.TEACHERS, torch.Generator().manual_seed(1))
    objective.aligner.select(LayerSelection.uniform([0]))
    objective.aligner.align(0.5)
    run = trainer_case.trainer_step(objective, drawn, config, DEVICE, False, "graph")
    assert cuda.recordings == 2
    for _ in range(3):
        loss, norm = run()
    assert cuda.recordings == 2
    assert loss.isfinite()
    assert norm > 0
    assert [graph.replays for graph in cuda.living] == [4, 4]


def test_a_recording_that_fails_ends_the_step_with_its_reason(cuda):
    config = load_config("demo", [*SIZES])
    step = make(config, "graph")
    cuda.fail_with = RuntimeError("operation not permitted when stream is capturing")
    for number in range(WARMUP):
        step([batch(config, seed=number)], 1e-3)
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph: operation not permitted"):
        step([batch(config)], 1e-3)
    assert cuda.current is cuda.default
