"""Tune the launch configurations on this machine's CUDA device and rewrite its table.

`python -m agrepa_fast.kernels.tune` measures every kernel at every width of the table of this device's
architecture and writes `tables.py`. What was never measured follows `launch.rule`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from . import cosine, pooling, residual, residual_backward
from . import tables as tables_module
from .launch import WIDTHS, LaunchConfig, architecture, table_entry
from .pooling import MEAN_COLUMNS
from .tables import MEASURED, TABLES

Table = dict[str, dict[int, LaunchConfig]]  # kernel -> width -> configuration

SEQUENCES, FRAMES, STREAMS = 16, 1024, 13  # sizes of the timed data: larger than the cache at every width


def candidates(kernel: str, width: int, config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Configurations to try beside `config`: other numbers of warps, and of 16-byte vectors per thread."""
    columns = MEAN_COLUMNS if kernel == "masked_mean" else triton.next_power_of_2(width)
    for warps in (1, 2, 4, 8, 16):
        for vectors in (1, 2, 4):
            rows = warps * 256 * vectors // columns
            if 1 <= rows <= 64:
                yield dataclasses.replace(config, block_t=rows, num_warps=warps)


def workload(kernel: str, width: int, device: torch.device) -> Callable[[LaunchConfig], object]:
    """The call to time, on random bfloat16 data with modulation in float32."""

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
    inputs = (x, branch, gate, shift, scale, None, None, None, None, None, 1e-6, "layer")
    if kernel == "residual_forward":
        return lambda config: residual.forward(*inputs, config)
    x_new, h, mean, rstd = residual.forward(*inputs)
    saved = (h, branch, x_new, branch, gate, scale, None, None, None, None, mean, rstd, "layer")
    return lambda config: residual_backward.backward(*saved, config)


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


def render(tables: dict[str, Table], measured: dict[str, str]) -> str:
    """The text of `tables.py`."""
    head = Path(tables_module.__file__).read_text(encoding="utf-8").partition("MEASURED: ")[0]
    lines = [f"{head}MEASURED: dict[str, str] = {{"]
    lines += [f'    "{name}": "{measured[name]}",' for name in sorted(measured)]
    lines += ["}", "", "TABLES: dict[str, dict[str, dict[int, tuple[int, int, int]]]] = {"]
    for name, kernels in tables.items():
        lines.append(f'    "{name}": {{')
        for kernel, entries in kernels.items():
            lines.append(f'        "{kernel}": {{')
            lines += [f"            {width}: {dataclasses.astuple(entries[width])}," for width in sorted(entries)]
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
    path = path or Path(tables_module.__file__)
    versions = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"
    others = {
        other: {
            kernel: {width: LaunchConfig(*entry) for width, entry in entries.items()} for kernel, entries in t.items()
        }
        for other, t in TABLES.items()
    }
    measured: Table = {}
    for kernel, widths in WIDTHS.items():
        measured[kernel] = {}
        for width in widths:
            config = table_entry(name, kernel, width)
            run = workload(kernel, width, device)
            best = tune_kernel(kernel, width, config, functools.partial(_milliseconds, run))
            measured[kernel][width] = best
            print(f"{kernel} {width}: {best}" + ("" if best != config else " (as before)"), flush=True)
        # Write after each kernel, so that an interrupted run keeps its results.
        path.write_text(render({**others, name: measured}, {**MEASURED, name: versions}), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(tune(torch.device("cuda")))
