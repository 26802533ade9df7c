"""Leave another model as it was: nothing compiled runs, no cache takes part, and what a forward changes is put back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (dict, list, set)
LARGEST = 2**26  # bytes of a tensor that is kept to be put back; larger ones are packed weights


def refuse_caches(model: nn.Module) -> None:
    """Refuse a model with an active cache of diffusers, which answers from earlier calls.

    Raises:
        ValueError: names the cache and says how to switch it off."""
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook_name, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False) or "cache" in type(hook).__name__.lower():
                raise ValueError(
                    f"{name or type(model).__name__} has an active cache ({type(hook).__name__} {hook_name!r}), so its "
                    "forward depends on earlier calls: call disable_cache() before, enable_cache(...) after"
                )
        if getattr(module, "_is_cached", False) is True:  # cache-dit
            raise ValueError(
                f"{name or type(model).__name__} has an active cache (cache-dit): call cache_dit.disable_cache(...) "
                "before"
            )


def kept_tensors(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{dotted name: (identity, version)} of the tensors that modules keep as attributes or buffers."""
    kept = {}
    for name, module in model.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, Tensor) and not value.is_inference():
                kept[f"{name}.{key}".lstrip(".")] = id(value), value._version
    return kept


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Compiled functions and modules run eagerly, PyTorch's fused encoder path stays off, and attributes and buffers
    that a forward changes are as before on every exit."""
    wrapped = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is not None and "_orig_mod" in child._modules  # what torch.compile(module) returns
    ]
    before = _Snapshot(model)
    # The fused path of nn.TransformerEncoder packs the batch away (nested tensors), so that it cannot be grown.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in before.modules:
            module._compiled_call_impl = None
            original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
            if original is not None:
                vars(module)["forward"] = original
        for module, name, child in wrapped:
            module._modules[name] = child._modules["_orig_mod"]
        # Compiled functions that a forward calls; importing Dynamo, where nothing is compiled, would take a second.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        with eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        before.restore()


class _Snapshot:
    """Attributes of all modules, one level into their dicts, lists and sets, and the values of tensors among them that
    are no parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self._attributes = [dict(vars(module)) for module in self.modules]
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: dict[int, tuple[Tensor, int, Tensor]] = {}
        for attributes in self._attributes:
            for name, value in attributes.items():
                if name == "_parameters":
                    continue  # of hooks that gather sharded or offloaded weights
                if isinstance(value, CONTAINERS):
                    self._contents.append((value, value.copy()))
                    parts = value.values() if isinstance(value, dict) else value
                    for part in parts:
                        self._keep(part)
                self._keep(value)

    def _keep(self, value: Any) -> None:
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.is_inference():
            return
        if value.nbytes <= LARGEST:
            self._tensors[id(value)] = value, value._version, value.detach().clone()

    def restore(self) -> None:
        for module, attributes in zip(self.modules, self._attributes):
            now = vars(module)
            if now.keys() != attributes.keys() or any(now[key] is not value for key, value in attributes.items()):
                now.clear()
                now.update(attributes)
        for container, contents in self._contents:
            _refill(container, contents)
        for tensor, version, value in self._tensors.values():
            if tensor._version != version:
                tensor.detach().copy_(value)


def _refill(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(contents) or any(a is not b for a, b in zip(container, contents)):
            container[:] = contents
    elif isinstance(container, dict):
        if container.keys() != contents.keys() or any(container[key] is not value for key, value in contents.items()):
            container.clear()
            container.update(contents)
    elif container != contents:
        container.clear()
        container.update(contents)
