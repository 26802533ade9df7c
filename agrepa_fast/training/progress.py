"""The progress bar of a run."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
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
