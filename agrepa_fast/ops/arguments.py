"""Checks that several ops share. An error names the argument, what it should be and what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, value: Any) -> None:
    """TypeError unless value is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}")


def check_floating(name: str, value: Any) -> None:
    """TypeError unless value is a tensor that the ops can compute with: floating, and not one of the float8 dtypes."""
    check_tensor(name, value)
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        raise TypeError(f"{name}: expected a floating dtype of 16 bits or more, got {value.dtype}")


def check_mask(mask: Any, shape: torch.Size, device: torch.device) -> None:
    """TypeError or ValueError unless mask is None or bool of this shape on this device."""
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask: expected on {device}, got {mask.device}")


def check_eps(eps: Any) -> None:
    if not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
