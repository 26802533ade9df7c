"""Cost of FoG-A over layers, frames, batch and width, one at a time from a common middle point.

The report fits time and memory as size^p and prints p. In the layers, the staircase and a loop have the same p (2), but
not the same constant.
"""

from __future__ import annotations

import dataclasses

import torch

from agrepa_fast.models.dit import DiTConfig

from ..case import Problem
from .foga import problem

TITLE = "Scaling of FoG-A"

# axis: sizes, per device type; the middle point is the first of each.
MIDDLE = {
    "cpu": {"layers": 4, "frames": 64, "batch": 2, "width": 128},
    "cuda": {"layers": 12, "frames": 512, "batch": 4, "width": 768},
}
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "layers": (2, 4, 8, 16),
        "frames": (64, 128, 256, 512),
        "batch": (1, 2, 4, 8),
        "width": (64, 128, 256, 512),
    },
    "cuda": {
        "layers": (6, 12, 24, 36),
        "frames": (256, 512, 1024, 2048),
        "batch": (1, 2, 4, 8, 16),
        "width": (384, 768, 1152, 1536),
    },
}
TOY: dict[str, tuple[int, ...]] = {"layers": (1, 2), "width": (16, 32)}


def problems(scale: str, device: torch.device) -> list[Problem]:
    middle = {"layers": 2, "frames": 8, "batch": 1, "width": 16} if scale == "toy" else MIDDLE[device.type]
    axes: dict[str, tuple[int, ...]] = TOY if scale == "toy" else AXES[device.type]
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    chosen = []
    for axis, sizes in axes.items():
        for size in sizes[:3] if scale == "quick" else sizes:
            at = {**middle, axis: size}
            config = DiTConfig(
                depth=at["layers"], width=at["width"], heads=max(1, at["width"] // 64), mels=80, cond=80, dropout=0.0
            )
            made = problem("sweep", config, at["batch"], at["frames"], dtype, rivals=("SDPA loop",))
            chosen.append(dataclasses.replace(made, params={"axis": axis, "size": size, **at, "dtype": dtype}))
    return chosen
