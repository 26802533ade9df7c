"""A small network of somebody else's, batches for it, and a training loop with an `Aligner`; also for `ranks.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import agrepa_fast as ag

WIDTH, FRAMES, CHANNELS, DEPTH = 8, 6, 5, 4
TEACHERS = {"speech": 7, "audio": 3}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix, self.frames = nn.Linear(WIDTH, WIDTH), nn.Linear(FRAMES, FRAMES)

    def forward(self, hidden: Tensor, te: Tensor) -> Tensor:
        mixed = torch.tanh(self.mix(self.norm(hidden)) + te[:, None, None])
        return hidden + self.frames(mixed.mT).mT


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim = WIDTH
        self.head, self.tail = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.head(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.tail(hidden)


def network(seed: int = 3) -> Network:
    torch.manual_seed(seed)
    return Network()


def batch(step: int, pool: str | None, samples: int = 4) -> dict:
    """The batch of a step: x_t, t, velocity, features, mask and the teacher that each sample counts for."""
    generator = torch.Generator().manual_seed(1000 + step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (samples,) if pool else (samples, FRAMES)
    return {
        "x": draw(samples, FRAMES, CHANNELS),
        "time": torch.rand(samples, generator=generator),
        "velocity": draw(samples, FRAMES, CHANNELS),
        "features": {name: draw(*rows, width) for name, width in TEACHERS.items()},
        "mask": torch.arange(FRAMES) < torch.randint(2, FRAMES + 1, (samples, 1), generator=generator),
        "domains": ["speech" if n % 2 else "audio" for n in range(samples)],
    }


def aligner_for(model: nn.Module, pool: str | None, **options: object) -> ag.Aligner:
    """Probes after 2 steps and after every second one; every change of the order changes the selection."""
    plan = ag.ProbePlan(start=2, every=2, samples=3, momentum=0.3, margin=0.0)
    schedule = ag.AlignmentSchedule(2, 3, 9, 12)
    return ag.Aligner(model, TEACHERS, **{"k": 2, "pool": pool, "probe": plan, "schedule": schedule, **options})


def optimizer_for(model: nn.Module, aligner: ag.Aligner) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": model.parameters()}, *aligner.param_groups(weight_decay=0.1)], lr=3e-2)


def train(model: nn.Module, aligner: ag.Aligner, optimizer: torch.optim.Optimizer, start: int, stop: int, data) -> list:
    """Steps start + 1 to stop; the selections after each of them. data: step -> batch."""
    selections = []
    with aligner:
        for step in range(start + 1, stop + 1):
            b = data(step)
            loss = (model(b["x"], time=b["time"]) - b["velocity"]).square().mean()
            loss = loss + aligner.loss(b["features"], b["mask"], b["domains"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            aligner.step(step)
            selections.append(aligner.selection)
    return selections
