"""Modules whose buffers keep their values: `.to(bfloat16)` does not round them, and `to_empty` does not lose them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module whose own buffers move between devices, and do not change otherwise.

    nn.Module treats buffers as parameters: `.half()` and `.to(dtype)` convert them, and `to_empty` leaves them
    uninitialised, although no state dict restores a buffer that is not persistent.
    """

    def constants(self) -> dict[str, Tensor]:
        """{name: value} of every buffer. They are computed again for a module that was built on the meta device."""
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
            # In place if the dtype is the same, because `share_memory` and `to_empty` choose where the values are.
            if new.dtype == old.dtype:
                new.copy_(old)
            else:
                self._buffers[name] = old.to(new.device)
        return self
