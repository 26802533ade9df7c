"""Errors after which a process cannot use CUDA: a capture has failed, or a kernel has made the device fail."""

from __future__ import annotations

import torch


class Broken(Exception):
    """A provider has left CUDA in a state in which this process can measure nothing more. `name` is the provider's."""

    says = ""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {self.says}: {reason}")
        self.name = name


class CaptureFailed(Broken):
    """A call that was declared capturable was not.

    The allocator and the random number generators of the process may still believe that a capture is under way.
    """

    says = "cannot be captured in a CUDA graph"


class DeviceFailed(Broken):
    """A kernel failed on the device (it read an illegal address, say), after which every call of the process fails."""

    says = "has made the device fail"


def device_error(device: torch.device) -> str | None:
    """Why the device does nothing more for this process; None if it works."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """The first line of an error's text; its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
