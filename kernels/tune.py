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

from . import cosine, pooling, residual
from .launch import LaunchConfig, architecture, column_tiles
from .pooling import MEAN_COLUMNS
from .tables import MEASURED, TABLES

Tables = dict[str, dict[str, dict[int, LaunchConfig]]]

# Multiprocessors of the card each table is for (A100, H100/H200, B200; anything else).
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "portable": 128}
WIDTHS = {
    "residual_forward": (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    "residual_backward": (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    "masked_mean": (8192,),
    "velocity_delta": (128, 256, 1024, 2048, 4096, 8192),
    "cosine_rows": (128, 256, 512, 1024, 2048, 4096, 8192),
}
ROWS = ("residual_forward", "residual_backward", "velocity_delta", "cosine_rows")  # a tile holds whole rows
SEQUENCES, FRAMES, STREAMS = 16, 1024, 13  # what is timed: out of cache at every width


def start(kernel: str, width: int, multiprocessors: int) -> LaunchConfig:
    """The value before any measurement.

    One 16-byte load a thread and tensor in a backward of the residual stream (8 half-precision numbers, so that the
    three sums over tokens fit into registers), two elsewhere; four warps, more where the row is wider than that.
    A forward splits odd widths. A backward pads them: with a tail, as many rows are in flight (the tail's sums take
    the registers that its lanes save) and its loads are shorter than 16 bytes."""
    if kernel == "masked_mean":
        return LaunchConfig(32, 4, programs=0, split=False)
    if kernel in ("velocity_delta", "cosine_rows"):
        warps = max(4, min(16, width // 512))
        programs = multiprocessors * 8 if kernel == "velocity_delta" else 0
        return LaunchConfig(max(1, warps * 512 // width), warps, programs, split=False)
    forward = kernel == "residual_forward"
    split = forward and width & (width - 1) != 0
    main = triton.next_power_of_2(width) // (2 if split else 1)
    warps = max(4, min(16, main // 256))
    vectors, resident = (2, 64) if forward else (1, 32)
    return LaunchConfig(max(1, warps * 256 * vectors // main), warps, multiprocessors * resident // warps, split)


def start_tables() -> Tables:
    """All tables as they are before any measurement."""
    return {
        name: {kernel: {width: start(kernel, width, count) for width in widths} for kernel, widths in WIDTHS.items()}
        for name, count in MULTIPROCESSORS.items()
    }


def candidates(kernel: str, width: int, config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Other tiles for a configuration: warps, 16-byte vectors per thread and, for odd widths, padding or two tiles."""
    odd = kernel.startswith("residual") and width & (width - 1) != 0
    for split in (False, True) if odd else (False,):
        main = triton.next_power_of_2(width) // (2 if split else 1) if kernel in ROWS else MEAN_COLUMNS
        for warps in (1, 2, 4, 8, 16):
            for vectors in (1, 2, 4):
                rows = warps * 256 * vectors // main
                if 1 <= rows <= 64:
                    candidate = dataclasses.replace(config, block_t=rows, num_warps=warps, split=split)
                    if not split or column_tiles(width, candidate)[1]:
                        yield candidate


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
    if kernel == "cosine_rows":
        y, target, loss = (
            x.flatten(0, 1),
            randn(SEQUENCES * FRAMES, width),
            randn(x[..., 0].numel(), dtype=torch.float32),
        )
        grad = torch.empty_like(y)
        return lambda config: cosine.cosine_rows(y, target, None, None, 1e-8, False, loss, grad, config)
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
    for factor in (0.25, 0.5, 2, 4) if config.programs else ():
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
