"""The one interface of all metrics: measure a clip, then estimate a number from the measurements of many clips.

A metric that cannot measure a clip raises UserError with the reason; the clip is left out and the table says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import UserError
from .bootstrap import Estimate, ratio, ratio_difference
from .recordings import Recording


class MissingPackage(UserError):
    """A metric's package is not installed. The command reports the other metrics; the message names the extra."""


@contextmanager
def packages(extra: str, metric: str) -> Iterator[None]:
    """Turn a failed import into MissingPackage, which names the package and the extra that installs it."""
    try:
        yield
    except (ImportError, OSError) as error:
        # OSError: the package is there, a shared library that it needs is not.
        missing = getattr(error, "name", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingPackage(f"{metric} needs {missing}: pip install 'agrepa-fast[{extra}]'") from error


class Metric:
    """A metric. This class gives the mean over clips; a subclass overrides `measure`, and what else differs.

    Attributes:
        key: its name in the JSON file.
        title: the heading of its table.
        tool: what measures it, with version or path.
        note: what a reader must know to read the numbers; "" for nothing.
        columns: names of the numbers, each with "lower" or "higher": which is better.
        spoken: it is about speech, and measures only the clips of the domains of speech.
        of_sets: the set is compared with the set of reference recordings, clips need no partners.
        paired: each clip is compared with its own reference recording.
        needs_text: it compares with what the clip's text says.
        sample_rate: Hz of the waveforms that `measure` receives.
        whole: it hears the prompt, too.
    """

    key: str
    title: str
    tool: str
    note: str = ""
    columns: dict[str, str]
    spoken: bool = False
    of_sets: bool = False
    paired: bool = False
    needs_text: bool = False
    whole: bool = False
    sample_rate: int = 16_000

    def prepare(self, texts: list[str]) -> None:
        """Hear about all texts of the reference before the first clip is measured."""

    def fingerprint(self) -> str | None:
        """Digest of whatever decides what `measure` returns; with one, the measurements of a reference are cached."""
        return None

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        """What one clip contributes, [C] of one number for each column (or another shape that `terms` knows).

        Args:
            waveform: [S] float32 at `sample_rate`.
            reference: the clip's reference recording at `sample_rate`; only for a paired metric.

        Raises:
            UserError: the clip cannot be measured, and why.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define measure(waveform, clip, reference)")

    def terms(self, measured: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Numerators and denominators [N], whose sums' ratio is the number of a column. By default: the mean."""
        return measured[:, column], torch.ones(measured.shape[0], dtype=torch.float64)

    def estimate(self, measured: Tensor, reference: Tensor | None, seed: int) -> tuple[dict[str, Estimate], str]:
        """The numbers of a set of clips by column, and a note about them ("" for none).

        Args:
            measured: [N, ...] float64, one row for each clip of the set.
            reference: the same of the reference recordings, or None where there are none.
        """
        return {name: ratio(*self.terms(measured, i), seed) for i, name in enumerate(self.columns)}, ""

    def difference(self, measured: Tensor, other: Tensor, seed: int) -> dict[str, Estimate]:
        """`measured` less `other`, two sets [N, ...] of the same clips in the same order; empty where it has none."""
        return {
            name: ratio_difference(self.terms(measured, i), self.terms(other, i), seed)
            for i, name in enumerate(self.columns)
        }
