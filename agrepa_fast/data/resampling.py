"""Resample mono sound [S] by a windowed sinc, in blocks, so that a part of a file has the bits that the whole file has.

A convolution's bits may depend on the length of its input. So a sound is cut into blocks at fixed places, and each
block is resampled alone, with enough samples on both sides: a part is made of the same blocks as the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from .libraries import import_torchaudio

BLOCK = 1 << 16  # a block has about so many samples before resampling
# Zero crossings on each side and roll-off of torchaudio's filter.
FILTER_WIDTH, ROLLOFF = 6, 0.99


def resampled_length(frames: int, rate: int, sample_rate: int) -> int:
    """Number of samples that resampling makes of `frames`."""
    before, after = _ratio(rate, sample_rate)
    return -(-frames * after // before)


def resample(
    read: Callable[[int, int], Tensor],
    frames: int,
    rate: int,
    sample_rate: int,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Samples start to stop - 1 of a sound at `sample_rate` Hz; by default all.

    A ratio of rates with a denominator above 1000 becomes the nearest one below, which is off by less than one part in
    a million.

    read: gives the samples first to last - 1 of the sound, which has `frames` samples at `rate` Hz; called once.
    """
    before, after = _ratio(rate, sample_rate)
    end = resampled_length(frames, rate, sample_rate)
    stop = end if stop is None else min(stop, end)
    if before == after:
        return read(start, stop)
    convert = import_torchaudio().functional.resample
    groups = max(1, BLOCK // before)  # of `before` samples, in a block
    margin = (math.ceil(FILTER_WIDTH / (ROLLOFF * min(before, after))) + 1) * before
    # Block b is made of samples b * groups * before and on, and gives samples b * groups * after and on.
    blocks = range(start // (groups * after), -(-stop // (groups * after)))
    edges = [(max(0, b * groups * before - margin), min(frames, (b + 1) * groups * before + margin)) for b in blocks]
    origin = edges[0][0]
    sound = read(origin, edges[-1][1])
    parts = []
    for b, (first, last) in zip(blocks, edges):
        converted = convert(sound[first - origin : last - origin], before, after)
        skipped = (b * groups * before - first) // before * after
        parts.append(converted[skipped : skipped + groups * after])
    begin = blocks[0] * groups * after
    return torch.cat(parts)[start - begin : stop - begin]


def _ratio(rate: int, sample_rate: int) -> tuple[int, int]:
    """(before, after): resampling makes `after` samples of `before`; the two have no common factor."""
    ratio = Fraction(sample_rate, rate).limit_denominator(1000)
    return ratio.denominator, ratio.numerator
