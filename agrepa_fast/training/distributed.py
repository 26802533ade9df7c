"""Several ranks: one process for each device, started by `torchrun`. Without torchrun there is one rank."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import distributed

from ..errors import UserError

T = TypeVar("T")


def init(device: torch.device) -> torch.device:
    """Start the process group if torchrun started several ranks. Returns this rank's device.

    Raises:
        UserError: `device` has a number: all ranks would share it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"train.device: every rank takes a device of its own, not {device}; use cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def shutdown() -> None:
    """End the process group if there is one.

    All ranks wait for each other first: rank 0 still writes the report when the others are done, and a rank that ends
    alone may close a connection that another one uses.
    """
    if _initialised():
        distributed.barrier()
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if _initialised() else 0


def world_size() -> int:
    return distributed.get_world_size() if _initialised() else 1


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks. Every rank must call it."""
    if not _initialised():
        return [value]
    box: list = [None] * world_size()
    distributed.all_gather_object(box, value)
    return box


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
