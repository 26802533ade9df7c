"""How long a study takes on this machine: from its finished runs, or from timed passes of the network."""

from __future__ import annotations

import statistics
import time

import torch

from ..errors import UserError
from ..models.cost import forward_flops
from ..models.dit import DiT
from ..report.html import duration
from ..training.config import RunConfig
from ..training.environment import pick_device
from .plan import Plan, Run

LARGEST = 2e11  # operations of a step that a CPU is asked to time
PASSES = 5


def step_flops(config: RunConfig) -> int:
    """Operations of one step of the network: a full batch of crops of the longest length."""
    return 3 * config.train.accumulate * forward_flops(config.dit, _clips(config), config.max_frames)


def _clips(config: RunConfig) -> int:
    return max(1, config.data.frames_per_batch // config.max_frames)


def time_needed(plan: Plan, workers: int, done: float, total: int) -> str:
    """A sentence: how long all steps take with so many runs at a time, how much is left, and how that is known."""
    workers = max(1, workers)
    trained = [run for run in plan.jobs if run.trained]
    if trained:
        seconds = statistics.fmean(map(_seconds_per_step, trained))
        source = f"from {len(trained)} finished runs; their validation and probes count, evaluations do not"
    else:
        try:
            timed = _timed_step(plan.config)
        except UserError as error:  # the study is planned for another machine
            return f"time: not estimated ({error}); the study tells the time left"
        if timed is None:
            return "time: not estimated, as the network is too large to be timed here; the study tells the time left"
        seconds = timed
        source = (
            f"a rough estimate from the fastest of {PASSES} passes of the network; it leaves out reading, the "
            "optimizer, teachers, heads, probes, validation and evaluations"
        )
    whole, left = (duration(steps * seconds / workers) for steps in (total, total - done))
    return (
        f"about {whole} with --workers {workers} on this machine, {left} of it left ({seconds:.3g} s a step, {source})"
    )


def _seconds_per_step(run: Run) -> float:
    return run.measured("seconds") / run.config.train.steps


def _timed_step(config: RunConfig) -> float | None:
    """The least seconds of forward and backward of one step; None where that would take too long."""
    device = pick_device(config.train.device)
    if device.type == "cpu" and step_flops(config) > LARGEST:
        return None
    threads = torch.get_num_threads()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            return config.train.accumulate * _timed_pass(config, device)
    finally:
        torch.set_num_threads(threads)


def _timed_pass(config: RunConfig, device: torch.device) -> float:
    network, clips, frames = DiT(config.dit).to(device), _clips(config), config.max_frames
    x_t = torch.randn(clips, frames, config.dit.mels, device=device)
    cond = torch.randn(clips, frames, config.dit.cond, device=device)
    half = device.type == "cuda" and config.train.precision != "fp32"
    seconds = []
    for _ in range(PASSES + 1):  # the first one warms up
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            velocity = network(x_t, torch.rand(clips, device=device), cond)
        assert isinstance(velocity, torch.Tensor)
        velocity.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
