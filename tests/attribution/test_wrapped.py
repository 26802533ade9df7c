"""A `DiT` in the wrappers of trainers: its scores are those of the network inside, which computes as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from agrepa_fast import attribute_layers


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))  # B is zero: the same function


def sharded(model):
    for branch in model.branches:
        fully_shard(branch)
    return fully_shard(model)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        adapted,
        sharded,
        lambda m: torch.compile(m, backend="eager"),
    ],
)
def test_scores_are_those_of_the_network_inside(wrap, build, draw, group):
    model, inputs = build(dropout=0.5), draw()
    expected = attribute_layers(model, inputs).by_sample
    wrapped = wrap(copy.deepcopy(model).train())
    assert attribute_layers(wrapped, inputs).by_sample.equal(expected)
    assert all(module.training for module in wrapped.modules())
    with torch.no_grad():
        assert torch.allclose(wrapped.eval()(**inputs), model(**inputs))
