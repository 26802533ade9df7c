"""Host microseconds of an eager op call: the processor time that Python spends on it. No GPU is needed.

`python -m agrepa_fast.bench.host` prints medians. Launches are recorded instead of run, so the figures do not include
Triton's own launcher (about 10 us each). Tensors are small, on CUDA if there is a device, else on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from agrepa_fast import ops
from agrepa_fast.kernels.launch import record
from agrepa_fast.ops import dispatch
from agrepa_fast.ops.residual import GATED_RESIDUAL_NORM

SEQUENCES, FRAMES, WIDTH = 4, 8, 64
CALLS, ROUNDS = 100, 21


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """The calls to time, by name."""
    x, branch = torch.randn(2, SEQUENCES, FRAMES, WIDTH, device=device)
    gate, shift, scale = torch.randn(SEQUENCES, 3 * WIDTH, device=device).chunk(3, dim=1)
    s, index = torch.ones(SEQUENCES, device=device), torch.arange(SEQUENCES, device=device)
    velocity = torch.randn(3, SEQUENCES, FRAMES, WIDTH, device=device)
    leaves = [value.detach().requires_grad_() for value in (x, branch, gate, shift, scale)]
    gradients = [torch.randn_like(x), torch.randn_like(x)]

    def without_gradient(function: Callable[..., object], *inputs: object, **named: object) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return function(*inputs, **named)

        return call

    def both() -> object:
        return torch.autograd.grad(ops.gated_residual_norm(*leaves), leaves, gradients)

    norm = (x, branch, gate, shift, scale)
    return {
        "gated_residual_norm": without_gradient(ops.gated_residual_norm, *norm),
        "gated_residual_norm, streams": without_gradient(
            ops.gated_residual_norm, *norm, stream_scale=s, sample_index=index
        ),
        "gated_residual_norm, with a gradient": lambda: ops.gated_residual_norm(*leaves),
        "gated_residual_norm, forward and backward": both,
        "gated_residual_norm, through the dispatcher": without_gradient(
            GATED_RESIDUAL_NORM.registered, *norm, *[None] * 5, 1e-6, "layer"
        ),
        "layer_norm_modulate": without_gradient(ops.layer_norm_modulate, x, shift, scale),
        "gated_residual": without_gradient(ops.gated_residual, x, branch, gate),
        "masked_mean": without_gradient(ops.masked_mean, x),
        "velocity_delta": without_gradient(ops.velocity_delta, velocity),
    }


def measure(device: torch.device) -> dict[str, tuple[float, float]]:
    """{call: (median, spread)} in microseconds over interleaved rounds; spread is from the 20 % to the 80 % mark."""
    named = calls(device)
    samples: dict[str, list[float]] = {name: [] for name in named}
    with record("portable") as recording:
        for i in range(ROUNDS + 1):
            for name in named if i % 2 else reversed(named):
                begin = time.process_time()
                for _ in range(CALLS):
                    named[name]()
                taken = (time.process_time() - begin) / CALLS * 1e6
                recording.launches.clear()
                if i:  # the first round warms up
                    samples[name].append(taken)
    marks = {name: statistics.quantiles(values, n=5) for name, values in samples.items()}
    return {name: (statistics.median(values), marks[name][3] - marks[name][0]) for name, values in samples.items()}


def main() -> None:
    """Print the table."""
    dispatch.INTERPRETED = True  # take the kernels' path on CPU tensors; nothing is launched
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"host microseconds a call, launches not counted; torch {torch.__version__}, {device}")
    for name, (median, spread) in measure(device).items():
        print(f"{median:8.1f} +- {spread:4.1f}  {name}")


if __name__ == "__main__":
    main()
