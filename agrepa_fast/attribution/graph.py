"""CUDA graphs of probes: the device work of a probe is captured once and replayed on new inputs in one launch.

A graph holds addresses, not values. So the next replay sees weights that were updated in place. A weight that was
replaced by another tensor changes the key, and the probe is captured again.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..graphs import Recording, run_aside
from ..models.dit import DiT
from ..ops import dispatch
from .plan import AblationPlan

CAPACITY = 4  # graphs kept for one model; each holds the memory of its probe

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]

_GRAPHS: weakref.WeakKeyDictionary[DiT, OrderedDict[Hashable, Captured]] = weakref.WeakKeyDictionary()


class Captured:
    """`run` on static copies of `inputs` as a CUDA graph."""

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.inputs = {name: value.detach().clone() for name, value in inputs.items()}
        device = self.inputs["x_t"].device
        with torch.cuda.device(device), _uncached_autocast():
            run_aside(lambda: run(self.inputs), device)
            self.recording = Recording(lambda: run(self.inputs), device)

    def replay(self, inputs: Inputs) -> Tensor:
        """The output for `inputs`, as a copy: the next replay overwrites the output of the graph."""
        for name, static in self.inputs.items():
            static.copy_(inputs[name], non_blocking=True)
        self.recording.replay()
        return self.recording.output.clone()


def replayed(model: DiT, plan: AblationPlan, inputs: Inputs, run: Run) -> Tensor:
    """Compute `run(inputs)` by the model's graph for this plan and these shapes. If there is no graph yet, capture it.

    `run` must do the same static device work for the same plan, shapes and dtypes, and must not keep the model alive.
    """
    graphs = _GRAPHS.setdefault(model, OrderedDict())
    key = _key(model, plan, inputs)
    if key not in graphs:
        while len(graphs) >= CAPACITY:
            graphs.popitem(last=False)
        graphs[key] = Captured(run, inputs)
    graphs.move_to_end(key)
    return graphs[key].replay(inputs)


def release_graphs(model: DiT) -> None:
    """Free the memory of the CUDA graphs that probes of this model have captured. The next probe captures anew."""
    _GRAPHS.pop(model, None)


def why_not(model: DiT, inputs: Inputs) -> str | None:
    """The reason why a probe of `model` cannot be captured, or None."""
    devices = {value.device for value in (*inputs.values(), *model.parameters())}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return f"it needs model and inputs on one CUDA device, got {', '.join(sorted(map(str, devices)))}"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks, which a replay would not call"
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            return f"{name or 'the model'} is compiled"
    return None


def _key(model: DiT, plan: AblationPlan, inputs: Inputs) -> Hashable:
    """Everything that decides which kernels are launched, and on which memory of the model."""
    device = inputs["x_t"].device.type
    weights = (*model.parameters(), *model.buffers())
    return (
        plan,
        tuple((name, value.shape, value.dtype, value.device) for name, value in sorted(inputs.items())),
        tuple((weight.data_ptr(), weight.dtype) for weight in weights),
        dispatch.MODE,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.get_float32_matmul_precision(),
    )


def _uncached_autocast() -> torch.autocast:
    """Autocast as it is now, without its cache: a cached copy of a weight would not follow its updates."""
    enabled = torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled, cache_enabled=False)
