"""Order, statistics, the noise floor and the timers, on clocks and work whose times are known."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
import torch

from agrepa_fast.bench.protocol import (
    Effort,
    Timing,
    difference,
    host_seconds,
    launches,
    measure_cpu,
    noise_floor,
    order,
    peak_bytes,
    verdict,
)

CPU = torch.device("cpu")


class Clock:
    """A clock that only the calls move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_order_favours_nobody(count: int) -> None:
    names = [str(i) for i in range(count)]
    rounds = [order(names, number) for number in range(2 * count)]
    for place in range(count):
        assert sorted(r[place] for r in rounds) == sorted(2 * names)
    for a, b in itertools.permutations(names, 2):
        before = sum(r.index(a) < r.index(b) for r in rounds)
        assert before == count, (a, b)


def test_order_keeps_every_variant_once() -> None:
    assert order(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert order(["a", "b", "c"], 1) == ["c", "b", "a"]
    assert order(["a", "b", "c"], 2) == ["b", "c", "a"]
    assert order(["a", "b", "c"], 3) == ["a", "c", "b"]


def test_median_and_percentiles() -> None:
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0, 10.0), 1, "perf_counter")
    assert timing.median == 3.5
    assert timing.percentile(0.2) == 2.0  # place 1 of 0..5
    assert timing.percentile(0.8) == 5.0
    assert timing.percentile(0.5) == 3.5
    assert Timing((7.0,), 1, "events").percentile(0.8) == 7.0


def test_measure_gives_each_variant_its_own_time() -> None:
    clock = Clock()
    timings = measure_cpu(
        {"short": lambda: clock.work(1e-5), "long": lambda: clock.work(0.5)}, Effort(10.0, 5, 12), clock
    )
    assert timings["short"].calls == 200  # 2 ms of 10 us calls
    assert timings["long"].calls == 1
    assert timings["short"].median == pytest.approx(1e-5)
    assert timings["long"].median == pytest.approx(0.5)
    assert len(timings["long"].samples) == 12  # 10 s / 0.502 s are 19 rounds, 12 at most


def test_rounds_are_bounded() -> None:
    effort = Effort(1.0, 5, 60)
    assert effort.rounds(10.0) == 5
    assert effort.rounds(1e-3) == 60
    assert effort.rounds(0.1) == 10


def test_drift_hits_all_variants_alike() -> None:
    """The machine slows down steadily; equal work must come out equal within a per cent."""
    clock = Clock()

    def work() -> None:
        clock.work(0.01 * (1 + clock.now / 10))

    timings = measure_cpu({"a": work, "b": work, "c": work}, Effort(0.0, 12, 12), clock)
    first, last = timings["a"].samples[0], timings["a"].samples[-1]
    assert last > 1.03 * first
    assert difference(timings["a"], timings["b"]) < 0.01
    assert difference(timings["a"], timings["c"]) < 0.01


def test_noise_floor_of_equal_samples_is_the_least() -> None:
    timing = Timing((1.0,) * 10, 1, "perf_counter")
    assert noise_floor(timing, timing) == 0.01


def test_noise_floor_is_at_least_the_difference() -> None:
    first, second = Timing((1.0,) * 10, 1, "events"), Timing((1.2,) * 10, 1, "events")
    assert noise_floor(first, second) == pytest.approx(0.2)
    assert noise_floor(second, first) == pytest.approx(0.2)


def test_noise_floor_covers_the_next_run() -> None:
    """Two A/A runs of the same noisy work differ by less than the floor printed (3 standard errors)."""
    draw = random.Random(0)

    def run() -> Timing:
        return Timing(tuple(math.exp(draw.gauss(0, 0.1)) for _ in range(25)), 1, "perf_counter")

    kept = sum(difference(run(), run()) < noise_floor(run(), run()) for _ in range(300))
    assert kept >= 285
    # And it is no blanket: a difference of 20 % is told from the noise of 10 %.
    assert sum(noise_floor(run(), run()) < 0.2 for _ in range(300)) >= 270


def test_two_real_runs_differ_by_less_than_the_floor() -> None:
    def work() -> None:
        time.sleep(0.004)

    first, second = (measure_cpu({"a": work, "again": work}, Effort(0.15, 5, 10)) for _ in range(2))
    floor = max(noise_floor(r["a"], r["again"]) for r in (first, second))
    assert difference(first["a"], second["a"]) <= max(floor, 0.05)
    assert 0.004 <= first["a"].median < 0.02


@pytest.mark.parametrize(
    ("speedup", "word"), [(1.06, "win"), (1.05, "tie"), (1.0, "tie"), (0.96, "tie"), (0.95, "loss"), (0.5, "loss")]
)
def test_verdict(speedup: float, word: str) -> None:
    assert verdict(speedup, 0.05) == word


def test_peak_memory_is_the_most_held_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(1000, 250)  # 1 MB each
        b = a + 1
        c = a + b
        del a, b
        return c + torch.ones(1000, 250)

    # a, b, c at once, then c, the last ones and the sum.
    assert peak_bytes(call, CPU) == 3_000_000


def test_device_columns_are_empty_on_the_cpu() -> None:
    assert launches(lambda: None, CPU) is None
    assert host_seconds(lambda: None, CPU, 5) is None
