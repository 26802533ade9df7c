"""Speaker similarity: the cosine between embeddings of a clip and of its reference recording."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .callables import is_function_name, load_function, model_error
from .metric import Metric, packages
from .recognisers import as_numpy
from .recordings import Recording

Embed = Callable[[Any, int], Any]  # (waveform [S] float32, sample rate) -> vector [d]


class SpeakerSimilarity(Metric):
    """Mean cosine to the reference recording of each clip."""

    key = "speaker"
    title = "Speaker similarity"
    columns = {"cosine": "higher"}  # noqa: RUF012
    spoken = paired = True
    note = (
        "Cosine between the embeddings of a clip and of its reference recording. A model that is shown no prompt "
        "(--prompt) does not know the speaker."
    )

    def __init__(self, tool: str, embed: Embed) -> None:
        self.tool = tool
        self._embed = embed

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        """[1], the cosine."""
        assert reference is not None
        a, b = self._vector(waveform), self._vector(reference)
        if a.shape != b.shape:
            raise UserError(f"{self.tool}: embeddings of {a.numel()} and {b.numel()} numbers cannot be compared")
        return (a @ b / (a.norm() * b.norm())).reshape(1)

    def _vector(self, waveform: Tensor) -> Tensor:
        try:
            vector = torch.as_tensor(np.asarray(self._embed(as_numpy(waveform), self.sample_rate), dtype=np.float64))
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.tool}: expected a vector of numbers") from error
        vector = vector.reshape(-1)
        if not vector.numel() or not vector.isfinite().all() or not vector.norm() > 0:
            raise UserError(f"{self.tool}: the embedding is empty, zero, or not finite")
        return vector


def _resemblyzer() -> SpeakerSimilarity:
    from importlib.metadata import version

    with packages("speaker", "the speaker embedding resemblyzer"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it and what it imports use names that will go
        import resemblyzer
    with model_error("--speaker", "resemblyzer"):
        encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)

    def embed(waveform: Any, sample_rate: int) -> Any:
        voice = resemblyzer.preprocess_wav(waveform) if np.abs(waveform).max() > 0 else waveform[:0]
        if not len(voice):
            raise UserError("no voice is detected in the clip or in its reference")
        return encoder.embed_utterance(voice)

    return SpeakerSimilarity(f"Resemblyzer {version('resemblyzer')}", embed)


def _xvector(source: str, device: torch.device) -> SpeakerSimilarity:
    """A transformers model with an x-vector head (WavLM-SV and its kin), by folder or hub name."""
    with packages("teachers", f"the speaker embedding {source}"):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector
    with model_error("--speaker", source):
        extractor = AutoFeatureExtractor.from_pretrained(source)
        model, report = AutoModelForAudioXVector.from_pretrained(source, use_safetensors=True, output_loading_info=True)
        if report["missing_keys"]:
            # transformers fills them with random numbers.
            raise ValueError(f"the file lacks {sorted(report['missing_keys'])[0]!r}: not a model of speakers")
    model = model.eval().to(device)

    @torch.no_grad()
    def embed(waveform: Any, sample_rate: int) -> Any:
        inputs = extractor(waveform, sampling_rate=sample_rate, return_tensors="pt")
        try:
            return model(**inputs.to(device)).embeddings[0].cpu().numpy()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{source} fails on the clip ({str(error).strip().partition(chr(10))[0]})") from error

    return SpeakerSimilarity(f"transformers model {source}", embed)


def build_speaker(name: str, device: torch.device) -> SpeakerSimilarity:
    """ "resemblyzer", module:function, or the name or folder of a transformers model with an x-vector head.

    Raises:
        MissingPackage: its package is not installed.
        UserError: no such model or function."""
    if name == "resemblyzer":
        return _resemblyzer()
    if is_function_name(name):
        return SpeakerSimilarity(name, load_function(name, "--speaker"))
    return _xvector(name, device)
