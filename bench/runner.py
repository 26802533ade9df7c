"""Runs problems: gate first, then interleaved timing, then memory, launches and energy; a row per provider."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from agrepa_fast.training.nvml import Nvml

from . import gate, protocol
from .case import Outputs, Problem, Provider, Run, Setup, Unavailable
from .protocol import Effort, Timing
from .roofline import bound

AGAIN = "ours again"  # the A/A row

EFFORT = {
    "cpu": {"toy": Effort(0.0, 2, 2), "quick": Effort(0.8, 3, 40), "full": Effort(5.0, 7, 60)},
    "cuda": {"toy": Effort(0.0, 2, 2), "quick": Effort(0.2, 3, 40), "full": Effort(0.6, 3, 60)},
}
SINGLE = Effort(0.0, 1, 1)
ENERGY_SECONDS = 0.3  # NVML's energy counter moves every 20 to 100 ms


def run_problem(
    case: str, problem: Problem, device: torch.device, scale: str, roofline: Mapping[str, Any]
) -> dict[str, Any]:
    """Run one problem; returns its entry of the result file (schema.json, "problem")."""
    began = time.perf_counter()
    torch.compiler.reset()  # compiled shapes of the last problem would count against Dynamo's limit
    with protocol.lane(device):
        torch.manual_seed(0)
        entry = _run(problem, problem.build(device), device, scale, dict(roofline))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "case": case,
        "key": problem.key,
        "params": dict(problem.params),
        "bytes": problem.bytes,
        "flops": problem.flops,
        "dtype": problem.dtype,
        **entry,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _run(problem: Problem, setup: Setup, device: torch.device, scale: str, roofline: dict[str, Any]) -> dict[str, Any]:
    providers = with_again(setup)
    calls: dict[str, Run] = {}
    rows = {provider.name: _empty_row(provider) for provider in providers}
    admit(setup, providers, calls, rows)
    ours = next(p.name for p in providers if p.role == "ours")
    passed = ours in calls and AGAIN in calls
    if not passed:
        # A wrong or broken op is not timed at all; the others are, and nothing is claimed against them.
        calls.pop(ours, None)
        calls.pop(AGAIN, None)
    effort = SINGLE if problem.single else EFFORT[device.type][scale]
    timings: dict[str, Timing] = {}
    if calls:
        capturable = frozenset(p.name for p in providers if p.capturable)
        timings = protocol.measure(dict(calls), device, effort, capturable)
    floor = protocol.noise_floor(timings[ours], timings[AGAIN]) if passed else None
    for name, timing in timings.items():
        row = rows[name]
        row |= _rates(problem, timing, roofline)
        if not problem.single:
            row["peak_bytes"] = protocol.peak_bytes(calls[name], device)
            row["launches"] = protocol.launches(calls[name], device)
            row["host_us"] = _micro(protocol.host_seconds(calls[name], device, 5 if timing.median < 0.05 else 1))
        if scale == "full" and device.type == "cuda" and not problem.single:
            row |= _energy(calls[name], device)
        if floor is not None and row["role"] not in ("ours", "again"):
            row["speedup"] = timing.median / timings[ours].median
            row["verdict"] = protocol.verdict(row["speedup"], floor)
    reason = (
        None if passed else next(r["reason"] for r in rows.values() if r["role"] in ("ours", "again") and r["reason"])
    )
    return {"gate": {"passed": passed, "reason": reason}, "noise_floor": floor, "rows": list(rows.values())}


def with_again(setup: Setup) -> list[Provider]:
    """The providers, and ours a second time, built anew, as the A/A row."""
    ours = [provider for provider in setup.providers if provider.role == "ours"]
    if len(ours) != 1:
        raise ValueError(f"providers: expected one with the role 'ours', got {[p.name for p in ours]}")
    return [*setup.providers, Provider(AGAIN, "again", ours[0].make, ours[0].capturable)]


def admit(setup: Setup, providers: list[Provider], calls: dict[str, Run], rows: dict[str, dict[str, Any]]) -> None:
    """The gate: build every provider, run it once, and keep the calls whose outputs are right."""
    reference = setup.reference()
    expression: Outputs | None = None
    # The plain expression goes first: ours is held to twice its error.
    for provider in sorted(providers, key=lambda p: p.name != setup.expression):
        row = rows[provider.name]
        try:
            call = provider.make()
            outputs = call()
        except Unavailable as error:
            row["status"], row["reason"] = "unavailable", str(error)
            continue
        except Exception as error:  # a rival may fail in any way; that is a result, not the end of the run
            row["status"], row["reason"] = "failed", f"{type(error).__name__}: {_line(error)}"
            continue
        if provider.name == setup.expression:
            expression = outputs
        held = expression if provider.role in ("ours", "again") else None
        checked = gate.check(outputs, reference, setup.bounds, held)
        row["error"] = checked.error
        if checked.passed:
            row["status"] = "ok"
            calls[provider.name] = call
        else:
            row["status"], row["reason"] = "wrong", checked.reason


def _empty_row(provider: Provider) -> dict[str, Any]:
    times = ("median_us", "p20_us", "p80_us", "samples", "calls", "timer")
    rates = ("gb_per_s", "tflop_per_s", "roofline_share", "bound_by")
    rest = ("reason", "peak_bytes", "launches", "host_us", "joules", "watts", "error", "speedup", "verdict")
    return {
        "provider": provider.name,
        "role": provider.role,
        "status": "failed",
        **dict.fromkeys((*times, *rates, *rest)),
    }


def _rates(problem: Problem, timing: Timing, roofline: dict[str, Any]) -> dict[str, Any]:
    """Times, and what they mean: the case's least bytes and operations per second, the share of the limit."""
    median = timing.median
    found: dict[str, Any] = {
        "median_us": median * 1e6,
        "p20_us": timing.percentile(0.2) * 1e6,
        "p80_us": timing.percentile(0.8) * 1e6,
        "samples": len(timing.samples),
        "calls": timing.calls,
        "timer": timing.timer,
    }
    if problem.bytes is not None and problem.flops is not None:
        least, by = bound(problem.flops, problem.bytes, roofline, problem.dtype)
        found |= {
            "gb_per_s": problem.bytes / median / 1e9,
            "tflop_per_s": problem.flops / median / 1e12,
            "roofline_share": least / median,
            "bound_by": by,
        }
    return found


def _energy(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Joules per call and mean watts over a stretch of calls, from the card's energy counter."""
    nvml = Nvml(device)
    if nvml.joules() is None:
        return {}
    torch.cuda.synchronize(device)
    began, before = time.perf_counter(), nvml.joules()
    calls = 0
    while time.perf_counter() - began < ENERGY_SECONDS:
        call()
        torch.cuda.synchronize(device)
        calls += 1
    lasted, after = time.perf_counter() - began, nvml.joules()
    if before is None or after is None or after <= before:
        return {}
    return {"joules": (after - before) / calls, "watts": (after - before) / lasted}


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else ""
