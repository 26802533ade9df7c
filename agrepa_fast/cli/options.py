"""Types of options: each turns a word of the command line into a value, or says what was expected."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..fields import shown


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {shown(text)}")
    return value


def seed(text: str) -> int:
    """A seed that torch takes."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**63 - 1}, got {shown(text)}")
    return value


def overrides(options: dict[str, Any]) -> list[str]:
    """{"probe.k": 3, "probe.metric": None} -> ["probe.k=3"]: the configuration's fields that options have set."""
    return [f"{field}={value}" for field, value in options.items() if value is not None]
