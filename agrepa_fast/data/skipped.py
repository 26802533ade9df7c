"""Checking the clips of a data set: those that cannot be used, how many there may be, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from .clip import Clip

T = TypeVar("T")


@dataclass(frozen=True)
class Skipped:
    """A clip that cannot be read, and why."""

    path: Path
    source: str
    reason: str


def check_share(skipped: Sequence[Skipped], total: int, max_share: float, what: str) -> None:
    """UserError when more than `max_share` of `total` clips, or all of them, are skipped; `what` says why."""
    if len(skipped) > max_share * total or len(skipped) == total:
        first = "; ".join(f"{item.path} ({item.source}): {item.reason}" for item in skipped[:3])
        more = ", ..." if len(skipped) > 3 else ""
        raise UserError(f"{len(skipped)} of {total} clips {what}, at most {max_share:.0%} may be: {first}{more}")


def reasons_of(clips: Sequence[Clip], results: Sequence[object]) -> dict[Clip, str]:
    """The results that are errors: why clips cannot be read."""
    return {
        clip: str(result).removeprefix(f"{clip.path}: ")
        for clip, result in zip(clips, results)
        if isinstance(result, UserError)
    }


def bar(results: Iterable[T], total: int) -> Iterable[T]:
    """The results, with a progress bar if they take longer than a second and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=total, desc="checking clips", unit="clip", delay=1.0, leave=False, file=sys.stderr)
