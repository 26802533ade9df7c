"""Forward passes on tensors that say they are on a CUDA device: a tensor left on the CPU or a read by the host raises.

The tensors are those of FakeTensorMode, which have shapes, dtypes and devices and no values. Autograd's engine asks a
real device for its streams, so the backward is not run here; tests/training/test_step.py watches it on the CPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast import AblationPlan, DiT, DiTConfig
from agrepa_fast.attribution import native
from agrepa_fast.models.flow import probe_inputs, sample
from agrepa_fast.training.config import load_config
from agrepa_fast.training.meter import Meter
from agrepa_fast.training.objective import Draws, Objective, StepInputs

TEACHERS = {"speech": 12, "audio": 8}
SIZES = (
    "mel.mels=16",
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.token_width=8",
    "model.dropout=0.1",
    "data.buckets=2",
    "probe.k=2",
)
BATCH, FRAMES = 4, 12


class Ops(TorchDispatchMode):
    """The names of the library's ops that run."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.overloadpacket._qualified_op_name.partition("::")
        if namespace == "agrepa_fast":
            self.seen.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def ops():
    """On a fake CUDA device: new tensors are there, and the fused ops are the kernels' (their fake forms)."""
    with FakeTensorMode(), Ops() as recorded, torch.device("cuda"):
        yield recorded


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
def test_the_loss_stays_on_the_device(ops, pool, head, objective):
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
        step.observe(metrics)
        meter = Meter()
        meter.add({**metrics, "grad_norm": loss.detach()})
        assert {value.device.type for value in (loss, *metrics.values(), *meter._sums.values())} == {"cuda"}
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
