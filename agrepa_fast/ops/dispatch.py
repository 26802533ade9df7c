"""Choose the path of an op: the Triton kernels, or the reference in plain PyTorch.

`AGREPA_OPS`, read at import: `auto` (kernels for CUDA tensors, reference elsewhere), `triton` (kernels or an
error), `reference`. On the CPU the kernels run under `TRITON_INTERPRET=1` only, one program after the other.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..errors import UserError

MODES = ("auto", "triton", "reference")
MODE = os.environ.get("AGREPA_OPS", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


TRITON = _installed("triton")

MAX_WIDTH = 8192  # of a row; the launch tables end there
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_OPS = (
    "gated_residual_norm",
    "layer_norm_modulate",
    "gated_residual",
    "masked_mean",
    "velocity_delta",
    "cosine_loss",
    "projection_cosine_loss",
)


def use_kernels(x: Tensor) -> bool:
    """Whether an op on rows x [..., D] runs its kernel. Under torch.func it never does.

    Raises:
        UserError: AGREPA_OPS has an unknown value, or asks for kernels that cannot run on x.
    """
    if MODE == "reference":
        return False
    reason = _why_not(x.device.type, x.dtype, x.shape[-1])
    if transformed():
        reason = "torch.func cannot transform the kernels"
    if MODE == "triton" and reason is not None:
        raise UserError(f"AGREPA_OPS=triton: {reason}")
    if MODE not in MODES:
        raise UserError(f"AGREPA_OPS: expected one of {', '.join(MODES)}, got {MODE!r}")
    return reason is None


def _why_not(device: str, dtype: torch.dtype, width: int) -> str | None:
    """The reason why the kernels cannot run, or None."""
    if not TRITON:
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return f"the kernels need CUDA, not {device} (on the CPU: TRITON_INTERPRET=1)"
    if dtype not in DTYPES:
        return f"the kernels do not take {dtype}"
    if width > MAX_WIDTH:
        return f"rows of {width} are wider than the kernels' {MAX_WIDTH}"
    return None


def explain() -> list[str]:
    """Lines of text that tell which path each op takes on each device of this machine, and why."""
    chosen = "set" if "AGREPA_OPS" in os.environ else "default"
    lines = [f"AGREPA_OPS={MODE} ({chosen})"]
    if MODE not in MODES:
        return [*lines, f"  not a mode: use one of {', '.join(MODES)}"]
    devices = [("cpu", "cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(("cuda", f"cuda:{index} {torch.cuda.get_device_name(index)}"))
    for device, name in devices:
        reason = "AGREPA_OPS=reference" if MODE == "reference" else _why_not(device, torch.float32, 1)
        if reason is None:
            lines.append(f"{name}: Triton kernels ({_table(name)})")
        elif MODE == "triton":
            lines.append(f"{name}: an error, {reason}")
        else:
            lines.append(f"{name}: reference, {reason}")
        lines.append(f"  for {', '.join(KERNEL_OPS)}")
    return lines


def _table(device: str) -> str:
    from ..kernels.launch import architecture

    table = architecture(torch.device(device.split()[0]))
    return f"{'interpreted, ' if device == 'cpu' else ''}launch table {table}"
