"""The limits of the hardware, measured at the start of every run: copy bandwidth and matmul rate.

Copy: bytes read plus bytes written per second, out of cache. Matmul: 2 n^3 per second, square matrices of random data.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch

from .protocol import Effort, measure

# For each scale: bytes of the copied buffer and side of the matrices.
SIZES = {
    "cpu": {"toy": (1 << 20, 64), "quick": (128 << 20, 1024), "full": (256 << 20, 2048)},
    "cuda": {"toy": (1 << 20, 256), "quick": (1 << 30, 8192), "full": (2 << 30, 8192)},
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def measure_roofline(device: torch.device, scale: str) -> dict[str, Any]:
    """{"copy_bytes_per_s", "matmul_flops_per_s": {dtype: rate}, "ridge_flops_per_byte": {dtype: ...}}."""
    size, side = SIZES[device.type][scale]
    effort = Effort(seconds=0.05 if scale == "toy" else 0.7, least_rounds=5, most_rounds=40)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": functools.partial(target.copy_, source)}, device, effort)["copy"]
    copy = 2 * size / timing.median
    del source, target
    matmul = {}
    for dtype in DTYPES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        timing = measure({"matmul": functools.partial(torch.mm, a, b, out=out)}, device, effort)["matmul"]
        matmul[str(dtype).removeprefix("torch.")] = 2 * side**3 / timing.median
    return {
        "copy_bytes_per_s": copy,
        "matmul_flops_per_s": matmul,
        "ridge_flops_per_byte": {name: rate / copy for name, rate in matmul.items()},
        "copy_buffer_bytes": size,
        "matmul_side": side,
        "samples": len(timing.samples),
        "spread": statistics.pstdev(timing.samples) / timing.median,
    }


def bound(flops: float, moved: float, roofline: dict[str, Any], dtype: str) -> tuple[float, str]:
    """The least seconds in which this machine can do the work, and what limits it: "copy" or "matmul"."""
    memory = moved / roofline["copy_bytes_per_s"]
    rates = roofline["matmul_flops_per_s"]
    compute = flops / rates.get(dtype, max(rates.values()))
    return (memory, "copy") if memory >= compute else (compute, "matmul")
