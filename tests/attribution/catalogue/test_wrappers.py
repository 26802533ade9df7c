"""Models as people have them when they ask: adapted, sharded, offloaded, checkpointed, compiled, quantised.

Each wrapper's scores equal a loop's over the wrapped model, and the model computes afterwards what it did before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch
import torchao
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from agrepa_fast import attribute_layers, export, select_layers

from .entry import Entry, call, plain, scores_by_loop, velocity
from .page import ENTRIES, NAMED, probe

Wrap = Callable[[nn.Module], nn.Module]
SD3 = next(entry for entry in ENTRIES if entry.name == "SD3Transformer2DModel")
PRX = next(entry for entry in ENTRIES if entry.name == "PRXTransformer2DModel")  # short to trace
WAN = next(entry for entry in ENTRIES if entry.name == "WanTransformer3DModel")


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], lora_dropout=0.5, init_lora_weights=False)
    return peft.get_peft_model(model, config).double()


def adapter_of_diffusers(model: nn.Module) -> nn.Module:
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    return model.double()


def checkpointed_by_diffusers(model: nn.Module) -> nn.Module:
    model.enable_gradient_checkpointing()
    return model


def checkpointed_by_torch(model: nn.Module) -> nn.Module:
    blocks = lists(model)
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)
    return model


def lists(model: nn.Module) -> nn.ModuleList:
    return model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks


def hooked(model: nn.Module) -> nn.Module:
    for block in lists(model):
        accelerate.hooks.add_hook_to_module(block, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    blocks = lists(model)
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    return model


def weight_norm(function: Callable[[nn.Module], Any]) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        for module in list(lists(model).modules()):
            if isinstance(module, nn.Linear):
                function(module)
        return model

    return wrap


def int8(model: nn.Module) -> nn.Module:
    torchao.quantization.quantize_(model.float(), torchao.quantization.Int8WeightOnlyConfig())
    return model


def sharded(model: nn.Module) -> nn.Module:
    for block in lists(model):
        fully_shard(block)
    return fully_shard(model)


def wrapped_forwards(model: nn.Module) -> nn.Module:
    """Every forward wrapped on its instance, by functions that name the class's function, as nnsight's do."""

    def wrap(module: nn.Module) -> None:
        forward = module.forward
        own = type(module).forward
        module.forward = functools.wraps(own)(lambda *args, **kwargs: forward(*args, **kwargs))

    for module in model.modules():
        wrap(module)
    return model


# Wrappers that leave the function as it is: the scores are those of the model inside.
SAME: dict[str, Wrap] = {
    "accelerate's hooks": hooked,
    "accelerate's offload": lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
    "gradient checkpointing of diffusers": checkpointed_by_diffusers,
    "checkpoint_wrapper": checkpointed_by_torch,
    "DataParallel": nn.DataParallel,
    "wrapped forwards": wrapped_forwards,
    "weight norm": weight_norm(torch.nn.utils.parametrizations.weight_norm),
    "weight norm, old form": weight_norm(torch.nn.utils.weight_norm),
}
COMPILED: dict[str, Wrap] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile": compiled_in_place,
    "compiled forward": compiled_forward,
    "compiled blocks": compiled_blocks,
}
IN_A_GROUP: dict[str, Wrap] = {"DDP": nn.parallel.DistributedDataParallel, "FSDP2": sharded}
# Those that change it.
OTHER: dict[str, Wrap] = {
    "PEFT": lora,
    "PEFT in DataParallel": lambda model: nn.DataParallel(lora(model)),
    "diffusers' add_adapter": adapter_of_diffusers,
    "torchao int8": int8,
}


def cases(wrappers: Iterable[str], entries: Sequence[Entry] = (SD3, WAN)) -> Iterator[Any]:
    for name in wrappers:
        for entry in entries:
            yield pytest.param(name, entry, id=f"{name}-{entry.name}".replace(" ", "_"))


def check(entry: Entry, model: nn.Module, inputs: Any, expected: np.ndarray, rtol: float = 1e-8) -> None:
    with plain():
        before = velocity(entry, call(model, inputs))
    scores, _ = probe(entry, model, inputs)
    assert not NAMED or list(scores.names) == entry.units
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=rtol)
    with plain():
        assert torch.equal(velocity(entry, call(model, inputs)), before)


@pytest.mark.parametrize("name, entry", [*cases(SAME), *cases(COMPILED, [PRX])])
def test_scores_are_those_of_the_model_inside(name: str, entry: Entry) -> None:
    model, inputs = entry.made()
    expected = scores_by_loop(entry, model, inputs)
    check(entry, (SAME | COMPILED)[name](model), inputs, expected)


@pytest.mark.parametrize("name, entry", cases(IN_A_GROUP))
def test_scores_are_those_of_the_model_inside_in_a_group(name: str, entry: Entry, group: None) -> None:
    model, inputs = entry.made()
    expected = scores_by_loop(entry, model, inputs)
    check(entry, IN_A_GROUP[name](model), inputs, expected)


@pytest.mark.parametrize("name, entry", cases(OTHER))
def test_equals_the_loop_over_the_changed_model(name: str, entry: Entry) -> None:
    model, inputs = entry.made()
    wrapped = OTHER[name](model).eval()
    single = next(model.parameters()).dtype == torch.float32
    if single:
        inputs = {k: v.float() if torch.is_tensor(v) and v.dtype == torch.float64 else v for k, v in inputs.items()}
    # LoRA layers are put into the model itself.
    check(entry, wrapped, inputs, scores_by_loop(entry, model.eval(), inputs), rtol=1e-4 if single else 1e-8)


@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (lora, "base_model.model."),
        (nn.DataParallel, "module."),
        (lambda model: torch.compile(model, backend="eager"), ""),
        (lambda model: nn.DataParallel(lora(model)), "module.base_model.model."),
    ],
)
def test_names_are_the_models_own_and_read_back_from_the_wrapper(wrap: Wrap, prefix: str) -> None:
    model, inputs = WAN.made()
    blocks = list(model.blocks)
    wrapped = wrap(model).eval()
    scores = attribute_layers(wrapped, inputs)
    assert scores.names == tuple(WAN.units)
    selection = select_layers(scores, k=2)
    assert [blocks.index(block) for block in selection.modules(wrapped).values()] == list(selection.layers)
    assert [blocks.index(block) for block in selection.modules(model).values()] == list(selection.layers)
    # By the wrapper's names, too: what its users read in named_modules().
    longer = f"{prefix}blocks"
    assert longer in dict(wrapped.named_modules()) or not prefix
    given = attribute_layers(wrapped, inputs, block_list=longer, sets=[[f"{longer}.1"]])
    np.testing.assert_allclose(given.by_sample[0], scores.by_sample[1], rtol=1e-9)
    kept = dataclasses.replace(selection, names=tuple(f"{prefix}{name}" for name in selection.names))
    assert list(kept.modules(wrapped)) == list(selection.names)
    assert export.lora_layers(selection, ["to_q"], wrapped)


def test_dynamic_quantisation_couples_samples_and_is_named() -> None:
    """Its scale of the activations comes from the whole batch, so that ablations change one another."""
    model, inputs = dataclasses.replace(PRX, single=True).made()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="quantis"):
        attribute_layers(quantised, inputs)


def test_an_active_cache_is_refused_and_left_alone() -> None:
    from diffusers import FirstBlockCacheConfig

    model, inputs = WAN.made()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with model.cache_context("cond"), plain():
        before = model(**inputs).sample
        with pytest.raises(ValueError, match="cache"):
            attribute_layers(model, inputs)
        assert torch.equal(model(**inputs).sample, before)
