"""Run problems: gate, interleaved timing, memory, launches and energy; one row for each provider."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from agrepa_fast.training.nvml import Nvml

from . import protocol
from .broken import one_line
from .case import Problem, Provider, Run
from .deadline import Deadline
from .gated import AGAIN, Gated, empty_row, release, with_again, without_broken
from .protocol import Effort, Timing
from .roofline import bound
from .tables import duration

COPY = "copy of the same bytes"

EFFORT = {
    "cpu": {"toy": Effort(0.0, 2, 2), "quick": Effort(0.8, 3, 40), "full": Effort(5.0, 7, 60)},
    "cuda": {"toy": Effort(0.0, 2, 2), "quick": Effort(0.2, 3, 40), "full": Effort(0.6, 3, 60)},
}
SINGLE = Effort(0.0, 1, 1)
ENERGY_SECONDS = 0.3  # NVML's energy counter moves every 20 to 100 ms


class CutShort(KeyboardInterrupt):
    """The interrupt of a problem; its text says what was measured until then."""


def run_problem(
    case: str,
    problem: Problem,
    device: torch.device,
    scale: str,
    roofline: Mapping[str, Any],
    barred: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Run one problem; return its entry of the result file (schema.json, "problem").

    Args:
        barred: {provider: how it broke an earlier process}, see `without_broken`.
        seconds: after so long no rival is built any more, and one that is being built is given up. Ours is always
            built.

    Raises:
        CaptureFailed, DeviceFailed: this process must measure nothing more.
        CutShort: on an interrupt.
    """
    began = time.perf_counter()
    gated: Gated | None = None
    torch.compiler.reset()  # compiled shapes of the last problem count against Dynamo's limit
    with protocol.lane(device):
        torch.manual_seed(0)
        setup = without_broken(problem.build(device), barred or {})
        run = _run_alone if problem.alone else _run
        try:
            gated = Gated(setup, device, Deadline(seconds))
            entry = run(problem, gated, device, scale, dict(roofline))
        except KeyboardInterrupt as stop:
            timed = {} if gated is None else gated.timed
            until = ", ".join(f"{name} {duration(1e6 * median)}" for name, median in timed.items())
            lasted = f"cut short after {time.perf_counter() - began:.0f} s"
            raise CutShort(f"{lasted}; measured until then: {until or 'nothing'}") from stop
        del setup, gated
    release(device)
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


def _run(problem: Problem, gated: Gated, device: torch.device, scale: str, roofline: dict[str, Any]) -> dict[str, Any]:
    """Build all providers, and let them take turns in every round."""
    providers = with_again(gated.setup)
    calls: dict[str, Run] = {}
    for provider in gated.in_order(providers):
        call = gated.admit(provider)
        if call is not None:
            calls[provider.name] = call
    gated.forget()
    ours = next(p.name for p in providers if p.role == "ours")
    passed = ours in calls and AGAIN in calls
    if not passed:
        # A wrong or broken op of ours is not timed. Its rivals are, and nothing is claimed against them.
        calls.pop(ours, None)
        calls.pop(AGAIN, None)
    effort = SINGLE if problem.single else EFFORT[device.type][scale]
    capturable = {p.name for p in providers if p.capturable}
    copy = _copy_call(problem, device, roofline)
    named: dict[str, Callable[[], object]] = dict(calls)
    if copy is not None and calls:
        named[COPY] = copy
        capturable.add(COPY)
        gated.rows[COPY] = empty_row(Provider(COPY, "copy", list)) | {"status": "ok"}  # type: ignore[arg-type]
    timings: dict[str, Timing] = {}
    if named:
        timings = protocol.measure(named, device, effort, frozenset(capturable))
    for name, timing in timings.items():
        row = gated.rows[name]
        row |= _rates(problem, timing, roofline, timings.get(COPY))
        if name != COPY:
            _columns(row, calls[name], problem, timing, device, scale, gated.pools[name])
    return _entry(gated.rows, timings)


def _run_alone(
    problem: Problem, gated: Gated, device: torch.device, scale: str, roofline: dict[str, Any]
) -> dict[str, Any]:
    """Keep one provider in memory at a time: build, time and free each one, in order and then in reverse order.

    The middle of both passes is the same moment for every provider, so a steady drift favours none. Ours is the first
    and, a second time, the last; the difference of the two shows the drift within a pass. The second pass is left out
    if the first took more than half of the problem's time.
    """
    providers = sorted(with_again(gated.setup), key=lambda p: p.name != gated.setup.expression)
    effort = EFFORT[device.type][scale]
    half = dataclasses.replace(
        effort, seconds=effort.seconds / 2, least_rounds=(effort.least_rounds + 1) // 2, most_rounds=20
    )
    taken: dict[str, list[Timing]] = {}
    for number, order in enumerate((providers, providers[::-1])):
        if number == 1 and gated.deadline.more_than_half_spent():
            break
        for provider in order:
            row = gated.rows[provider.name]
            if number == 0 or row["status"] == "ok":
                call = gated.admit(provider, limited=number == 0)
                if call is not None:
                    try:
                        timing = protocol.measure({provider.name: call}, device, half)[provider.name]
                        taken.setdefault(provider.name, []).append(timing)
                        gated.timed.setdefault(provider.name, timing.median)
                        if number == 0:
                            _columns(row, call, problem, timing, device, scale, gated.pools[provider.name])
                    except torch.OutOfMemoryError as error:
                        taken.pop(provider.name, None)
                        row["status"], row["reason"] = "out of memory", one_line(error)
                del call
            torch.compiler.reset()
            release(device)
    timings = {}
    ours = next(p.name for p in providers if p.role == "ours")
    twice = [block for name in (ours, AGAIN) for block in taken.get(name, ())]
    for name, blocks in taken.items():
        if gated.rows[name]["status"] == "ok":
            # Take as many samples of both passes, alternating; and as many of ours as of ours again, to pair them.
            least = min(len(block.samples) for block in (twice if name in (ours, AGAIN) else blocks))
            samples = tuple(sample for group in zip(*(block.samples[:least] for block in blocks)) for sample in group)
            timings[name] = dataclasses.replace(blocks[0], samples=samples)
    if not {ours, AGAIN} <= timings.keys():
        timings = {name: timing for name, timing in timings.items() if name not in (ours, AGAIN)}
        for name in (ours, AGAIN):
            gated.rows[name] = empty_row(Provider(name, gated.rows[name]["role"], list)) | {  # type: ignore[arg-type]
                key: gated.rows[name][key] for key in ("status", "reason", "error")
            }
    for name, timing in timings.items():
        gated.rows[name] |= _rates(problem, timing, roofline, None)
    return _entry(gated.rows, timings)


def _entry(rows: dict[str, dict[str, Any]], timings: dict[str, Timing]) -> dict[str, Any]:
    """Speed-ups, verdicts and the noise floor from the rows of a problem.

    A speed-up compares times of the same timer: if ours is replayed from a graph and a row cannot be, it compares the
    eager calls of both.
    """
    ours = next(name for name, row in rows.items() if row["role"] == "ours")
    passed = ours in timings and AGAIN in timings
    floor: float | None = None
    if passed:
        first, second = timings[ours], timings[AGAIN]
        floor = protocol.noise_floor(first, second)
        for name, timing in timings.items():
            row = rows[name]
            if row["role"] in ("ours", "again", "copy"):
                continue
            compared, limit = first, floor
            if timing.timer != first.timer:
                compared, compared_again = (
                    dataclasses.replace(t, samples=t.eager, timer="events") if t.eager else t for t in (first, second)
                )
                limit = protocol.noise_floor(compared, compared_again)
                timing = dataclasses.replace(timing, samples=timing.eager) if timing.eager else timing
            row["speedup"] = timing.median / compared.median
            row["verdict"] = protocol.verdict(row["speedup"], limit)
    reasons = [r["reason"] for r in rows.values() if r["role"] in ("ours", "again") and r["reason"]]
    reason = None if passed else next(iter(reasons), "ours was not timed")
    return {"gate": {"passed": passed, "reason": reason}, "noise_floor": floor, "rows": list(rows.values())}


def _copy_call(problem: Problem, device: torch.device, roofline: dict[str, Any]) -> Callable[[], object] | None:
    """A copy that reads and writes the problem's least bytes; None if bytes do not limit the problem."""
    if problem.bytes is None or problem.flops is None or problem.single:
        return None
    if bound(problem.flops, problem.bytes, roofline, problem.dtype)[1] != "copy":
        return None
    source = torch.randint(-100, 100, (max(1, problem.bytes // 2),), dtype=torch.int8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def count_launches(entry: dict[str, Any], problem: Problem, device: torch.device) -> None:
    """Count the launches of the providers that were timed, for the rows of their entry. Builds each of them anew.

    Call it when all problems are timed, since the profiler slows down what comes after it.
    """
    rows = {row["provider"]: row for row in entry["rows"] if row["median_us"] is not None and row["launches"] is None}
    torch.compiler.reset()
    with protocol.lane(device):
        torch.manual_seed(0)
        for provider in problem.build(device).providers:
            if provider.name in rows:
                call = provider.make()
                call()
                rows[provider.name]["launches"] = protocol.launches(call, device)
                del call
                release(device)


def _columns(
    row: dict[str, Any],
    call: Run,
    problem: Problem,
    timing: Timing,
    device: torch.device,
    scale: str,
    pools: Collection[protocol.Pool],
) -> None:
    """Memory, host time and energy, each measured in calls of its own."""
    if problem.single:
        return
    row["peak_bytes"] = protocol.peak_bytes(call, device, pools)
    row["host_us"] = _micro(protocol.host_seconds(call, device, 5 if timing.median < 0.05 else 1))
    if scale == "full" and device.type == "cuda" and row["role"] != "again":
        row |= _energy(call, device)


def _rates(problem: Problem, timing: Timing, roofline: dict[str, Any], copy: Timing | None) -> dict[str, Any]:
    """Times, least bytes and operations per second, and the share of the limit.

    copy: a copy of the same bytes in the same rounds. If there is one it is the limit, because small tensors are copied
        at
    another rate than the large ones of the roofline.
    """
    median = timing.median
    values: dict[str, Any] = {
        "median_us": median * 1e6,
        "p20_us": timing.percentile(0.2) * 1e6,
        "p80_us": timing.percentile(0.8) * 1e6,
        "samples": len(timing.samples),
        "calls": timing.calls,
        "timer": timing.timer,
        "eager_us": statistics.median(timing.eager) * 1e6 if timing.eager else None,
    }
    if problem.bytes is not None and problem.flops is not None:
        least, by = bound(problem.flops, problem.bytes, roofline, problem.dtype)
        if copy is not None:
            least = statistics.median(copy.samples if copy.timer == timing.timer else copy.eager)
        values |= {
            "gb_per_s": problem.bytes / median / 1e9,
            "tflop_per_s": problem.flops / median / 1e12,
            "roofline_share": least / median,
            "bound_by": by,
        }
    return values


def _energy(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Joules per call and mean watts over many calls, from the card's energy counter."""
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
