"""The targets of the project, and how far the stored results are from them.

A target reads one number from the problems it fits: the worst speed-up over a provider, share of the limit, memory or
overhead. If there is no result of its device, it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .tables import UNMEASURED

Problem = Mapping[str, Any]
NORM = {"op": "gated_residual_norm", "dtype": "bfloat16"}


@dataclass(frozen=True)
class Target:
    """`measure` gives the number of one problem (None: not part of it); `most` says that it must not exceed `wanted`.

    least_rows, widths: the sizes for which the target holds; other problems are no evidence.
    """

    device: str  # "cpu" or "cuda"
    work: str
    claim: str
    case: str
    wanted: float
    measure: Callable[[Problem], float | None]
    match: Mapping[str, Any] = field(default_factory=dict)
    least_rows: int = 0
    widths: tuple[int, int] | None = None
    most: bool = False

    def fits(self, problem: Problem) -> bool:
        params = problem["params"]
        return (
            problem["case"] == self.case
            and all(params.get(name) == value for name, value in self.match.items())
            and params.get("rows", self.least_rows) >= self.least_rows
            and (self.widths is None or self.widths[0] <= params["width"] <= self.widths[1])
            and params.get("norm", "layer") == self.match.get("norm", "layer")
        )

    def verdict(self, results: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
        """(measured, "met" or "not met") by the worst fitting problem of the device's results."""
        values = [
            value
            for result in results
            if result["environment"]["device_type"] == self.device
            for problem in result["problems"]
            if self.fits(problem) and problem["gate"]["passed"] and (value := self.measure(problem)) is not None
        ]
        if not values:
            return UNMEASURED, ""
        worst = max(values) if self.most else min(values)
        met = worst <= self.wanted if self.most else worst >= self.wanted
        return f"{worst:.3g}", "met" if met else "not met"


def ours(problem: Problem) -> Mapping[str, Any]:
    return next(row for row in problem["rows"] if row["role"] == "ours")


def _row(problem: Problem, provider: str) -> Mapping[str, Any] | None:
    """The provider's row. Its name may go on after a comma with its dtype."""
    names = (provider, f"{provider}, float32")
    return next((row for row in problem["rows"] if row["provider"] in names and row["median_us"]), None)


def over(provider: str) -> Callable[[Problem], float | None]:
    """Speed-up of ours over a provider."""

    def measure(problem: Problem) -> float | None:
        row = _row(problem, provider)
        return None if row is None else row["speedup"]

    return measure


def share(problem: Problem) -> float | None:
    """Share of the measured matmul rate, or of the rate of a copy of the same bytes."""
    return ours(problem)["roofline_share"]


def memory_of(provider: str) -> Callable[[Problem], float | None]:
    """Peak memory of ours relative to a provider's."""

    def measure(problem: Problem) -> float | None:
        row, ours_bytes = _row(problem, provider), ours(problem)["peak_bytes"]
        return (
            ours_bytes / row["peak_bytes"] if row is not None and ours_bytes is not None and row["peak_bytes"] else None
        )

    return measure


def error(problem: Problem) -> float | None:
    return ours(problem)["error"]


_FORWARD, _BACKWARD = NORM | {"mode": "forward"}, NORM | {"mode": "backward"}
_LOSS = {"part": "op", "mode": "both", "rows": 65536}
_STEP = {"preset": "paper", "align": "on"}
# If 25 MB move in 8 us, launch and tail take a tenth. So the shares are for work of tens of microseconds.
_RESIDUAL, _WIDTHS = "gated_residual_norm, bf16, rows >= 8k, width 384 to 1536", (384, 1536)
_LARGE, _LARGE_ROWS = "gated_residual_norm, bf16, rows >= 32k, width 384 to 1536", 32768
_PAPER, _COMPACT = "FoG-A, 24 x 1024, T 938", "FoG-A, 12 x 384, T 256, B 4"

TARGETS = (
    Target(
        "cuda",
        f"{_LARGE}, forward",
        "share of a copy's rate >= 0.9",
        "residual",
        0.9,
        share,
        _FORWARD,
        _LARGE_ROWS,
        _WIDTHS,
    ),
    Target(
        "cuda",
        f"{_LARGE}, backward",
        "share of a copy's rate >= 0.8",
        "residual",
        0.8,
        share,
        _BACKWARD,
        _LARGE_ROWS,
        _WIDTHS,
    ),
    Target(
        "cuda", f"{_RESIDUAL}, forward", ">= 1x compiled", "residual", 1.0, over("compiled"), _FORWARD, 8192, _WIDTHS
    ),
    Target(
        "cuda",
        f"{_RESIDUAL}, backward",
        ">= 1.3x compiled",
        "residual",
        1.3,
        over("compiled"),
        _BACKWARD,
        8192,
        _WIDTHS,
    ),
    Target("cuda", _PAPER, ">= 20x the released loop (float32)", "foga", 20, over("released loop"), {"scale": "paper"}),
    Target(
        "cuda",
        _PAPER,
        ">= 2.2x a compiled bf16 SDPA loop",
        "foga",
        2.2,
        over("compiled loop, bfloat16 model"),
        {"scale": "paper"},
    ),
    Target("cuda", _PAPER, "share of matmul rate >= 0.65", "foga", 0.65, share, {"scale": "paper"}),
    Target("cuda", _COMPACT, ">= 15x an eager loop", "foga", 15, over("SDPA loop"), {"scale": "compact"}),
    Target(
        "cuda",
        _COMPACT,
        ">= 3x a compiled, graphed loop",
        "foga",
        3,
        over("compiled loop, graphed"),
        {"scale": "compact"},
    ),
    Target(
        "cuda",
        "projection_cosine_loss, 65,536 rows",
        ">= 1.2x vectorised, compiled",
        "alignment",
        1.2,
        over("vectorised, compiled"),
        _LOSS,
    ),
    Target(
        "cuda",
        "projection_cosine_loss, 65,536 rows",
        "peak memory <= 1/4 of it",
        "alignment",
        0.25,
        memory_of("vectorised, compiled"),
        _LOSS,
        most=True,
    ),
    Target(
        "cuda",
        "projection_cosine_loss, 65,536 rows",
        ">= 20x the per-sample loop",
        "alignment",
        20,
        over("per-sample loop"),
        _LOSS,
    ),
    Target(
        "cuda",
        "Training step, 24 x 1024",
        ">= 10x the released form (float32)",
        "train_step",
        10,
        over("released form"),
        _STEP,
    ),
    Target(
        "cuda",
        "Training step, 24 x 1024",
        ">= 1.2x plain torch.compile",
        "train_step",
        1.2,
        over("SDPA form, compiled"),
        _STEP,
    ),
    *(
        Target(
            "cpu",
            f"Training step, small preset, float32, clips of {lengths} length",
            ">= 1.3x the straightforward form",
            "trainer",
            1.3,
            over("straightforward"),
            {"preset": "small", "lengths": lengths},
        )
        for lengths in ("mixed", "equal")
    ),
    *(
        Target(
            "cpu",
            f"FoG-A at {layers} layers, float32",
            f">= {wanted}x an SDPA loop",
            "foga",
            wanted,
            over("SDPA loop"),
            {"layers": layers},
        )
        for layers, wanted in ((12, 1.85), (24, 1.92))
    ),
    Target(
        "cpu",
        "FoG-A at 12 layers, float32",
        ">= 2.3x the released loop",
        "foga",
        2.3,
        over("released loop"),
        {"layers": 12},
    ),
    Target(
        "cpu",
        "FoG-A at 12 layers, float32",
        "within 1e-5 of the loop, relative",
        "foga",
        1e-5,
        error,
        {"layers": 12},
        most=True,
    ),
)


def shares_of_step(results: Iterable[Mapping[str, Any]], device: str) -> list[tuple[str, str, str, str]]:
    """The overheads of a training step, alignment's and a probe's: (work, target, measured, met)."""
    steps: dict[str, float] = {}
    probes: list[float] = []
    for result in results:
        if result["environment"]["device_type"] != device:
            continue
        for problem in result["problems"]:
            params, median = problem["params"], ours(problem)["median_us"]
            if median is None:
                continue
            if problem["case"] == "train_step" and params["preset"] == "paper":
                steps[params["align"]] = median
            if problem["case"] == "foga" and params["scale"] == "paper":
                probes.append(median)
    aligned = steps["on"] / steps["off"] - 1 if {"on", "off"} <= steps.keys() else None
    probing = max(probes) / (1000 * steps["on"]) if probes and "on" in steps else None
    work = "Training step, 24 x 1024"
    return [
        (work, "alignment adds <= 2 %", *_share(aligned, 0.02)),
        (work, "a probe every 1,000 steps <= 0.5 %", *_share(probing, 0.005)),
    ]


def _share(value: float | None, wanted: float) -> tuple[str, str]:
    return (UNMEASURED, "") if value is None else (f"{value:.2%}", "met" if value <= wanted else "not met")
