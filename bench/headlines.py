"""The headline problems: those that decide on a GPU what the project is worth, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Headline:
    """The problems of a case with these values of params. After `seconds` none of their rivals is built any more."""

    case: str
    params: Mapping[str, Any]
    seconds: float

    def fits(self, case: str, params: Mapping[str, Any]) -> bool:
        # A problem names its norm only if it is not the default one.
        return (
            case == self.case
            and "norm" not in params
            and all(params.get(name) == value for name, value in self.params.items())
        )


_NORM = {"op": "gated_residual_norm", "rows": 32768, "width": 1024, "dtype": "bfloat16"}

HEADLINES = (
    Headline("foga", {"scale": "paper", "batch": 4}, 70.0),
    Headline("residual", {**_NORM, "mode": "forward"}, 15.0),
    Headline("residual", {**_NORM, "mode": "backward"}, 20.0),
    Headline("alignment", {"part": "op", "mode": "both", "rows": 65536}, 35.0),
    Headline("train_step", {"preset": "paper", "align": "on"}, 80.0),
)


OTHERS = 45.0  # seconds for a problem that is no headline


def seconds_for(case: str, params: Mapping[str, Any], device_type: str) -> float | None:
    """How long the rivals of a problem may be built; None for no limit, as on the CPU."""
    if device_type != "cuda":
        return None
    return next((headline.seconds for headline in HEADLINES if headline.fits(case, params)), OTHERS)


def is_headline(case: str, params: Mapping[str, Any]) -> bool:
    """Whether a problem is one of the headlines."""
    return any(headline.fits(case, params) for headline in HEADLINES)
