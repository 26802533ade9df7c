"""A teacher's extracted features of crops, as the loader's workers read them: frames [F, W], batches [B, F, W].

Features that are stored as int8 stay int8, with a scale for each frame; the device converts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .clip import Clip


class Frames(NamedTuple):
    """Consecutive feature frames of one clip."""

    values: Tensor  # [F, W] floating, or int8
    scale: Tensor | None  # [F] float32 with int8 values: a frame stands for values * scale
    first: int  # index in the clip of the first frame of `values`


class FeatureSource(Protocol):
    """Where the extracted features of one teacher are read from.

    Attributes:
        width: channels of a frame. rate: frames per second; 0 where a clip has one pooled vector.
    """

    width: int
    rate: float

    def read(self, clip: Clip, sound: int | None, start: float, seconds: float) -> Frames | None:
        """The features of `seconds` of a clip from `start` on, with one frame more at each end for interpolation.

        sound: the digest of the clip's sound, where known. None: the teacher does not speak for the clip's domain.

        Raises:
            UserError: the clip has no features, or they cannot be read.
        """
        ...


@dataclass(frozen=True)
class FeatureBatch:
    """The features of a batch's crops, padded to one number of frames."""

    values: Tensor  # [B, F, W] floating, or int8
    scale: Tensor | None  # [B, F] float32 with int8 values
    counts: Tensor  # [B] int64, frames of each sample; the rest is padding
    first: Tensor  # [B] int64, index in its clip of a sample's first frame
    covered: Tensor  # [B] bool, False where the teacher does not speak for the clip

    def dequantised(self) -> Tensor:
        """[B, F, W] float32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale.unsqueeze(-1)


def window(start: float, seconds: float, rate: float) -> tuple[int, int]:
    """The frames of a clip (first, end) that its crop needs, with neighbours for interpolation."""
    # Rounding may move a start on the edge of a frame to either side, so both neighbours are read.
    return max(0, math.floor(start * rate - 1e-6) - 1), math.floor((start + seconds) * rate + 1e-6) + 2


def most_frames(seconds: float, rate: float) -> int:
    """The most frames that `window` asks for in crops of at most so many seconds; 1 where features are pooled."""
    return math.ceil(seconds * rate) + 4 if rate else 1


def collate_features(rows: Sequence[Frames | None], source: FeatureSource, seconds: float) -> FeatureBatch:
    """The features of samples of at most `seconds`; their number of frames depends on `seconds` alone."""
    present = [row for row in rows if row is not None]
    quantised = any(row.scale is not None for row in present)
    dtype = present[0].values.dtype if present else torch.float32
    if any(row.values.dtype != dtype for row in present):
        # Files beside the audio may differ in their form.
        dtype, quantised = torch.float32, False
    length = max([most_frames(seconds, source.rate), *(len(row.values) for row in present)])
    values = torch.zeros(len(rows), length, source.width, dtype=dtype)
    scale = torch.zeros(len(rows), length) if quantised else None
    for number, row in enumerate(rows):
        if row is None:
            continue
        part = row.values
        if scale is not None and row.scale is not None:
            scale[number, : len(part)] = row.scale
        elif row.scale is not None:
            part = part.float() * row.scale.unsqueeze(-1)
        values[number, : len(part)] = part
    return FeatureBatch(
        values,
        scale,
        counts=torch.tensor([0 if row is None else len(row.values) for row in rows]),
        first=torch.tensor([0 if row is None else row.first for row in rows]),
        covered=torch.tensor([row is not None for row in rows]),
    )
