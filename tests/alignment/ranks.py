"""One of two ranks under DistributedDataParallel and gloo; `test_distributed.py` starts both.

DDP is built as a trainer builds it: before any selection, without `find_unused_parameters`. A parameter without a
gradient would end the second step.

Usage: ranks.py RANK FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import agrepa_fast as ag

SAMPLES, FRAMES = 4, 6
TEACHERS = {"speech": 5, "audio": 4}
OWN: list[object] = []  # a group of this rank alone: the losses of "one process"


class Step(nn.Module):
    """A small network and its alignment loss, called as the documentation shows."""

    def __init__(
        self,
        pool: str | None,
        objective: str = "cosine",
        head: str = "mlp",
        t_grid: Sequence[float] = (),
        group: object = None,
    ) -> None:
        super().__init__()
        self.model = ag.DiT(ag.DiTConfig(depth=3, width=8, heads=2, mels=3, cond=0, dropout=0.0, max_frames=8))
        [nn.init.normal_(p, std=0.2) for p in self.model.parameters()]
        every = ag.LayerSelection.uniform(range(3), t_grid=t_grid)
        self.align = ag.AlignmentLoss(8, TEACHERS, every, pool, head, objective, process_group=group)

    def forward(
        self, x_t: Tensor, t: Tensor, targets: dict, domains: object, mask: Tensor | None = None, aligned: bool = True
    ) -> Tensor:
        velocity, hidden = self.model(x_t, t, mask=mask, hidden_layers=self.align.active if aligned else ())
        loss = velocity.square().mean()
        return loss + (self.align(hidden, targets, mask, domains, t=t)[0] if aligned else self.align.idle())


def batch(step: int, rank: int, pool: str | None, names: Sequence[str]) -> tuple[Tensor, Tensor, dict, list[str]]:
    torch.manual_seed(10 * step + rank)
    shape = (len(names),) if pool else (len(names), FRAMES)
    targets = {name: torch.randn(*shape, width) for name, width in TEACHERS.items()}
    return torch.randn(len(names), FRAMES, 3), torch.rand(len(names)), targets, list(names)


def joined(one: tuple, other: tuple) -> tuple:
    """Two batches as one."""
    targets = {name: torch.cat([one[2][name], other[2][name]]) for name in TEACHERS}
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]), targets, one[3] + other[3]


MIXED, SPEECH = ["speech", "audio", "audio", "speech"], ["speech"] * SAMPLES


def pair(*arguments: Any) -> tuple[Step, DistributedDataParallel]:
    """The same module twice: by itself, and under DDP."""
    torch.manual_seed(0)
    plain = Step(*arguments, group=OWN[0])
    parallel = DistributedDataParallel(Step(*arguments))
    parallel.module.load_state_dict(plain.state_dict())
    return plain, parallel


def same_gradients(parallel: nn.Module, plain: nn.Module) -> None:
    for (name, mine), alone in zip(parallel.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, alone.grad, rtol=1e-4, atol=1e-6, msg=name)


def absent_domains(rank: int) -> None:
    """Gradients are those of one process; of a domain that no rank has they are there, and exactly zero."""
    for pool, objective in (("mean", "cosine"), (None, "cosine"), (None, "cka")):
        plain, parallel = pair(pool, objective)
        for step, here in enumerate([(SPEECH, SPEECH), (MIXED, SPEECH), (SPEECH, MIXED)]):
            parallel.zero_grad()
            parallel(*batch(step, rank, pool, here[rank])).backward()
            plain.zero_grad()
            plain(*joined(*(batch(step, r, pool, here[r]) for r in (0, 1)))).backward()
            same_gradients(parallel.module, plain)
            for name, mine in parallel.module.named_parameters():
                if "heads.audio" in name:
                    assert (here == (SPEECH, SPEECH)) == (mine.grad.count_nonzero() == 0), (name, here)


def mixed_domains(rank: int) -> None:
    """Samples of two teachers 7:1 and 1:7, of different lengths: the gradients of one process, to 1e-6."""
    names = (["speech"] * 7 + ["audio"], ["speech"] + ["audio"] * 7)
    lengths = (torch.tensor([6, 6, 5, 6, 6, 4, 6, 1]), torch.tensor([1, 2, 1, 3, 1, 1, 2, 6]))
    masks = [torch.arange(FRAMES) < some[:, None] for some in lengths]
    for pool, objective, masked, compiled in (
        ("mean", "cosine", False, False),
        ("mean", "cosine", True, False),
        (None, "cosine", False, False),
        (None, "cosine", True, False),
        (None, "relation", True, False),
        ("mean", "cosine", True, True),
    ):
        plain, parallel = pair(pool, objective)
        if compiled:
            parallel.module.align = torch.compile(parallel.module.align, fullgraph=True, backend="aot_eager")
        both = [batch(0, r, pool, names[r]) for r in (0, 1)]
        mine = masks[rank] if masked else None
        domains = (
            {name: torch.tensor([n == name for n in names[rank]]) for name in TEACHERS} if compiled else names[rank]
        )
        alone = plain(*joined(*both), torch.cat(masks) if masked else None)
        alone.backward()
        loss = parallel(*both[rank][:3], domains, mine)
        loss.backward()
        mean = loss.detach() / 2
        distributed.all_reduce(mean)
        torch.testing.assert_close(mean, alone.detach())
        found, expected = (
            torch.cat([parameter.grad.flatten() for parameter in module.parameters()]) for module in (parallel, plain)
        )
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-6, (pool, objective, masked, compiled, error)
        # Without gradients the means are of this rank: the same as in a group of this rank alone.
        with torch.no_grad():
            assert parallel.module(*both[rank][:3], domains, mine).item() == plain(*both[rank], mine).item()


def by_flow_time(rank: int) -> None:
    """Each teacher's own weights by flow time, over samples of other times on each rank: the gradients of one process,
    before and after a re-selection, in plain PyTorch and compiled."""
    names = (["speech"] * 7 + ["audio"], ["speech"] + ["audio"] * 7)
    lengths = (torch.tensor([6, 6, 5, 6, 6, 4, 6, 1]), torch.tensor([1, 2, 1, 3, 1, 1, 2, 6]))
    masks = [torch.arange(FRAMES) < some[:, None] for some in lengths]
    maps = [
        {
            "speech": ag.LayerSelection.by_time((0.1, 0.5, 0.9), {0: (3, 1, 0), 2: (1, 1, 2)}),
            "audio": ag.LayerSelection.by_time((0.2, 0.5, 0.8), {1: (1, 5, 1), 2: (2, 0, 2)}),
        },
        ag.LayerSelection.by_time((0.0, 0.3, 1.0), {0: (0, 1, 4), 1: (1, 1, 0)}),
    ]
    for pool, compiled in (("mean", False), (None, False), ("mean", True)):
        plain, parallel = pair(pool, "cosine", "mlp", (0.0, 0.5, 1.0))
        if compiled:
            parallel.module.align = torch.compile(parallel.module.align, fullgraph=True, backend="aot_eager")
        both = [batch(0, r, pool, names[r]) for r in (0, 1)]
        here = {name: torch.tensor([n == name for n in names[rank]]) for name in TEACHERS}
        for selection in maps:
            for module in (plain, parallel.module):
                module.align.select(selection)
                module.zero_grad()
            plain(*joined(*both), torch.cat(masks)).backward()
            parallel(*both[rank][:3], here, masks[rank]).backward()
            same_gradients(parallel.module, plain)
            assert any(p.grad.count_nonzero() for p in plain.align.heads["audio"]["1"].parameters())


def mixed_tokens(rank: int) -> None:
    """The same of `InterfaceLoss`, where the tokens of some samples were dropped."""
    names = (["speech"] * 7 + ["audio"], ["speech"] + ["audio"] * 7)
    torch.manual_seed(0)
    embedding, kept = torch.randn(2, 8, FRAMES, 4), torch.rand(2, 8) < 0.6
    targets = [{name: torch.randn(8, width) for name, width in TEACHERS.items()} for _ in range(2)]
    plain = ag.InterfaceLoss(4, TEACHERS, {}, process_group=OWN[0])
    parallel = ag.InterfaceLoss(4, TEACHERS, {})
    parallel.load_state_dict(plain.state_dict())
    every = {name: torch.cat([one[name] for one in targets]) for name in TEACHERS}
    plain(embedding.flatten(0, 1), every, None, names[0] + names[1], kept.flatten())[0].backward()
    model = DistributedDataParallel(parallel)
    model(embedding[rank], targets[rank], None, names[rank], kept[rank])[0].backward()
    same_gradients(parallel, plain)


def reselection(rank: int) -> None:
    """Three selections under one DDP: no flag changes, what is not selected runs no forward and gets exactly zero."""
    every, ran = (0, 1, 2), []
    for head, compiled, selections in (
        ("mlp", False, [every, (1,), (1,), (0, 2), (0, 2), (2,), (2,)]),
        ("conv", False, [(1,), (0, 2), (2,)]),
        ("linear", True, [every, (1,)]),
    ):
        plain, parallel = pair(None, "cosine", head)
        if compiled:
            parallel.module.align = torch.compile(parallel.module.align, fullgraph=True, backend="aot_eager")
        optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-3) for module in (plain, parallel)]
        heads = parallel.module.align.heads
        for name, module in heads.named_modules():
            if head == "conv" and name.count(".") == 1:  # one head: <teacher>.<layer>; only "conv" is called
                module.register_forward_hook(lambda *_, name=name: ran.append(int(name.partition(".")[2])))
        for step, layers in enumerate(selections):
            ran.clear()
            for module, optimizer in zip((plain, parallel.module), optimizers, strict=True):
                module.align.select(ag.LayerSelection.uniform(layers))
                assert all(parameter.requires_grad for parameter in module.parameters())
                optimizer.zero_grad()
            names = (MIXED, ["speech", "speech", "audio", "speech"])
            parallel(*batch(step, rank, None, names[rank])).backward()
            plain(*joined(*(batch(step, r, None, names[r]) for r in (0, 1)))).backward()
            same_gradients(parallel.module, plain)
            for name, parameter in heads.named_parameters():
                selected = int(name.split(".")[1]) in layers
                assert (parameter.grad.count_nonzero() > 0) == selected, (name, layers)
            assert set(ran) == (set(layers) if head == "conv" else set()), (ran, layers)
            for optimizer in optimizers:
                optimizer.step()


def left_out(rank: int) -> None:
    """Steps without alignment between others: `idle` gives every head exactly zero."""
    for pool in ("mean", None):
        _, parallel = pair(pool)
        for step, aligned in enumerate([False, False, True, False, True]):
            parallel.zero_grad()
            parallel(*batch(step, rank, pool, MIXED), aligned=aligned).backward()
            for name, parameter in parallel.module.align.named_parameters():
                assert (parameter.grad.count_nonzero() > 0) == aligned, name


SCENARIOS = [absent_domains, mixed_domains, by_flow_time, mixed_tokens, reselection, left_out]


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    OWN.append([distributed.new_group([0]), distributed.new_group([1])][rank])
    for scenario in SCENARIOS:
        scenario(rank)
        print("passed", scenario.__name__, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
