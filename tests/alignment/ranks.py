"""One of two ranks under DistributedDataParallel and gloo; `test_distributed.py` starts both.

DDP is built as a trainer builds it: before any selection, without `find_unused_parameters`. A parameter without a
gradient would end the second step.

Usage: ranks.py RANK FILE
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import foreign  # beside this script
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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


def different_selections(rank: int) -> None:
    """Ranks that would align different layers, or the same ones with different weights, are refused at once."""
    first, second = ag.LayerSelection.uniform((0,)), ag.LayerSelection.uniform((1,))
    choices = [
        (ag.LayerSelection.uniform((0, 1)), ag.LayerSelection.uniform((0, 2))),
        (ag.LayerSelection((0, 1), (0.5, 0.5)), ag.LayerSelection((0, 1), (0.25, 0.75))),
        ({"speech": first, "audio": second}, {"speech": second, "audio": first}),
    ]
    by_time = (
        ag.LayerSelection.by_time((0.2, 0.8), {0: (1, 3), 1: (3, 1)}),
        ag.LayerSelection.by_time((0.2, 0.8), {0: (3, 1), 1: (1, 3)}),  # the same layers and mean weights
    )
    for pool, pairs, t_grid in (("mean", choices, ()), (None, choices, ()), ("mean", [by_time], (0.2, 0.8))):
        for chosen in pairs:
            _, parallel = pair(pool, "cosine", "mlp", t_grid)
            align = parallel.module.align
            align.select(chosen[rank])
            data = batch(0, rank, pool, MIXED)
            hidden = {layer: torch.randn(SAMPLES, FRAMES, 8) for layer in range(3)}
            refused = False
            try:
                align(hidden, *data[2:3], None, MIXED, t=data[1])
            except RuntimeError as error:
                refused = "ranks have different layers or weights; use selection.synchronised()" in str(error)
            assert refused, (pool, chosen)
            align.select(chosen[0])
            align(hidden, *data[2:3], None, MIXED, t=data[1])
    # DDP gives all ranks the first one's buffers in each forward; which heads run is known to the host alone.
    _, parallel = pair(None)
    parallel.module.align.select(ag.LayerSelection.uniform((rank,)))
    refused = False
    try:
        parallel(*batch(0, rank, None, MIXED))
    except RuntimeError as error:
        refused = "ranks have different layers" in str(error)
    assert refused


def train_pair(rank: int, pool: str | None, wrap: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, ag.Aligner]:
    """An `Aligner` on a wrapped model against one process with the rows of both ranks: selections and parameters."""
    model = foreign.network()
    whole, wrapped = copy.deepcopy(model), wrap(model)
    torch.manual_seed(rank)  # the heads of rank 0 are everybody's
    mine, alone = foreign.aligner_for(wrapped, pool), foreign.aligner_for(whole, pool, process_group=OWN[0])

    def optimizers() -> list[torch.optim.SGD]:
        pairs = ((wrapped, mine), (whole, alone))
        return [torch.optim.SGD([{"params": m.parameters()}, *a.param_groups()], lr=0.3) for m, a in pairs]

    steppers = optimizers()
    with mine.attach(), alone:
        alone.loss_fn.load_state_dict(mine.loss_fn.state_dict())
        for step in range(1, 8):
            if step == 6:  # resumed between two probes, on each rank by an aligner with other heads
                mine.detach()
                state, mine = mine.state_dict(), foreign.aligner_for(wrapped, pool)
                mine.load_state_dict(state)
                mine.attach()
                steppers = optimizers()
            parts = [foreign.batch(2 * step + r, pool, samples=4 + r) for r in (0, 1)]
            joined = {name: torch.cat([part[name] for part in parts]) for name in ("x", "time", "velocity", "mask")}
            joined["features"] = {n: torch.cat([part["features"][n] for part in parts]) for n in foreign.TEACHERS}
            joined["domains"] = parts[0]["domains"] + parts[1]["domains"]
            for module, aligner, optimizer, b in zip((wrapped, whole), (mine, alone), steppers, (parts[rank], joined)):
                error = (module(b["x"], time=b["time"]) - b["velocity"]).square().mean((1, 2))
                # The means are over samples: as many on each rank would need no factor.
                flow = error.sum() * (2 / 9 if module is wrapped else 1 / 9)
                loss = flow + aligner.loss(b["features"], b["mask"], b["domains"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scores = mine.step(step)  # on the first samples of each rank's last call
            probed = tuple(torch.cat([part[name][:3] for part in parts]) for name in ("x", "time"))
            alone.step(step, probed)
            assert (scores is not None) == (step in (2, 4, 6)), step
            if scores is not None:
                assert scores.by_sample.shape[1] == 6
                torch.testing.assert_close(scores.mean, alone.choice.scores.mean, rtol=1e-4, atol=1e-6)
                assert mine.selection.layers == alone.selection.layers, (mine.selection, alone.selection)
                chosen = [None, None]
                distributed.all_gather_object(chosen, mine.selection.state())
                assert chosen[0] == chosen[1]
    mine.detach()
    for name, one in wrapped.named_parameters():
        one = one.full_tensor() if hasattr(one, "full_tensor") else one
        torch.testing.assert_close(one, whole.get_parameter(name.removeprefix("module.")), rtol=1e-4, atol=1e-6)
    for one, other in zip(mine.loss_fn.parameters(), alone.loss_fn.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        heads = [torch.zeros_like(one), torch.zeros_like(one)]
        distributed.all_gather(heads, one.detach())
        assert torch.equal(*heads)
    return wrapped, mine


def aligner(rank: int) -> None:
    """DDP is built before any selection and knows nothing of the heads."""
    for pool in ("mean", None):
        train_pair(rank, pool, DistributedDataParallel)


def aligner_of_shards(rank: int) -> None:
    """FSDP2: each block and the rest sharded; probes see whole parameters, which are shards again afterwards."""

    def shard(model: nn.Module) -> nn.Module:
        mesh = distributed.init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for pool in ("mean", None):
        memory_of_shards(*train_pair(rank, pool, shard))
    torch.manual_seed(0)
    plain = Step("mean").model
    inputs = batch(0, 0, "mean", MIXED)[:2]
    expected = ag.attribute_layers(plain, inputs)
    sharded = copy.deepcopy(plain)
    for branch in sharded.branches:
        fully_shard(branch, mesh=distributed.init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=distributed.init_device_mesh("cpu", (2,)))
    with ag.HiddenStates(sharded, [1]) as states:
        sharded(*inputs)
        found = ag.attribute_layers(sharded, inputs)
        torch.testing.assert_close(states.read()[1], plain(*inputs, hidden_layers=[1])[1][1])
    torch.testing.assert_close(found.by_sample, expected.by_sample, rtol=1e-5, atol=1e-7)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    wrapped = ag.attribute_layers(DistributedDataParallel(plain), inputs)
    assert torch.equal(wrapped.by_sample, expected.by_sample)


def memory_of_shards(model: nn.Module, align: ag.Aligner) -> None:
    """After a step a rank holds half of the network, and the heads once; no hidden state, and nothing whole."""
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.to_local().untyped_storage().nbytes() for p in model.parameters()) <= 4 * 0.6 * whole
    assert not any(p.grad is not None and p.grad.to_local().numel() == p.numel() for p in model.blocks.parameters())
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                assert all(tensor.untyped_storage().size() == 0 for tensor in parameter.all_gather_outputs)
    heads = list(align.loss_fn.parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in heads}
    assert sum(storages.values()) == 4 * sum(p.numel() for p in heads)
    assert all(tap.output is None and not tap.copies for tap in align.states._taps)


def failing_probes(rank: int) -> None:
    """A batch with nan on one rank postpones the probe of both; another error on one rank ends both, without a wait."""
    model = foreign.network()
    align = foreign.aligner_for(model, "mean")
    bad, good = foreign.batch(rank, "mean"), foreign.batch(rank, "mean")
    if rank == 1:
        bad["x"][0, 0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert align.step(2, (bad["x"], bad["time"])) is None
    assert ["the probe of rank 1 failed" in str(warning.message) for warning in caught] == [rank == 0], caught
    message = ("the probe of rank 1 failed: no inputs to probe on", "^no inputs to probe on")[rank]
    with pytest.raises((RuntimeError, ValueError)[rank], match=message):
        align.step(3, (good["x"], good["time"]) if rank == 0 else None)
    assert align.step(3, (good["x"], good["time"])).by_sample.shape[1] == 8
    assert align.selection is not None


SCENARIOS = [
    absent_domains,
    mixed_domains,
    by_flow_time,
    mixed_tokens,
    reselection,
    left_out,
    different_selections,
    aligner,
    aligner_of_shards,
    failing_probes,
]


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
