"""Teacher features beside the audio: `clip.wav` -> `clip.<name>.safetensors`, pooled [W] or frame by frame [T, W].

The header of a file holds a key: how the features were made. Features with another key are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.clip import Clip
from ..data.features import Frames, window
from ..errors import UserError

FORMAT = "agrepa-fast features 1"


@dataclass(frozen=True)
class FeatureKey:
    """Everything that decides a teacher's features of a sound.

    Attributes:
        teacher: registered name, folder or hub name.
        revision: revision of its weights; "" if it has none.
        layer: index of the hidden state; "" for the teacher's own output.
        preprocessing: anything else that changes the features, such as the resampler.
        rate: feature frames per second; 0 for one pooled vector a clip.
    """

    teacher: str
    revision: str = ""
    layer: str = ""
    preprocessing: str = ""
    rate: float = 0.0


def feature_path(audio: str | Path, name: str) -> Path:
    """The file of a sound's features, beside the sound. `name` is the teacher's name in the run."""
    audio = Path(audio)
    return audio.with_name(f"{audio.stem}.{name}.safetensors")


def write_features(path: str | Path, features: Tensor, key: FeatureKey, *, int8: bool = False) -> None:
    """Write the features of one clip, in their own dtype, or as int8 with a float32 scale for each frame.

    features: [W] if key.rate is 0, else [T, W]; floating and finite.

    Raises:
        ValueError: features that do not fit the key. UserError: the file cannot be written.
    """
    if features.dim() != (2 if key.rate else 1) or 0 in features.shape or not features.is_floating_point():
        form = "[frames, width]" if key.rate else "[width]"
        raise ValueError(f"features: expected floating {form}, got {features.dtype} {list(features.shape)}")
    features = features.detach().cpu().contiguous()
    if not features.isfinite().all():
        raise ValueError("features: not finite")
    tensors = {"features": features}
    if int8:
        values, scale = quantise(features)
        tensors = {"features": values, "scale": scale}
    library = import_safetensors()
    try:
        library.torch.save_file(tensors, str(path), {"format": FORMAT, "key": json.dumps(asdict(key))})
    except (OSError, library.SafetensorError) as error:
        raise UserError(f"{path}: {error}") from error


def read_features(path: str | Path, key: FeatureKey) -> tuple[Tensor, Tensor | None]:
    """The features of one clip as they were written, and the scale [T] (pooled: []) of int8 ones, else None.

    Raises:
        UserError: no such file, no feature file, or one with another key; names the file and the difference.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no cached features here; extract them, or use the teacher itself")
    library = import_safetensors()
    try:
        with library.safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        written = json.loads(header["key"])
        if header.get("format") != FORMAT:
            raise KeyError("format")
        features = tensors["features"]
    except (OSError, KeyError, ValueError, library.SafetensorError) as error:
        raise UserError(f"{path}: not a feature file ({error})") from None
    for name, wanted in asdict(key).items():
        if written.get(name) != wanted:
            raise UserError(
                f"{path}: made with {name} {written.get(name)!r}, this run has {wanted!r}: extract the features again"
            )
    scale = tensors.get("scale")
    if features.dim() != (2 if key.rate else 1) or (features.dtype == torch.int8) != (scale is not None):
        raise UserError(f"{path}: not a feature file (features {features.dtype} {list(features.shape)})")
    if scale is not None and scale.shape != features.shape[:-1]:
        raise UserError(f"{path}: not a feature file (scale {list(scale.shape)} for {list(features.shape)})")
    if not (features if scale is None else scale).isfinite().all():
        raise UserError(f"{path}: holds features that are not finite: extract them again")
    return features, scale


class FilesBesideAudio:
    """A `data.features.FeatureSource`: features from one file beside each sound file.

    The first clip's file gives the width and the rate; all files must have the same key.

    Args:
        name: the teacher's name in the run, part of the files' names.
        key: what this run expects; its rate is taken from the first file.
        first: a clip's sound file.
        domains: the domains that the teacher speaks for; empty: all.
    """

    def __init__(self, name: str, key: FeatureKey, first: Path, domains: Sequence[str] = ()) -> None:
        path = feature_path(first, name)
        self.name = name
        self.rate = _header_rate(path)
        self.key = replace(key, rate=self.rate)
        self.width = read_features(path, self.key)[0].shape[-1]
        self.domains = frozenset(domains)

    def read(self, clip: Clip, sound: int | None, start: float, seconds: float) -> Frames | None:
        """See `FeatureSource.read`."""
        if self.domains and clip.domain not in self.domains:
            return None
        path = feature_path(clip.path, self.name)
        values, scale = read_features(path, self.key)
        if values.shape[-1] != self.width:
            raise UserError(f"{path}: features of width {values.shape[-1]}, the other clips' have {self.width}")
        if not self.rate:
            return Frames(values.unsqueeze(0), None if scale is None else scale.view(1), 0)
        first, stop = window(start, seconds, self.rate)
        return Frames(values[first:stop], None if scale is None else scale[first:stop], first)


def _header_rate(path: Path) -> float:
    if not path.is_file():
        raise UserError(f"{path}: no cached features here; extract them, or use the teacher itself")
    library = import_safetensors()
    try:
        with library.safe_open(str(path), "pt") as file:
            return float(json.loads((file.metadata() or {})["key"])["rate"])
    except (OSError, KeyError, ValueError, TypeError, library.SafetensorError) as error:
        raise UserError(f"{path}: not a feature file ({error})") from None


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., W] and float32 scales [...] of finite features [..., W]: each frame's largest channel becomes 127."""
    wide = features.float()
    scale = wide.abs().amax(-1) / 127
    steps = wide / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return steps.round().to(torch.int8), scale.clone()


def dequantise(features: Tensor, scale: Tensor | None) -> Tensor:
    """The result of `read_features` as float32: features [..., W], scale [...] or None."""
    return features.float() if scale is None else features.float() * scale.unsqueeze(-1)


def import_safetensors() -> Any:
    """safetensors, imported on first use. UserError when it is missing."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UserError("cached features need safetensors: pip install 'agrepa-fast[train]'") from error
    return safetensors
