"""Tune the launch tables on the CUDA device at hand and rewrite its table.

`python -m agrepa_fast.kernels.tune` measures every kernel at every width of the table of this device's
architecture and writes `tables.py`. Widths that were never measured keep the values of `start`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from . import pooling, residual
from .launch import LaunchConfig, architecture, column_tiles
from .tables import MEASURED, TABLES

Tables = dict[str, dict[str, dict[int, LaunchConfig]]]

# Multiprocessors of the card each table is for (A100, H100/H200, B200; anything else).
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "portable": 128}
WIDTHS = {
    "residual_forward": (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    "residual_backward": (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    "masked_mean": (8192,),
    "velocity_delta": (128, 256, 1024, 8192),
}
SEQUENCES, FRAMES, STREAMS = 16, 1024, 13  # what is timed: out of cache at every width


def start(kernel: str, width: int, multiprocessors: int) -> LaunchConfig:
    """The value before any measurement.

    One 16-byte load a thread and tensor in the main tile of a backward (8 half-precision numbers, so that the three
    sums over tokens fit into registers), two in a forward; four warps, more where the row is wider than that."""
    if kernel == "masked_mean":
        return LaunchConfig(32, 4, multiprocessors * 8, split=False)
    if kernel == "velocity_delta":
        warps = 4 if width <= 1024 else 16
        return LaunchConfig(max(1, warps * 512 // width), warps, multiprocessors * 8, split=False)
    split = width & (width - 1) != 0
    main, _ = column_tiles(width, split)
    warps = max(4, min(16, main // 256))
    vectors, resident = (2, 64) if kernel == "residual_forward" else (1, 32)
    return LaunchConfig(max(1, warps * 256 * vectors // main), warps, multiprocessors * resident // warps, split)


def start_tables() -> Tables:
    """All tables as they are before any measurement."""
    return {
        name: {kernel: {width: start(kernel, width, count) for width in widths} for kernel, widths in WIDTHS.items()}
        for name, count in MULTIPROCESSORS.items()
    }


def candidates(kernel: str, width: int, config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Other tiles for a configuration: warps, 16-byte vectors per thread and, for odd widths, padding or two tiles."""
    splits = {config.split}
    if kernel.startswith("residual") and width & (width - 1):
        splits = {True, False}
    for split in sorted(splits):
        main, _ = column_tiles(width, split) if kernel != "masked_mean" else (64, 0)
        for warps in (1, 2, 4, 8, 16):
            for vectors in (1, 2, 4):
                rows = warps * 256 * vectors // main
                if 1 <= rows <= 64:
                    yield dataclasses.replace(config, block_t=rows, num_warps=warps, split=split)


def workload(kernel: str, width: int, device: torch.device) -> Callable[[LaunchConfig], object]:
    """The call that is timed: random bfloat16 data, the modulation in float32."""

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    x = randn(SEQUENCES, FRAMES, width)
    if kernel == "masked_mean":
        return lambda config: pooling.masked_mean(x, None, config)
    if kernel == "velocity_delta":
        velocity = randn(STREAMS, SEQUENCES, FRAMES, width)
        return lambda config: pooling.velocity_delta(velocity, None, config)
    branch = randn(*x.shape)
    gate, shift, scale = randn(SEQUENCES, 3 * width, dtype=torch.float32).chunk(3, dim=1)
    if kernel == "residual_forward":
        return lambda config: residual.forward(x, branch, gate, shift, scale, None, None, 1e-6, False, config)
    x_new, h, mean, rstd = residual.forward(x, branch, gate, shift, scale, None, None, 1e-6, False)
    assert x_new is not None, "there is a branch"
    return lambda config: residual.backward(
        branch, h, x_new, branch, gate, scale, None, None, mean, rstd, False, config
    )


def tune_kernel(kernel: str, width: int, config: LaunchConfig, cost: Callable[[LaunchConfig], float]) -> LaunchConfig:
    """The fastest tile first, then the fastest number of programs; ties stay with `config`."""
    best, least = config, cost(config)
    for candidate in candidates(kernel, width, config):
        taken = cost(candidate)
        if taken < least:
            best, least = candidate, taken
    for factor in (0.25, 0.5, 2, 4):
        candidate = dataclasses.replace(best, programs=max(1, int(config.programs * factor)))
        taken = cost(candidate)
        if taken < least:
            best, least = candidate, taken
    return best


def render(tables: Tables, measured: dict[str, str]) -> str:
    """The text of `tables.py`."""
    lines = [
        '"""Launch tables: architecture -> kernel -> largest width -> configuration. Written by `tune.py`.',
        "",
        "An architecture that is not in MEASURED holds the start values of that file, which no device has confirmed.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from .launch import LaunchConfig",
        "",
        "# Device and versions behind each table.",
    ]
    if measured:
        lines += ["MEASURED: dict[str, str] = {"]
        lines += [f'    "{name}": "{measured[name]}",' for name in sorted(measured)]
        lines += ["}"]
    else:
        lines += ["MEASURED: dict[str, str] = {}"]
    lines += ["", "TABLES: dict[str, dict[str, dict[int, LaunchConfig]]] = {"]
    for name, kernels in tables.items():
        lines.append(f'    "{name}": {{')
        for kernel, entries in kernels.items():
            lines.append(f'        "{kernel}": {{')
            lines += [f"            {width}: {config}," for width, config in sorted(entries.items())]
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}"]) + "\n"


def _milliseconds(run: Callable[[LaunchConfig], object], config: LaunchConfig) -> float:
    """Median, with the cache flushed before every call."""
    return do_bench(lambda: run(config), return_mode="median")


def tune(device: torch.device, path: Path | None = None) -> Path:
    """Measure every kernel and width on a device, print what changes, and rewrite its table.

    Raises:
        ValueError: there is no CUDA device to measure on.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"tuning needs a CUDA device; {device} is none, or there is none here")
    name = architecture(device)
    found: dict[str, dict[int, LaunchConfig]] = {}
    for kernel, entries in TABLES[name].items():
        found[kernel] = {}
        for width, config in entries.items():
            run = workload(kernel, width, device)
            best = tune_kernel(kernel, width, config, functools.partial(_milliseconds, run))
            found[kernel][width] = best
            print(f"{kernel} {width}: {best}" + ("" if best != config else " (as before)"), flush=True)
    path = path or Path(__file__).with_name("tables.py")
    versions = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"
    path.write_text(render({**TABLES, name: found}, {**MEASURED, name: versions}))
    return path


if __name__ == "__main__":
    print(tune(torch.device("cuda")))
