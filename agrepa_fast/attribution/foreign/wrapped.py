"""Models inside wrappers: DDP, FSDP, PEFT, `torch.compile`; and shards that a probe needs whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# By name: importing them would load packages that most programs do not use.
PEFT = {"PeftModel", "PeftMixedModel", "BaseTuner"}
WRAPPERS = {
    "AveragedModel",
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "_FabricModule",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside `DistributedDataParallel`, `torch.compile`, PEFT's and others' wrappers; or the model itself.

    LoRA layers stay: PEFT puts them into the network. So does a wrapper that learns prompts, which computes more than
    the network."""
    while True:
        inner: Any = None
        kinds = _kinds(model)
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif kinds & WRAPPERS:
            inner = model._modules.get("module", model._modules.get("_fsdp_wrapped_module"))
        elif kinds & PEFT:
            configs = model.peft_config.values()  # type: ignore[operator]
            if not any(getattr(config, "is_prompt_learning", False) for config in configs):
                inner = model._modules.get("base_model", model._modules.get("model"))
        if inner is None or inner is model:
            return model
        model = inner


def prefix_of(model: nn.Module) -> str:
    """The prefix that wrappers give the names of a network's modules, such as "module." of DDP."""
    network = unwrap(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is network)


def bare(name: str, prefix: str = "") -> str:
    """The name of a module without what wrappers put before it: `prefix`, or PEFT's."""
    return name.removeprefix(prefix).removeprefix("base_model.model.").replace("._orig_mod", "")


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
