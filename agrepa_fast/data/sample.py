"""`Sample`: the tensors of one clip; `TokenSource`: reads the extracted tokens of a clip."""

from __future__ import annotations

from typing import Protocol, TypedDict

from torch import Tensor

from .clip import Clip
from .features import Frames


class Sample(TypedDict):
    """One clip's crop. T is the crop's own length, not the bucket's."""

    mel: Tensor  # [T, M] float32, or normalised latents
    prompt: int  # frames of the reference prefix
    tokens: Tensor  # [S, K] int64
    vocabulary: int
    audio: Tensor  # [n] float32
    clip: Clip
    index: int
    start: int  # of the crop, in mel frames of the clip
    features: dict[str, Frames | None]  # {teacher: extracted features of the crop}, for each of the set's sources


class TokenSource(Protocol):
    """Where extracted tokens of clips are read from."""

    def read(self, clip: Clip, sound: int | None) -> Tensor:
        """[S, K] int64; `sound` is the digest of the clip's sound. UserError: the clip has none."""
        ...
