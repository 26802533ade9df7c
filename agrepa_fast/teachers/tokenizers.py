"""Speech and audio tokenizers, as teachers whose features are whole numbers: audio [B, n] -> tokens [B, S, 1]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data.clip import Clip
from ..errors import UserError
from .base import Teacher
from .beats import BeatsTokens
from .store import Store

S3_VERSIONS = {"v3": 25.0, "v2": 25.0, "v1": 50.0}  # tokens a second, by what the name of the model's file holds


class S3Tokens(Teacher):
    """The S3 tokenizers of CosyVoice, by the package s3tokenizer, from a local ONNX file.

    Args:
        model: path of the file. Its name must say the version, as published: speech_tokenizer_v2.onnx.

    Raises:
        UserError: no such file, no known version in its name, or the package is not installed.
    """

    def __init__(self, model: str) -> None:
        version = next((version for version in S3_VERSIONS if version in Path(model).name), None)
        if version is None:
            raise UserError(f"tokenizer {model!r}: the file's name must hold v1, v2 or v3: speech_tokenizer_v2.onnx")
        if not Path(model).is_file():
            raise UserError(f"tokenizer {model!r}: no such file")
        # An hour at once: the package has its own way to go through long recordings.
        super().__init__(model, width=1, rate=S3_VERSIONS[version], sample_rate=16_000, longest=3600.0)
        try:
            import s3tokenizer
        except ImportError as error:
            raise UserError("S3 tokens need s3tokenizer: pip install 'agrepa-fast[tokens]'") from error
        self.package = s3tokenizer
        try:
            self.model = s3tokenizer.load_model(model)
        except Exception as error:
            # A file that is not the model fails anywhere in the package's reading of ONNX.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"tokenizer {model!r}: not an S3 tokenizer ({reason})") from error
        self.freeze()

    def encode(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `Teacher.encode`."""
        clips = [clip[:length] for clip, length in zip(audio, lengths.tolist())]
        mels, counts = self.package.padding([self.package.log_mel_spectrogram(clip) for clip in clips])
        tokens, counts = self.model.quantize(mels.to(audio.device), counts.to(audio.device))
        mask = torch.arange(tokens.shape[1], device=audio.device) < counts.unsqueeze(1)
        return tokens.unsqueeze(-1).float(), mask


TOKENIZERS: dict[str, Callable[[str], Teacher]] = {"s3": S3Tokens, "beats": BeatsTokens}


def split_source(source: str) -> tuple[str, str]:
    """The tokenizer and the file of "s3:FILE". UserError where the tokenizer is unknown or there is no file."""
    name, _, file = source.partition(":")
    if name not in TOKENIZERS or not file:
        raise UserError(f"expected {' or '.join(f'{known}:FILE' for known in TOKENIZERS)}, got {source!r}")
    return name, str(Path(file).expanduser())


def build_tokenizer(source: str) -> Teacher:
    """The tokenizer of "s3:FILE" or "beats:FILE". UserError where it cannot be built."""
    name, file = split_source(source)
    return TOKENIZERS[name](file).freeze()


class StoredTokens:
    """A `data.dataset.TokenSource`: tokens that were extracted into a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, clip: Clip, sound: int | None) -> Tensor:
        """[S, K] int64. UserError: the clip has none."""
        if sound is None:
            raise ValueError(f"{clip.path}: tokens are found by the digest of the sound, which is not known")
        try:
            return self.store.read(sound)[0].long()
        except UserError as error:
            raise UserError(f"{clip.path}: no tokens: {error}") from error
