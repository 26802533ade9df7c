"""The presets of a run by name: demo, small, base, paper."""

from __future__ import annotations

from typing import Any

from ...data.mel import MEL_PRESETS, MelConfig
from ...models.dit import PRESETS
from .alignment import AlignmentConfig, ProbeConfig
from .data import DataConfig
from .model import FlowConfig, ModelConfig
from .run import RunConfig
from .train import OptimizerConfig, TrainConfig


def _run_preset(name: str, **sections: Any) -> RunConfig:
    dit = PRESETS[name]
    mel = sections.pop("mel", MelConfig())
    model = ModelConfig(dit.depth, dit.width, dit.heads, dit.ff_ratio, dit.dropout, dit.cond - mel.mels)
    return RunConfig(mel=mel, model=model, **sections)


RUN_PRESETS: dict[str, RunConfig] = {
    "demo": _run_preset(
        "demo",
        mel=MEL_PRESETS["compact-16khz"],
        data=DataConfig(max_seconds=2.0, frames_per_batch=768),
        probe=ProbeConfig(start=250, samples=12, k=3),
        alignment=AlignmentConfig(ramp=50),
        optimizer=OptimizerConfig(lr=2e-3, initial_lr=2e-4, final_lr=1e-5, weight_decay=0.01, ema_decay=0.99),
        train=TrainConfig(steps=900, log_every=10, valid_every=100, valid_samples=24, checkpoint_every=300, keep=2),
        flow=FlowConfig(guidance=2.0),
    ),
    "small": _run_preset(
        "small",
        optimizer=OptimizerConfig(lr=5e-4, initial_lr=5e-5, ema_decay=0.999),
        train=TrainConfig(steps=50_000),
        probe=ProbeConfig(start=2000),
    ),
    "base": _run_preset(
        "base",
        data=DataConfig(frames_per_batch=16_384, workers=8),
        optimizer=OptimizerConfig(lr=2e-4, initial_lr=2e-5),
        train=TrainConfig(steps=200_000),
    ),
    "paper": _run_preset("paper", data=DataConfig(frames_per_batch=16_384, workers=8)),
}
