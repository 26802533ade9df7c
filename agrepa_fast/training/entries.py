"""Entries of a run's log that take more than a line to make: its start, and the metrics of its steps."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import distributed, progress
from .checkpoint import begun
from .environment import versions

if TYPE_CHECKING:
    from .trainer import Trainer


def log_start(trainer: Trainer) -> None:
    """Log what the run is made of: versions, device, sizes of the model, clips."""
    parts = {
        "model": trainer.objective.backbone.network,
        "conditioner": trainer.objective.backbone.conditioner,
        "heads": trainer.objective.heads(),
    }
    clips = {"train": trainer.data.train.clips, "valid": trainer.data.valid.clips}
    trainer.log.write(
        "start",
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        versions=versions(),
        device=str(trainer.device),
        precision="bf16" if trainer.bf16 else "fp32",
        engine=trainer.train_step.engine,
        ranks=distributed.world_size(),
        matmul_flops=trainer.rates.matmul,
        process=dataclasses.asdict(trainer.config.flow.process) | {"scored": trainer.config.probe.output},
        parameters={name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()},
        clips={name: len(listed) for name, listed in clips.items()} | {"duplicates": trainer.data.split.duplicates},
        data=trainer.data.digest,
        domains={
            domain: sum(clip.domain == domain for clip in trainer.data.train.clips)
            for domain in trainer.data.train.domains
        },
    )
    for item in trainer.data.skipped:
        trainer.log.write("skipped", path=str(item.path), source=item.source, reason=item.reason)


def log_train(trainer: Trainer, bar: Any) -> None:
    """Log the metrics since the last line (their mean over the ranks) and the rates (their sum over the ranks).

    Raises:
        UserError: too many steps in a row had gradients that are not finite.
    """
    rank_metrics, (_, longest, skipped) = trainer.train_step.read()
    gathered = distributed.gather((trainer.selected(rank_metrics), trainer.rates.read()))
    names = dict.fromkeys(name for metrics, _ in gathered for name in metrics)
    by_rank = {name: [metrics[name] for metrics, _ in gathered if name in metrics] for name in names}
    metrics = {name: sum(values) / len(values) for name, values in by_rank.items()}
    rates = gathered[0][1]
    for name in ("samples_per_second", "frames_per_second"):
        rates[name] = sum(other[name] for _, other in gathered)
    trainer.log.write(
        "train",
        step=trainer.step,
        **metrics,
        align_weight=trainer.applied_weight,
        lr=trainer.learning_rate(trainer.step - 1),
        skipped_steps=int(skipped),
        captures=trainer.train_step.captures,
        **rates,
    )
    if longest >= trainer.config.train.max_skipped:
        reason = f"{int(longest)} steps in a row by step {trainer.step} had gradients that are not finite"
        kept = f"; the last checkpoint is in {trainer.run_dir / 'checkpoints'}" if begun(trainer.run_dir) else ""
        raise UserError(f"{reason}: lower optimizer.lr, or train.precision=fp32{kept}")
    progress.show(bar, metrics, rates)
