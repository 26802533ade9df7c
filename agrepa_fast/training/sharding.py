"""Sharded training (`train.shard`): each rank holds a part of every parameter, gradient, moment and average (FSDP2).

Each branch is a unit, and so are the modulation, the rest of the network, the conditioner and the alignment heads. The
weights of a unit are gathered on every rank while it runs, once forward and once backward, and freed after it.

Checkpoints have the form of any other run's: tensors are gathered one by one, and only rank 0 keeps them, on its CPU.
So a run may be resumed with shards, without, or on another number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

    from .objective import Backbone, Objective


def shard(objective: Objective, average: Backbone, device: torch.device, bf16: bool) -> None:
    """Leave each rank with its part of the parameters of an objective, and of the average of its backbone.

    Both may be on the CPU still: the parts go to `device`. No optimizer may know the parameters yet.
    """
    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    for backbone in (objective.backbone, average):
        network = backbone.network
        for module in (*network.branches, network.modulation):
            _shard(module, mesh, bf16 and backbone is not average)  # samples are generated in float32
        # Validation and sampling call these two without the objective's forward, so each is a root of its own.
        _shard(network, mesh)
        _shard(backbone.conditioner, mesh)
    for heads in objective.heads().children():
        if next(heads.parameters(), None) is not None:
            _shard(heads, mesh)
    for module in (objective, average):
        module.to(device)  # the buffers, and modules without parameters


def _shard(module: nn.Module, mesh: DeviceMesh, bf16: bool = False) -> None:
    """Shard a module as one unit.

    bf16: gather its weights in bfloat16. Use it for modules whose parameters autocast rounds to bfloat16 anyway.
    Autocast would keep its rounded copies of the gathered weights until the backward pass, and so the whole network on
    each rank."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it takes 0.4 s

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # Also a root frees its weights after the forward: without a backward pass they would go stale.
    fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy if bf16 else MixedPrecisionPolicy())


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is sharded."""
    return any(map(is_shard, module.parameters()))


def is_shard(tensor: Any) -> TypeIs[DTensor]:
    """Whether a value is a sharded tensor, without an import of DTensor, which takes 0.4 s."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(backbone: Backbone) -> Backbone:
    """The backbone itself, or a copy with whole weights where they are sharded. Every rank must call it.

    Probes call the parts of a network and not its forward, so the hooks that gather weights do not run."""
    if not is_sharded(backbone):
        return backbone
    with torch.device("meta"):
        copy = type(backbone)(backbone.config)
    copy.to_empty(device=next(backbone.parameters()).device)
    copy.network.packed = backbone.network.packed
    for target, source in zip(copy.parameters(), backbone.parameters(), strict=True):
        target.copy_(source.full_tensor() if is_shard(source) else source)
    return copy.eval()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor


def gathered(value: Any) -> Any:
    """Copy nested dicts, with sharded tensors made whole on rank 0's CPU and empty on the other ranks.

    Every rank must call it. Other values stay as they are."""
    if isinstance(value, dict):
        return {key: gathered(entry) for key, entry in value.items()}
    if not is_shard(value):
        return value
    full = value.full_tensor().detach()
    return full.cpu() if distributed.get_rank() == 0 else full.new_empty(0)


def scattered(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if `like` is sharded; all ranks have the same whole tensor."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
