"""Losses, a training step, probes and the sampler on tensors that say they are on a CUDA device.

A tensor left on the CPU or a read by the host raises; conftest.py says how.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves

from agrepa_fast import AblationPlan, DiT, DiTConfig
from agrepa_fast.attribution import native
from agrepa_fast.models.flow import probe_inputs, sample
from agrepa_fast.training.config import load_config
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.meter import Meter
from agrepa_fast.training.objective import Draws, Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.step import TrainStep

from .small import SIZES, TEACHERS

BATCH, FRAMES = 4, 12


def test_the_mode_finds_what_it_is_for(ops):
    x = torch.randn(3)
    with pytest.raises(RuntimeError, match="device"):
        x + torch.randn(3, device="cpu")
    with pytest.raises(DataDependentOutputException):
        x.sum().item()


def step_inputs(pooled: bool, dtype: torch.dtype) -> StepInputs:
    mask = torch.ones(BATCH, FRAMES, dtype=torch.bool)
    shape = (BATCH,) if pooled else (BATCH, FRAMES)
    return StepInputs(
        mel=torch.randn(BATCH, FRAMES, 16),
        mask=mask,
        prompt=torch.zeros(BATCH, FRAMES, dtype=torch.bool),
        tokens=torch.ones(BATCH, 16, 1, dtype=torch.int64),
        token_lengths=torch.full((BATCH,), 16),
        vocabulary=torch.zeros(BATCH, dtype=torch.int64),
        targets={name: torch.randn(*shape, width, dtype=dtype) for name, width in TEACHERS.items()},
        target_mask=mask,
        domains={name: torch.ones(BATCH, dtype=torch.bool) for name in TEACHERS},
    )


SETTINGS = [
    *itertools.product(["mean"], ["mlp", "repa", "linear", "low-rank"], ["cosine"]),
    *itertools.product(["null"], ["repa", "conv"], ["cosine", "relation", "cka"]),
    ("mean", "mlp", "relation"),
    ("mean", "mlp", "cka"),
]


@pytest.mark.parametrize("pool, head, objective", SETTINGS)
def test_the_loss_and_its_gradients_stay_on_the_device(ops, backward, pool, head, objective):
    changes = [f"alignment.pool={pool}", f"alignment.head={head}", f"alignment.objective={objective}"]
    if objective == "cosine":
        changes.append("alignment.timestep_weight=middle")
    if pool == "null":
        changes.append("alignment.standardise_targets=true")
    config = load_config("demo", [*SIZES, "alignment.bitc=true", "alignment.stop_similarity=0.9", *changes])
    step = Objective(config, TEACHERS, torch.Generator("cpu"))  # a generator on the device needs one
    draws = Draws(
        torch.rand(BATCH),
        torch.randn(BATCH, FRAMES, 16),
        *torch.ones(2, BATCH, dtype=torch.bool).unbind(),
    )
    for dtype in (torch.float32, torch.float16):  # cached features are often half precision
        loss, metrics = step(step_inputs(pool == "mean", dtype), draws, torch.ones(()))
        step.aligner.observe(metrics)
        meter = Meter()
        meter.add({**metrics, "grad_norm": loss.detach()})
        assert {value.device.type for value in (loss, *metrics.values(), *meter._sums.values())} == {"cuda"}
        trained = backward(loss)
        assert {p.grad.device.type for p in trained} == {"cuda"}
        assert {id(p) for p in step.parameters() if p.requires_grad} >= {id(p) for p in trained}
        assert len(trained) > len([*step.backbone.network.parameters()])  # a head and the condition besides
    # On the CPU the reference would run, and none of these.
    wanted = {"gated_residual_norm", "layer_norm_modulate"}
    if pool == "mean":
        wanted |= {"masked_mean"}
    elif objective == "cosine" and head == "repa":
        wanted |= {"projection_cosine_rows"}  # rows, since timestep_weight weighs the samples
    assert wanted <= ops.seen


@pytest.mark.parametrize("engine", sorted(native.ENGINES))
@pytest.mark.parametrize("branches", [None, ("attn", "ff")])
def test_a_probe_stays_on_the_device(ops, engine, branches):
    model = DiT(DiTConfig(3, 16, 2, 5, 3, 2, 0.1, 16)).eval()
    plan = AblationPlan.build(model.depth, None, branches)
    inputs = probe_inputs(
        torch.randn(2, FRAMES, 5),
        torch.randn(2, FRAMES, 3),
        torch.ones(2, FRAMES, dtype=torch.bool),
        (0.2, 0.7),
        torch.Generator("cpu"),
    )
    with torch.no_grad():
        measured = native.measure(model, plan, inputs, engine)
    assert measured.device.type == "cuda"
    assert measured.shape == (len(plan.units) + 2, 4)
    assert {"gated_residual_norm", "gated_residual", "velocity_delta"} <= ops.seen


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_sampling_stays_on_the_device(ops, method):
    model = DiT(DiTConfig(3, 16, 2, 5, 3, 2, 0.1, 16)).eval()
    cond, null = torch.randn(2, 2, FRAMES, 3).unbind()
    mask = torch.ones(2, FRAMES, dtype=torch.bool)
    with torch.no_grad():
        mel = sample(model, torch.randn(2, FRAMES, 5), cond, null, mask, points=4, guidance=2.0, method=method)
    assert mel.device.type == "cuda"


@pytest.mark.parametrize("pool", ["mean", "null"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_step_stays_on_the_device(ops, backward, fake_copies, monkeypatch, pool, bf16):
    """Forward, backward, clipping, fused AdamW, moving average and meter, unaligned and aligned."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(loss))
    adamw = []  # the fused kernel has no fake form: what it is given
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *given, **options: adamw.extend(tree_leaves((given, options))))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    config = load_config("demo", [*SIZES, f"alignment.pool={pool}", "alignment.bitc=true"])
    objective = Objective(config, TEACHERS, torch.Generator("cpu"))
    draws = Draws(torch.rand(BATCH), torch.randn(BATCH, FRAMES, 16), *torch.ones(2, BATCH, dtype=torch.bool).unbind())
    objective.draw = lambda inputs, generator=None: draws
    optimizer = build_optimizer(objective, config, capturable=False)
    # As capturable=True makes them; AdamW reads the learning rate once, at its start.
    for group in optimizer.param_groups:
        group |= {"lr": torch.tensor(1e-3), "capturable": True}
    ema = Ema(objective.backbone, 0.9)
    step = TrainStep(objective, optimizer, ema, config, torch.device("cuda"), bf16, "eager")
    for weight in (0.0, 0.5):
        objective.aligner.align(weight)
        step([step_inputs(pool == "mean", torch.float32)], 1e-3)
    everything = [*objective.state_dict().values(), *ema.module.state_dict().values(), *step.meter._sums.values()]
    everything += [value for value in adamw if isinstance(value, torch.Tensor)]
    assert {value.device.type for value in [*everything, step.skipped]} == {"cuda"}
    updated = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    assert {id(p) for p in updated} <= {id(value) for value in adamw}
    assert len(updated) == sum(p.requires_grad for p in objective.parameters())
    assert {"gated_residual_norm", "residual_backward"} <= ops.seen
