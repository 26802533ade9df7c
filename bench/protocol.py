"""How calls are timed: interleaved variants, medians, and a measured noise floor.

Times are seconds per call. The variants take turns, round after round, in an order that is rotated and reversed. One of
them appears twice (A/A); the difference of the two is noise by definition.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from agrepa_fast import graphs

from .broken import CaptureFailed, DeviceFailed, device_error, one_line
from .deadline import lift

Call = Callable[[], object]

GRAPH_BELOW = 100e-6  # shorter CUDA work is replayed from a graph, since launches would take most of its time
CALLS_PER_GRAPH = 10
SHORTEST_SAMPLE = 2e-3  # seconds; on the CPU, calls are repeated until a sample is so long
LEAST_FLOOR = 0.01  # a difference below 1 % is never claimed
SPREADS = 3.0  # standard errors that the noise floor covers


@dataclass(frozen=True)
class Effort:
    """How long a problem may be timed: rounds of all variants for `seconds`, within two bounds on their number."""

    seconds: float
    least_rounds: int = 5
    most_rounds: int = 60

    def rounds(self, round_seconds: float) -> int:
        """The number of rounds that fit, if one round of all variants takes so long."""
        return max(self.least_rounds, min(self.most_rounds, int(self.seconds / max(round_seconds, 1e-9))))


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant: one sample for each round, in order."""

    samples: tuple[float, ...]
    calls: int  # calls in a sample
    timer: str  # "perf_counter", "events" or "graph"
    eager: tuple[float, ...] = ()  # where the timer is "graph": samples of the same call, launched eagerly

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, share: float) -> float:
        """Linear interpolation between order statistics; share in [0, 1]."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def order(names: Sequence[str], round_number: int) -> list[str]:
    """The order of a round: it is rotated by one every second round, and every odd round runs backwards.

    Over 2 n rounds each of the n variants is equally often in each place, and precedes each other one as often as it
    follows it. So neither drift nor neighbours favour a variant.
    """
    shift = (round_number // 2) % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if round_number % 2 else rotated


def noise_floor(first: Timing, second: Timing) -> float:
    """The largest relative difference that means nothing, from two timings of the same work in the same rounds.

    It is the largest of: the difference of the two medians; three standard errors of the median of the rounds' log
    ratios (the normal one, 1.2533 s / sqrt(n), with s from the median absolute deviation); 1 %.
    """
    ratios = [a / b for a, b in zip(first.samples, second.samples, strict=True)]
    centre = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(ratio - centre) for ratio in ratios)
    spread = SPREADS * 1.2533 * deviation / len(ratios) ** 0.5
    return max(difference(first, second), spread, LEAST_FLOOR)


def difference(first: Timing, second: Timing) -> float:
    """The difference of two medians, relative to the smaller."""
    low, high = sorted((first.median, second.median))
    return high / low - 1


def verdict(speedup: float, floor: float) -> str:
    """ "win", "tie" or "loss" of ours at a speed-up. Anything within the noise floor is a tie."""
    if speedup > 1 + floor:
        return "win"
    return "loss" if speedup < 1 / (1 + floor) else "tie"


def measure(
    variants: dict[str, Call], device: torch.device, effort: Effort, capturable: frozenset[str] = frozenset()
) -> dict[str, Timing]:
    """Time warmed-up variants against each other.

    Args:
        variants: {name: call}. Each has run at these shapes before, in the gate, and runs once more to see how long it
            takes.
        device: where the work runs. "cuda" uses events with a cold L2, or graph replay for short work.
        effort: how long to measure.
        capturable: names of the calls that do not synchronise, which may be recorded in a CUDA graph.
    """
    if device.type == "cuda":
        return measure_cuda(variants, device, effort, capturable)
    return measure_cpu(variants, effort)


def measure_cpu(
    variants: dict[str, Call], effort: Effort, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Samples of `perf_counter`; short calls are repeated within a sample."""
    calls = dict.fromkeys(variants, 1)
    lasted = 0.0
    for name, call in variants.items():
        if effort.most_rounds == 1:  # a call too long to be made for calibration
            break
        began = clock()
        call()
        once = clock() - began
        calls[name] = max(1, int(SHORTEST_SAMPLE / max(once, 1e-9)))
        lasted += once * calls[name]
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(effort.rounds(lasted)):
        for name in order(list(variants), number):
            call = variants[name]
            began = clock()
            for _ in range(calls[name]):
                call()
            samples[name].append((clock() - began) / calls[name])
    return {name: Timing(tuple(samples[name]), calls[name], "perf_counter") for name in variants}


class ColdCache:
    """Evicts the L2 cache by reading a buffer of twice its size (at least 64 MiB).

    Writing would leave the cache full of changed lines, and the timed call would have to write them back.
    """

    def __init__(self, device: torch.device) -> None:
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
        self.device = device
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
        self.largest = torch.empty((), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        torch.amax(self.buffer, dim=0, out=self.largest)


@contextlib.contextmanager
def lane(device: torch.device) -> Iterator[None]:
    """The side stream for set-up, warm-up, capture and timing; on the CPU it does nothing.

    Backward runs on the stream of its forward, and a graph can only be captured on a stream that is not the default
    one.
    """
    if device.type != "cuda":
        yield
        return
    stream = graphs.side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize(device)


def measure_cuda(
    variants: dict[str, Call], device: torch.device, effort: Effort, capturable: frozenset[str]
) -> dict[str, Timing]:
    """CUDA events around each call, after evicting the L2.

    If the fastest capturable variant takes less than 100 us, every capturable variant is replayed from a graph of ten
    calls, each between its own event nodes and after its own eviction, so that neither launches nor a warm cache are
    timed. The eager calls are timed beside the replays. Call it inside `lane`.

    Raises:
        CaptureFailed: a variant in `capturable` could not be captured.
    """
    cold = ColdCache(device)
    eager = {name: _blaming(name, _events(call, cold), device) for name, call in variants.items()}
    if effort.most_rounds == 1:  # a call too long to be made for calibration
        return {name: Timing((run()[0],), 1, "events") for name, run in eager.items()}
    once: dict[str, float] = {}
    for name, run in eager.items():
        once[name] = run()[0]
        if once[name] < 10 * GRAPH_BELOW:  # the first call is the least steady one; more short calls cost little
            once[name] = statistics.median(run()[0] for _ in range(3))
    replays: dict[str, Callable[[], list[float]]] = {}
    if min((once[name] for name in variants if name in capturable), default=GRAPH_BELOW) < GRAPH_BELOW:
        replays = {
            name: _blaming(name, _graph(name, variants[name], cold), device) for name in variants if name in capturable
        }
    runners = {name: [eager[name], *([replays[name]] if name in replays else ())] for name in variants}
    began = time.perf_counter()
    for pair in runners.values():
        for run in pair:
            run()
    lasted = time.perf_counter() - began
    samples: dict[str, list[list[float]]] = {name: [[] for _ in pair] for name, pair in runners.items()}
    for number in range(effort.rounds(lasted)):
        for name in order(list(variants), number):
            for kept, run in zip(samples[name], runners[name]):
                kept.append(statistics.median(run()))
    return {
        name: Timing(tuple(taken[1]), CALLS_PER_GRAPH, "graph", tuple(taken[0]))
        if name in replays
        else Timing(tuple(taken[0]), 1, "events")
        for name, taken in samples.items()
    }


def _events(call: Call, cold: ColdCache) -> Callable[[], list[float]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> list[float]:
        cold()
        start.record()
        call()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) * 1e-3]

    return run


def _blaming(name: str, run: Callable[[], list[float]], device: torch.device) -> Callable[[], list[float]]:
    """`run`, which raises DeviceFailed with the provider's name if the device fails in it."""

    def blamed() -> list[float]:
        try:
            return run()
        except RuntimeError as error:
            reason = device_error(device)
            if reason is not None:
                raise DeviceFailed(name, reason) from error
            raise

    return blamed


class _Replay:
    """A captured graph of calls between event nodes. A run replays it and reads the events."""

    def __init__(self, graph: graphs.Recording, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        self.graph = graph
        self.events = events

    def __call__(self) -> list[float]:
        self.graph.replay()
        torch.cuda.current_stream().synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in self.events]


def _graph(name: str, call: Call, cold: ColdCache) -> _Replay:
    """Capture ten calls.

    Raises:
        CaptureFailed: they cannot be captured, or their replay measures nothing.
    """
    # External events become nodes of the graph, and can be read after a replay.
    events = [
        (torch.cuda.Event(enable_timing=True, external=True), torch.cuda.Event(enable_timing=True, external=True))
        for _ in range(CALLS_PER_GRAPH)
    ]

    def work() -> None:
        for start, end in events:
            cold()
            start.record()
            call()
            end.record()

    replay = _Replay(recorded(name, work, cold.device), events)
    try:
        usable = all(sample > 0 for sample in replay())
    except RuntimeError as error:
        if reason := device_error(cold.device):
            raise DeviceFailed(name, reason) from error
        raise CaptureFailed(name, f"the events of its replay cannot be read: {one_line(error)}") from error
    if not usable:
        raise CaptureFailed(name, "the events of its replay show no time")
    return replay


def recorded(name: str, work: Call, device: torch.device) -> graphs.Recording:
    """Record `work` as a CUDA graph.

    Raises:
        CaptureFailed: it cannot be captured; `name` is the provider's.
    """
    lift()
    torch.cuda.synchronize(device)
    try:
        return graphs.Recording(work, device)
    except RuntimeError as error:  # also out of memory, which ends a capture halfway
        raise CaptureFailed(name, one_line(error)) from error


def host_seconds(call: Call, device: torch.device, calls: int) -> float | None:
    """Seconds that the host spends in a call (launches, and syncs if it has any); None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    lasted = time.perf_counter() - began
    torch.cuda.synchronize(device)
    return lasted / calls


def launches(call: Call, device: torch.device) -> int | None:
    """Number of kernels, copies and fills that a call launches; None on the CPU, or where the profiler sees none.

    The profiler stays attached to CUDA and makes every later launch of the process slower, so call this last.
    """
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        call()
        torch.cuda.synchronize(device)
    count = sum(
        event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        for event in recorded.events()
    )
    return count or None  # without permission to trace, it sees nothing


Pool = tuple[int, int]


def private_pools(device: torch.device) -> dict[Pool, int]:
    """{id: bytes} of the memory pools that CUDA graphs keep for themselves; empty on the CPU."""
    sizes: dict[Pool, int] = {}
    if device.type == "cuda":
        for segment in torch.cuda.memory_snapshot():
            pool = tuple(segment["segment_pool_id"])
            if segment["device"] == (device.index or 0) and pool != (0, 0):
                sizes[pool] = sizes.get(pool, 0) + segment["total_size"]
    return sizes


def peak_bytes(call: Call, device: torch.device, pools: Collection[Pool] = ()) -> int:
    """Most bytes of tensors that a call holds at once, beyond those before it. Its results count.

    pools: ids of the private pools that belong to the call. A replay allocates nothing, but needs its whole pool.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        replayed = sum(size for pool, size in private_pools(device).items() if pool in pools)
        return torch.cuda.max_memory_allocated(device) - before + replayed
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler warns that it drops events of earlier cycles; there is one cycle
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            kept = call()
    del kept
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
