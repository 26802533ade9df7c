"""Two ranks that train sharded (`train.shard`) and under DistributedDataParallel; `test_ranks.py` starts them.

Usage: sharded.py OVERRIDE ...
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch._dynamo.utils import counters

from agrepa_fast.report import read_log
from agrepa_fast.training import trainer as trainer_module
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.config import load_config
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.trainer import Trainer

STEPS = 8
WHOLE = ["model.dropout=0.1", "train.accumulate=2", "train.recompute=true", "train.samples=0"]
PLAIN = ["model.dropout=0", "probe.every=3", "alignment.policy=gradient-norm", "alignment.stop_similarity=0.9"]


def start(overrides: list[str], name: str, *changes: str) -> Trainer:
    return start_run(load_config("demo", [*overrides, *changes, f"train.name={name}"]))


def first(path: Path) -> None:
    """Wait for all ranks, and remove what rank 0 alone may remove."""
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.rmtree(path)
    distributed.barrier()


def same(one: Path, other: Path, tolerance: float) -> None:
    """Everything trained is alike: weights, EMA, heads and the moments of the optimizer."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    assert a.state["selection"] == b.state["selection"] or tolerance
    pairs = [(name, value, b.weights[part][name]) for part in a.weights for name, value in a.weights[part].items()]
    states = (checkpoint.state["optimizer"]["state"] for checkpoint in (a, b))
    for (number, entry), other_entry in zip(*(state.items() for state in states), strict=True):
        pairs += [(f"{number}.{name}", value, other_entry[1][name]) for name, value in entry.items()]
    for name, value, expected in pairs:
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


def losses(run: Path) -> Tensor:
    lines = [entry for entry in read_log(run / "log.jsonl") if entry["event"] in ("train", "valid")]
    return torch.tensor([entry["flow_loss"] for entry in lines])


def held(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """{what: (bytes of memory on this rank, bytes of the whole)}; gradients share the memory of their group."""
    moments = [value for entry in trainer.optimizer.state.values() for value in entry.values() if value.dim()]
    tensors = {
        "backbone": list(trainer.objective.backbone.parameters()),
        "heads": list(trainer.objective.heads().parameters()),
        "gradients": [p.grad for p in trainer.objective.parameters() if p.grad is not None],
        "average": list(trainer.ema.module.parameters()),
        "moments": moments,
    }
    found = {}
    for name, some in tensors.items():
        storages = {t.to_local().untyped_storage().data_ptr(): t.to_local().untyped_storage().nbytes() for t in some}
        found[name] = (sum(storages.values()), sum(t.numel() * t.element_size() for t in some))
    return found


def check_memory(trainer: Trainer, what: str) -> None:
    """A rank holds half of everything (a first dimension that is odd is filled up), and nothing gathered is left."""
    for name, (here, whole) in held(trainer).items():
        assert 0 < here <= 0.55 * whole, (what, name, here, whole)
    for module in (trainer.objective, trainer.ema.module):
        for part in module.modules():
            if hasattr(part, "_get_fsdp_state"):
                group = part._get_fsdp_state()._fsdp_param_group
                assert group.is_sharded, (what, type(part))
                gathered = [tensor for p in group.fsdp_params for tensor in p.all_gather_outputs]
                assert all(tensor.untyped_storage().size() == 0 for tensor in gathered), (what, type(part))


def as_ddp(overrides: list[str], runs: Path) -> None:
    """Losses, weights and moments are DDP's, frame by frame: heads of layers that are not selected stand still."""
    changes = [*PLAIN, "alignment.pool=null"]
    start(overrides, "ddp", *changes).run()
    trainer = start(overrides, "shards", *changes, "train.shard=true")
    trainer.run()
    check_memory(trainer, "as_ddp")
    torch.testing.assert_close(losses(runs / "ddp"), losses(runs / "shards"), rtol=0, atol=1e-5)
    same(runs / "ddp", runs / "shards", 2e-6)


def ddp_goes_on_sharded(overrides: list[str], runs: Path) -> None:
    """A checkpoint does not depend on how the run was spread."""
    shutil.copytree(runs / "ddp", runs / "moved", dirs_exist_ok=True) if distributed.get_rank() == 0 else None
    first(runs / "moved" / "checkpoints" / f"step_{STEPS:08d}")
    resume_run(runs / "moved", ["train.shard=true"]).run()
    same(runs / "ddp", runs / "moved", 2e-6)


def resumed(overrides: list[str], runs: Path) -> None:
    """Resumed from the middle: the same bits, with dropout, accumulation and recomputation."""
    start(overrides, "one", *WHOLE, "train.shard=true").run()
    shutil.copytree(runs / "one", runs / "again") if distributed.get_rank() == 0 else None
    first(runs / "again" / "checkpoints" / f"step_{STEPS:08d}")
    trainer = resume_run(runs / "again")
    trainer.run()
    check_memory(trainer, "resumed")
    same(runs / "one", runs / "again", 0)
    assert torch.equal(losses(runs / "one"), losses(runs / "again"))


def in_bfloat16(overrides: list[str], runs: Path) -> None:
    """Weights are gathered in bfloat16, and branches are compiled: losses are those of float32 up to rounding."""
    changes = [*PLAIN, "alignment.pool=null", "train.samples=0", "train.precision=bf16", "train.engine=compile"]
    trainer = start(overrides, "shards16", *changes, "train.shard=true")
    trainer.run()
    # Each kind of branch at each length: while training, validating and sampling, some with the same inputs.
    assert 2 <= counters["stats"]["unique_graphs"] <= 12
    check_memory(trainer, "in_bfloat16")
    [branch, *_] = trainer.objective.backbone.network.branches
    assert {p.all_gather_outputs[0].dtype for p in branch._get_fsdp_state()._fsdp_param_group.fsdp_params} == {
        torch.bfloat16
    }
    torch.testing.assert_close(losses(runs / "ddp"), losses(runs / "shards16"), rtol=0, atol=2e-2)


def slowly(save: Callable[..., Any]) -> Callable[..., Any]:
    """Rank 0 writes late, so that a rank that does not wait for a checkpoint reads an older one."""

    @functools.wraps(save)
    def later(*arguments: Any) -> Any:
        time.sleep(0.3)
        return save(*arguments)

    return later


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer_module.save_checkpoint = slowly(trainer_module.save_checkpoint)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # what is traced is the question here
    trainer_module.write_report = lambda _: None  # its pictures take most of a short run's time
    overrides = sys.argv[1:]
    runs = Path(next(value for value in overrides if value.startswith("train.out=")).partition("=")[2])
    for scenario in (as_ddp, ddp_goes_on_sharded, resumed, in_bfloat16):
        scenario(overrides, runs)
        distributed.barrier()
        if distributed.get_rank() == 0:
            print("passed", scenario.__name__, flush=True)
    distributed.destroy_process_group()
