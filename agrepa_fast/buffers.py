"""Modules whose buffers keep their values: `.to(bfloat16)` does not round them, `to_empty` does not lose them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module whose own buffers move between devices and change in no other way.

    nn.Module treats buffers like parameters: `.half()` and `.to(dtype)` convert them, and `to_empty` leaves them
    uninitialised, although no state dict brings back a buffer that is not persistent.
    """

    def constants(self) -> dict[str, Tensor]:
        """{name: value} of every buffer; for a module that was built on the meta device they are computed again."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        if any(value.is_meta for value in before.values()):
            with torch.device("cpu"):
                before |= self.constants()
        for name, old in before.items():
            new = self._buffers[name]
            if new is None or new is old:
                continue
            # In place where the dtype was kept, as `share_memory` and `to_empty` decide where the values lie.
            if new.dtype == old.dtype:
                new.copy_(old)
            else:
                self._buffers[name] = old.to(new.device)
        return self
