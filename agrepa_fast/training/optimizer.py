"""AdamW with its parameter groups, and the one-cycle learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .config import OptimizerConfig, RunConfig
from .objective import Objective


def build_optimizer(objective: Objective, config: RunConfig, capturable: bool = False) -> torch.optim.AdamW:
    """Fused AdamW. Only the backbone's matrices have weight decay; the heads are a group of their own without it.

    capturable: keep the learning rate in a tensor on the device, as CUDA graphs need it.
    """
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
    device = next(objective.parameters()).device
    lr = torch.tensor(o.lr, device=device) if capturable else o.lr
    return torch.optim.AdamW(groups, lr=lr, betas=o.betas, fused=True, capturable=capturable)


def one_cycle(optimizer: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step: half a cosine up from initial_lr, then one down to final_lr.

    torch's OneCycleLR divides by zero if the warm-up is a single step.
    """
    warmup = max(1, round(optimizer.warmup_share * steps))

    def rate(step: int) -> float:
        if step < warmup:
            begin, end, progress = optimizer.initial_lr, optimizer.lr, step / warmup
        else:
            begin, end, progress = optimizer.lr, optimizer.final_lr, (step - warmup) / max(1, steps - 1 - warmup)
        return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return rate
