"""The progress bars of a run and of an extraction."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import UserError
from .distributed import rank


def progress_bar(start: int, total: int) -> Any:
    """tqdm's bar of the steps on stderr; only rank 0 shows one, and only on a terminal.

    Raises:
        UserError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError("tqdm is not installed: pip install 'agrepa-fast[train]'") from error
    return tqdm(
        initial=start,
        total=total,
        unit="step",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=1.0,
        disable=True if rank() else None,
    )


def show(bar: Any, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
    """Write the loss, the mean cosine (where there is one) and the rates behind the bar."""
    cosines = [value for name, value in metrics.items() if name.startswith("cosine/")]
    parts = {"loss": f"{metrics.get('loss', math.nan):.3f}"}
    if cosines:
        parts["cos"] = f"{sum(cosines) / len(cosines):.3f}"
    bar.set_postfix(parts | {"samples/s": f"{rates['samples_per_second']:.1f}", "mfu": f"{rates['mfu']:.0%}"})


@contextmanager
def hours_bar(total: float) -> Iterator[Callable[[float], object]]:
    """A bar of hours of sound on stderr, with hours per hour and the time left; yields what takes seconds done.

    total: seconds of sound. Without a terminal there is no bar.

    Raises:
        UserError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError("tqdm is not installed: pip install 'agrepa-fast[train]'") from error
    form = "{percentage:3.0f}%|{bar}| {n:.2f} of {total:.2f} h [{elapsed}, {remaining} left{postfix}]"
    began = time.monotonic()
    with tqdm(total=total / 3600, bar_format=form, file=sys.stderr, dynamic_ncols=True, disable=None) as bar:

        def advance(seconds: float) -> None:
            bar.update(seconds / 3600)
            bar.set_postfix_str(f"{bar.n * 3600 / max(time.monotonic() - began, 1e-9):.0f} hours per hour")

        yield advance
