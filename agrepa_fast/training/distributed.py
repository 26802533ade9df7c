"""Several ranks: one process for each device, as `torchrun` starts them. Without torchrun there is one rank."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import distributed

from ..errors import UserError

T = TypeVar("T")


def join(device: torch.device) -> torch.device:
    """Join the ranks that torchrun started, if it did; this rank's device.

    Raises:
        UserError: a device by number, which all ranks would share.
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


def leave() -> None:
    """End the process group, where there is one: all ranks together, since rank 0 still writes the report when the
    others are done, and a rank that leaves alone may take the connection down under it."""
    if _joined():
        distributed.barrier()
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if _joined() else 0


def ranks() -> int:
    return distributed.get_world_size() if _joined() else 1


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks. Every rank must call it."""
    if not _joined():
        return [value]
    box: list = [None] * ranks()
    distributed.all_gather_object(box, value)
    return box


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
