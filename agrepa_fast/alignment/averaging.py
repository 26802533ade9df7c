"""Average the gradients of parameters that no DistributedDataParallel holds over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from .rows import grouped_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GradientAverage:
    """From now on, at the end of each backward pass, the parameters' gradients are their means over the ranks.

    As DistributedDataParallel's: every rank must run the same backward passes. One all-reduce for each dtype.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: ProcessGroup | None = None) -> None:
        self.group = group
        self.order = {parameter: number for number, parameter in enumerate(parameters)}
        self.arrived: list[nn.Parameter] = []
        self.backward = -1  # the backward pass that they arrived in
        self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose parameters were copied without their hooks: register them again."""
        self.__dict__.update(state)
        self._register()

    def _register(self) -> None:
        for parameter in self.order:
            parameter.register_post_accumulate_grad_hook(self._arrive)

    def _arrive(self, parameter: Tensor) -> None:
        if not grouped_ranks() or distributed.get_world_size(self.group) == 1:
            return
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:  # the first one; or an earlier pass ended in an exception
            self.backward, self.arrived = backward, []
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._average)
        self.arrived.append(parameter)  # type: ignore[arg-type]

    @torch.no_grad()
    def _average(self) -> None:
        parameters, self.arrived, self.backward = sorted(self.arrived, key=self.order.__getitem__), [], -1
        for dtype in dict.fromkeys(p.grad.dtype for p in parameters if p.grad is not None):
            gradients = [p.grad for p in parameters if p.grad is not None and p.grad.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat, group=self.group)
            flat /= distributed.get_world_size(self.group)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts):
                gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def copy_from_first_rank(module: nn.Module, group: ProcessGroup | None = None) -> None:
    """Give the module on every rank the parameters and buffers of the group's first rank. Every rank must call it."""
    if grouped_ranks() and distributed.get_world_size(group) > 1:
        source = 0 if group is None else distributed.get_global_rank(group, 0)
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast(tensor.detach(), source, group=group)
