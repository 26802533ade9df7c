"""One optimizer step: nothing waits for the device, engines agree, non-finite gradients are dropped, no recompiles."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast import LayerSelection
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.objective import Draws, Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.step import TrainStep, pick_engine

TEACHERS = {"speech": 12, "audio": 8}
LR = 1e-2


def make(config, engine="eager") -> TrainStep:
    torch.manual_seed(0)
    objective = Objective(config, TEACHERS, torch.Generator().manual_seed(1))
    for parameter in objective.backbone.network.parameters():  # away from the zeros of adaLN-zero
        torch.nn.init.normal_(parameter, std=0.1)
    objective.backbone.network.recompute = config.train.recompute
    objective.aligner.align(0.5)
    optimizer = build_optimizer(objective, config)
    ema = Ema(objective.backbone, 0.9)
    return TrainStep(objective, optimizer, ema, config, torch.device("cpu"), False, engine)


def inputs(config, frames=12, size=4, seed=0, pooled=True) -> StepInputs:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(frames) < torch.tensor([frames, frames - 3] * (size // 2))[:, None]
    shape = (size,) if pooled else (size, frames)
    speech = torch.arange(size) % 2 == 0
    return StepInputs(
        mel=torch.randn(size, frames, config.mel.mels, generator=g) * mask[..., None],
        mask=mask,
        prompt=(torch.arange(frames) < 2).expand(size, frames).contiguous(),
        tokens=torch.randint(1, 256, (size, 16, 1), generator=g),
        token_lengths=torch.tensor([16, 9] * (size // 2)),
        vocabulary=torch.zeros(size, dtype=torch.int64),
        targets={name: torch.randn(*shape, width, generator=g) for name, width in TEACHERS.items()},
        target_mask=mask,
        domains={"speech": speech, "audio": ~speech},
    )


def values(step: TrainStep) -> dict[str, torch.Tensor]:
    """All that a step changes."""
    found = {f"model.{k}": v.clone() for k, v in step.objective.state_dict().items()}
    found |= {f"ema.{k}": v.clone() for k, v in step.ema.module.state_dict().items()}
    for number, entry in step.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{k}": v.clone() for k, v in entry.items()}
    return found


def same(one: dict, other: dict, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class NoSync(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique")
        if name in ("index", "index_put", "index_put_"):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in ("repeat_interleave",) and "Tensor" in str(function):
            waits = True
        assert not waits, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_sync(monkeypatch):
    def refuse(name):
        def call(*arguments, **options):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return call

    def guard():
        for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, refuse(name))
        return NoSync()

    return guard


@pytest.mark.parametrize("pool", ["mean", "null"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_nothing_in_a_step_waits_for_the_device(tiny_config, no_sync, monkeypatch, pool, weight):
    changes = ["alignment.bitc=true", "alignment.stop_similarity=0.9", "alignment.timestep_weight=middle"]
    config = tiny_config(f"alignment.pool={pool}", *changes[0 if pool == "mean" else 1 :])
    step = make(config)
    batch = inputs(config, pooled=pool == "mean")
    step.aligner.align(weight)
    step([batch], LR)  # the optimizer's state is made
    before = values(step)
    with monkeypatch.context(), no_sync():
        step([batch], LR)
    monkeypatch.undo()
    changed = values(step)
    assert any(not torch.equal(before[name], changed[name]) for name in before)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero, lambda x: bool(x.any())])
def test_the_guard_finds_what_waits(no_sync, monkeypatch, wait):
    x = torch.randn(3)
    with pytest.raises(AssertionError, match="waits for the device"), no_sync():
        wait(x)
    monkeypatch.undo()


def test_gradients_that_are_not_finite_are_dropped_and_counted(tiny_config):
    config = tiny_config()
    step = make(config)
    step([inputs(config)], LR)
    before = values(step)
    broken = inputs(config)
    broken.mel[1, 2, 3] = float("inf")
    for _ in range(3):
        step([broken], LR)
    after = values(step)
    same(
        {k: v for k, v in after.items() if k[:3] != "ema"},
        {k: v for k, v in before.items() if k[:3] != "ema"},
        rtol=0,
        atol=0,
    )
    metrics, (row, longest, total) = step.read()
    assert (row, longest, total) == (3, 3, 3)
    assert metrics["loss"] < 1e3  # the mean over the steps that have one
    step([inputs(config)], LR)
    assert step.read()[1] == [0, 3, 3]
    assert any(not torch.equal(before[name], value) for name, value in values(step).items())


def test_a_step_clips_and_applies_adamw(tiny_config):
    """Against clip_grad_norm_ and an unfused AdamW in float64."""
    config = tiny_config("model.dropout=0", "optimizer.clip=0.05")
    step = make(config)
    wide = copy.deepcopy(step.objective).double()
    wide.generator = torch.Generator().manual_seed(1)
    groups = [
        {"params": list(group["params"]), "weight_decay": group["weight_decay"]}
        for group in step.optimizer.param_groups
    ]
    names = {id(p): name for name, p in step.objective.named_parameters()}
    named = dict(wide.named_parameters())
    for group in groups:
        group["params"] = [named[names[id(p)]] for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=config.optimizer.betas)
    for seed in range(4):
        batch = inputs(config, seed=seed)
        draws = Objective.draw(step.objective, batch, torch.Generator().manual_seed(seed))
        step.objective.draw = lambda given, draws=draws: draws
        step([batch], LR)
        double = {
            f.name: v.double() if isinstance(v := getattr(batch, f.name), torch.Tensor) and v.is_floating_point() else v
            for f in dataclasses.fields(batch)
        }
        double["targets"] = {k: v.double() for k, v in batch.targets.items()}
        wide.train()
        loss, _ = wide(StepInputs(**double), Draws(draws.t.double(), draws.noise.double(), *draws[2:]), 0.5)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(wide.parameters(), 0.05)
        assert norm > 0.05
        optimizer.step()
    for name, parameter in step.objective.named_parameters():
        torch.testing.assert_close(parameter.double(), named[name], rtol=1e-4, atol=1e-5, msg=name)


def test_accumulated_batches_are_one_batch(tiny_config):
    config = tiny_config("model.dropout=0")
    whole, parts = make(config), make(config)
    batch = inputs(config, size=8)
    draws = whole.objective.draw(batch, torch.Generator().manual_seed(5))
    whole.objective.draw = lambda given: draws
    # As ranks do: rows 0, 2, ... and 1, 3, ... would split the domains, so halves here.
    halves = []
    for half in (slice(0, 4), slice(4, 8)):
        cut = {
            f.name: {k: v[half] for k, v in value.items()}
            if isinstance(value := getattr(batch, f.name), dict)
            else value[half]
            for f in dataclasses.fields(batch)
        }
        halves.append(StepInputs(**cut))
    pieces = iter(Draws(*(None if d is None else d[rows] for d in draws)) for rows in (slice(0, 4), slice(4, 8)))
    parts.objective.draw = lambda given: next(pieces)
    whole([batch], LR)
    parts(halves, LR)
    same(values(parts), values(whole), rtol=1e-4, atol=1e-6)


def test_recomputed_activations_change_nothing(tiny_config):
    config = tiny_config("model.dropout=0.3")
    plain, thrifty = (
        make(config),
        make(dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=True))),
    )
    kept: list[int] = []
    for step in (plain, thrifty):
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            step([inputs(config)], LR)
        kept.append(-1)
    same(values(thrifty), values(plain), rtol=0, atol=0)
    border = kept.index(-1)
    assert sum(kept[border + 1 : -1]) < 0.7 * sum(kept[:border])


def test_engines_that_cannot_be(tiny_config):
    with pytest.raises(ValueError, match=r"train.engine: graph: it needs a CUDA device, this is cpu"):
        pick_engine(tiny_config("train.engine=graph"), torch.device("cpu"), 1)
    cuda = torch.device("cuda")
    assert pick_engine(tiny_config(), cuda, 1) == "graph"
    assert pick_engine(tiny_config(), cuda, 2) == "compile"
    assert pick_engine(tiny_config("train.accumulate=2"), cuda, 1) == "compile"
    assert pick_engine(tiny_config(), torch.device("cpu"), 1) == "eager"


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile up to the code generator, which tracing and guards do not depend on and which takes minutes."""
    original = torch.compile
    monkeypatch.setattr("torch.compile", lambda module, **options: original(module, backend="eager", **options))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_reselection_of_pooled_layers_compiles_nothing(tiny_config, compiled):
    config = tiny_config("model.dropout=0", "alignment.bitc=true")
    step, eager = make(config, "compile"), make(config)
    graphs = 0
    for number in range(200):
        if number in (50, 100, 150):
            chosen = LayerSelection((number // 50 - 1,), (1.0,))
            step.aligner.select(chosen)
            eager.aligner.select(chosen)
        frames = 12 + 4 * (number % 2)
        for one in (step, eager):
            one.aligner.align(0.5 if number >= 4 else 0.0)
        step([inputs(config, frames=frames, seed=number)], LR)
        if number < 60:
            eager([inputs(config, frames=frames, seed=number)], LR)
        if number == 59:
            same(values(step), values(eager), rtol=1e-3, atol=1e-4)
        if number == 5:
            graphs = compiled()
    assert graphs == 4  # two lengths, with and without alignment
    assert compiled() == graphs


def test_reselection_of_frame_wise_layers_compiles_once_for_a_changed_set(tiny_config, compiled):
    config = tiny_config("alignment.pool=null")
    step = make(config, "compile")
    batch = inputs(config, pooled=False)
    seen = []
    for layers in ((0, 1), (0, 2), (0, 1), (0, 2), (1, 2)):
        step.aligner.select(LayerSelection.uniform(layers))
        for weight in (0.5, 0.25):
            step.aligner.align(weight)
            step([batch], LR)
        seen.append(compiled())
    assert seen == [1, 2, 2, 2, 3]
