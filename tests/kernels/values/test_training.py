"""The demo preset, tiny: training and layer attribution with the kernels give the reference's numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import agrepa_fast as ag
from agrepa_fast.data.batches import Batch
from agrepa_fast.ops import dispatch
from agrepa_fast.training.config import load_config
from agrepa_fast.training.objective import Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer

FRAMES, SIZE, TEACHER = 6, 2, 12


@pytest.fixture
def config():
    sizes = ["model.depth=2", "model.width=16", "model.heads=2", "model.token_width=8", "probe.k=2"]
    return load_config("demo", [*sizes, "optimizer.initial_lr=0.002"])


def batch(config, device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(FRAMES) < torch.tensor([FRAMES, FRAMES - 2])[:, None]
    return Batch(
        mel=torch.randn(SIZE, FRAMES, config.mel.mels, generator=generator) * mask[..., None],
        mask=mask,
        prompt=torch.arange(FRAMES) < torch.tensor([2, 0])[:, None],
        tokens=torch.randint(1, 256, (SIZE, 4, 1), generator=generator),
        token_lengths=torch.tensor([4, 3]),
        vocabulary=torch.zeros(SIZE, dtype=torch.int64),
        domain=torch.zeros(SIZE, dtype=torch.int64),
        domains=("speech",),
        audio=torch.zeros(SIZE, 1),
        audio_lengths=torch.ones(SIZE, dtype=torch.int64),
        clips=[],
        indices=torch.arange(SIZE),
        starts=torch.zeros(SIZE, dtype=torch.int64),
    ).to(device)


def train(config, device, steps=3):
    """Losses of a few steps, alignment included, and the scores of a probe after them."""
    torch.manual_seed(0)
    objective = Objective(config, {"spectral": TEACHER}, torch.Generator(device)).to(device).train()
    optimizer = build_optimizer(objective, config)
    data = batch(config, device)
    targets = {"spectral": torch.randn(SIZE, TEACHER, generator=torch.Generator().manual_seed(1)).to(device)}
    domains = {"spectral": torch.ones(SIZE, device=device)}
    losses = []
    for _ in range(steps):
        given = StepInputs.of(data, targets, data.mask, domains)
        loss, metrics = objective(given, objective.draw(given), torch.tensor(0.5, device=device))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        losses.append([loss.item(), metrics["flow_loss"].item(), metrics["align_loss"].item(), norm.item()])
    cond, _ = objective.backbone.condition(data)
    inputs = {"x_t": data.mel, "t": torch.tensor([0.3, 0.7], device=device), "cond": cond, "mask": data.mask}
    network = objective.backbone.network
    with torch.no_grad():
        inputs = {name: value.detach() for name, value in inputs.items()}
        scores = [ag.attribute_layers(network, inputs, engine=e).by_sample for e in ("prefix", "stacked", "loop")]
    return torch.tensor(losses, dtype=torch.float64), scores


def test_training_and_probe_equal_the_reference(config, device, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "MODE", "reference")
    losses, scores = train(config, device)
    assert (losses[0] - losses[-1]).abs().max() > 1e-3, "the steps must change something"
    monkeypatch.setattr(dispatch, "MODE", "triton")
    launched = []
    from agrepa_fast.kernels import pooling, residual

    for module in (residual, pooling):
        launch = module.launch
        monkeypatch.setattr(
            module, "launch", lambda k, *a, launch=launch, **o: (launched.append(k), launch(k, *a, **o))
        )
    fused_losses, fused_scores = train(config, device)
    assert len(launched) > 50, "the kernels did not run"
    torch.testing.assert_close(fused_losses, losses, rtol=1e-4, atol=1e-5)
    for one, other in zip(fused_scores, scores):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
        assert one.min() > 0


def test_the_demo_is_what_is_trained(config) -> None:
    """The test's configuration is the demo preset but for its sizes."""
    demo = load_config("demo")
    model = dataclasses.replace(config.model, depth=8, width=128, heads=4, token_width=demo.model.token_width)
    optimizer = dataclasses.replace(config.optimizer, initial_lr=demo.optimizer.initial_lr)
    assert dataclasses.replace(config, model=model, optimizer=optimizer, probe=demo.probe) == demo
