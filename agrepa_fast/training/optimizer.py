"""AdamW with its parameter groups, and the one-cycle learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .config import OptimizerConfig, RunConfig
from .objective import Objective


def build_optimizer(objective: Objective, config: RunConfig) -> torch.optim.AdamW:
    """AdamW: decay on the backbone's matrices only; the heads are a group of their own, without decay."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    tables = {id(m.weight) for m in objective.backbone.modules() if isinstance(m, nn.Embedding)}
    for parameter in objective.backbone.parameters():
        decayed = parameter.dim() >= 2 and id(parameter) not in tables
        (matrices if decayed else rest).append(parameter)
    o = config.optimizer
    groups = [
        {"params": matrices, "weight_decay": o.weight_decay, "name": "matrices"},
        {"params": rest, "weight_decay": 0.0, "name": "biases, norms, embeddings"},
        {"params": list(objective.heads().parameters()), "weight_decay": 0.0, "name": "heads"},
    ]
    # One pass over the state: on a CPU the unfused step takes several times as long, and the heads feel it most.
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, fused=True)


def one_cycle(optimizer: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Factor on `lr` by step: half a cosine from initial_lr up, then one down to final_lr at the last step.

    (torch's OneCycleLR divides by zero when the warm-up is a single step.)"""
    warmup = max(1, round(optimizer.warmup_share * steps))

    def factor(step: int) -> float:
        if step < warmup:
            begin, end, progress = optimizer.initial_lr, optimizer.lr, step / warmup
        else:
            begin, end, progress = optimizer.lr, optimizer.final_lr, (step - warmup) / max(1, steps - 1 - warmup)
        return (end + (begin - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))) / optimizer.lr

    return factor
