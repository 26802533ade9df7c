"""Run problems: gate, interleaved timing, memory, launches and energy; one row for each provider."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from agrepa_fast.training.nvml import Nvml

from . import gate, protocol
from .case import Outputs, Problem, Provider, Run, Setup, Unavailable
from .deadline import Deadline, OutOfTime
from .protocol import Effort, Timing
from .roofline import bound

AGAIN = "ours again"  # the A/A row
COPY = "copy of the same bytes"

EFFORT = {
    "cpu": {"toy": Effort(0.0, 2, 2), "quick": Effort(0.8, 3, 40), "full": Effort(5.0, 7, 60)},
    "cuda": {"toy": Effort(0.0, 2, 2), "quick": Effort(0.2, 3, 40), "full": Effort(0.6, 3, 60)},
}
SINGLE = Effort(0.0, 1, 1)
ENERGY_SECONDS = 0.3  # NVML's energy counter moves every 20 to 100 ms


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
        barred: {provider: why its capture failed in an earlier process}. Such a provider is timed without a graph, or
            fails with that reason if it consists of one.
        seconds: after so long no rival is built any more, and one that is being built is given up. Ours is always
            built.

    Raises:
        CaptureFailed: a capture failed, so this process must measure nothing more.
    """
    began = time.perf_counter()
    torch.compiler.reset()  # compiled shapes of the last problem count against Dynamo's limit
    with protocol.lane(device):
        torch.manual_seed(0)
        setup = _without_captures(problem.build(device), barred or {})
        run = _run_alone if problem.alone else _run
        entry = run(problem, Gated(setup, device, Deadline(seconds)), device, scale, dict(roofline))
        del setup
    _release(device)
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


def _without_captures(setup: Setup, barred: Mapping[str, str]) -> Setup:
    """The set-up with barred providers timed eagerly, or failing if they are a graph themselves."""

    def failing(reason: str) -> Callable[[], Run]:
        def make() -> Run:
            raise RuntimeError(reason)

        return make

    def without(provider: Provider) -> Provider:
        # Ours is captured both times or not at all, so what bars one bars the other.
        name = AGAIN if provider.role == "ours" and AGAIN in barred else provider.name
        if name not in barred:
            return provider
        if provider.capturable:
            return dataclasses.replace(provider, capturable=False)
        return dataclasses.replace(provider, make=failing(barred[name]))

    return dataclasses.replace(setup, providers=tuple(without(provider) for provider in setup.providers))


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
        gated.rows[COPY] = _empty_row(Provider(COPY, "copy", list)) | {"status": "ok"}  # type: ignore[arg-type]
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
                        if number == 0:
                            _columns(row, call, problem, timing, device, scale, gated.pools[provider.name])
                    except torch.OutOfMemoryError as error:
                        taken.pop(provider.name, None)
                        row["status"], row["reason"] = "out of memory", _line(error)
                del call
            torch.compiler.reset()
            _release(device)
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
            gated.rows[name] = _empty_row(Provider(name, gated.rows[name]["role"], list)) | {  # type: ignore[arg-type]
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


def _columns(
    row: dict[str, Any],
    call: Run,
    problem: Problem,
    timing: Timing,
    device: torch.device,
    scale: str,
    pools: Collection[protocol.Pool],
) -> None:
    """Memory, launches, host time and energy, each measured in calls of its own."""
    if problem.single:
        return
    row["peak_bytes"] = protocol.peak_bytes(call, device, pools)
    row["launches"] = protocol.launches(call, device)
    row["host_us"] = _micro(protocol.host_seconds(call, device, 5 if timing.median < 0.05 else 1))
    if scale == "full" and device.type == "cuda":
        row |= _energy(call, device)


def with_again(setup: Setup) -> list[Provider]:
    """The providers, and ours a second time, built anew, for the A/A row."""
    ours = [provider for provider in setup.providers if provider.role == "ours"]
    if len(ours) != 1:
        raise ValueError(f"providers: expected one with the role 'ours', got {[p.name for p in ours]}")
    return [*setup.providers, Provider(AGAIN, "again", ours[0].make, ours[0].capturable)]


class Gated:
    """The gate of a problem. It builds a provider, runs it once, and admits its call if its outputs are right."""

    def __init__(self, setup: Setup, device: torch.device, deadline: Deadline) -> None:
        self.setup = setup
        self.device = device
        self.deadline = deadline
        self.rows = {provider.name: _empty_row(provider) for provider in with_again(setup)}
        self.pools: dict[str, set[protocol.Pool]] = {}  # private pools that a provider's graphs made
        self._reference: Outputs | None = setup.reference()
        self._expression: Outputs | None = None

    def in_order(self, providers: Sequence[Provider]) -> list[Provider]:
        """The order of building: the plain expression, since ours may have twice its error; ours, without a time limit;
        rivals.
        """
        return sorted(providers, key=lambda p: (p.name != self.setup.expression, p.role not in ("ours", "again")))

    def forget(self) -> None:
        """Free the reference and the expression's outputs, which only the gate needs."""
        self._reference = self._expression = None

    def admit(self, provider: Provider, limited: bool = True) -> Run | None:
        """The provider's call; or None, with the reason in its row.

        limited: a rival must be built before the deadline.

        Raises:
            CaptureFailed: building or calling it broke a capture.
        """
        row = self.rows[provider.name]
        before = protocol.private_pools(self.device).keys()
        limited = limited and provider.role not in ("ours", "again")
        try:
            if limited and self.deadline.over():
                raise OutOfTime
            with self.deadline.enforced() if limited else contextlib.nullcontext():
                call = provider.make()
                outputs = call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        except OutOfTime:
            row["status"] = "unavailable"
            row["reason"] = f"not built in time: the {self.deadline.seconds:.0f} s of this problem were over"
        except Unavailable as error:
            row["status"], row["reason"] = "unavailable", str(error)
        except protocol.CaptureFailed:
            raise
        except torch.OutOfMemoryError as error:
            row["status"], row["reason"] = "out of memory", _line(error)
        except Exception as error:  # a rival may fail in any way, which is a result and does not end the run
            if self.device.type == "cuda" and re.search("captur|recorded as a CUDA graph", str(error)):
                raise protocol.CaptureFailed(provider.name, _line(error)) from error
            row["status"], row["reason"] = "failed", f"{type(error).__name__}: {_line(error)}"
        else:
            self.pools[provider.name] = set(protocol.private_pools(self.device).keys() - before)
            return call if self._right(provider, outputs) else None
        _release(self.device)  # free what was built before the failure
        return None

    def _right(self, provider: Provider, outputs: Outputs) -> bool:
        assert self._reference is not None, "admit after forget"
        row = self.rows[provider.name]
        if provider.name == self.setup.expression:
            self._expression = outputs
        held = self._expression if provider.role in ("ours", "again") else None
        checked = gate.check(outputs, self._reference, self.setup.bounds, held)
        row["error"] = checked.error
        row["status"], row["reason"] = ("ok", None) if checked.passed else ("wrong", checked.reason)
        return checked.passed


def _empty_row(provider: Provider) -> dict[str, Any]:
    times = ("median_us", "p20_us", "p80_us", "samples", "calls", "timer", "eager_us")
    rates = ("gb_per_s", "tflop_per_s", "roofline_share", "bound_by")
    rest = ("reason", "peak_bytes", "launches", "host_us", "joules", "watts", "error", "speedup", "verdict")
    return {
        "provider": provider.name,
        "role": provider.role,
        "status": "failed",
        **dict.fromkeys((*times, *rates, *rest)),
    }


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


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else ""
