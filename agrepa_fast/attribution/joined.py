"""Join scores of several sets of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .scores import LayerScores


def join_scores(parts: Sequence[LayerScores]) -> LayerScores:
    """Join scores of the same units on different samples. Clips of different parts count as different clips.

    Attributes that some part lacks (t, domains, clips, noise) are None.

    Raises:
        ValueError: the parts have different layers, branches or metrics."""
    first = parts[0]
    if any((p.layers, p.branches, p.metric) != (first.layers, first.branches, first.metric) for p in parts):
        raise ValueError("scores: expected the same layers, branches and metric in all parts")

    def together(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        if isinstance(values[0], Tensor):
            return torch.cat(values, dim=-1)
        return tuple(item for value in values for item in value)

    clips: list[int] = []
    for part in parts:
        above = max(clips, default=-1) + 1
        ids = {clip: number for number, clip in enumerate(dict.fromkeys(part.clips or ()), above)}
        clips += [ids[clip] for clip in part.clips or ()]
    per_sample = ("by_sample", "floor_by_sample", "noise_by_sample", "t", "domains")
    known = all(part.clips is not None for part in parts)
    return dataclasses.replace(
        first, **{name: together(name) for name in per_sample}, clips=tuple(clips) if known else None
    )
