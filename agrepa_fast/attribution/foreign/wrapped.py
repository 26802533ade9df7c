"""Models inside wrappers: DDP, FSDP, PEFT, `torch.compile`; and shards that a probe needs whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# By name: importing them would load packages that most programs do not use.
WRAPPERS = {
    "AveragedModel",
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "_FabricModule",
}


def unwrap(model: nn.Module, peft: bool = True) -> nn.Module:
    """The network inside `DistributedDataParallel`, `torch.compile`, PEFT's and others' wrappers; or the model itself.

    peft: look into a PEFT model too, whose names for the blocks are then lost. LoRA layers stay: PEFT puts them into
    the network."""
    while True:
        inner: Any = None
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif _kinds(model) & WRAPPERS:
            inner = model._modules.get("module", model._modules.get("_fsdp_wrapped_module"))
        elif peft and "PeftModel" in _kinds(model):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None or inner is model:
            return model
        model = inner


def reshard(model: nn.Module) -> None:
    """Leave each rank with its shards alone of the parameters that FSDP2 (`fully_shard`) has gathered."""
    for module in _sharded(model):
        module.reshard()


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """`reshard` on every exit: what a forward gathered inside is not left whole."""
    try:
        yield
    finally:
        reshard(model)


def _sharded(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "FSDPModule" in _kinds(module)]


def _kinds(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}
