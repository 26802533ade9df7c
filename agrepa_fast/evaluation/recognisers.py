"""Speech recognisers for the word error rate: PocketSphinx (offline), any transformers model, or a function.

A recogniser is called with a waveform [S] float32 and its sample rate, and returns text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .callables import is_function_name, load_function, model_error
from .metric import packages

SAMPLE_RATE = 16_000
# A task of few words and short texts, such as digits: the recogniser is told the words, which a general language
# model of sentences would miss.
MOST_WORDS, LONGEST_TEXT = 20, 4


class PocketSphinx:
    """The recogniser whose wheel carries an English model: small, offline, and much weaker than current ones."""

    def __init__(self) -> None:
        from importlib.metadata import version

        with packages("wer", "the recogniser pocketsphinx"):
            import pocketsphinx
        self._make: Callable[..., Any] = pocketsphinx.Decoder
        self.name = f"pocketsphinx {version('pocketsphinx')}, a weak recogniser: read the row of the reference first"
        self._decoder: Any = None

    def prepare(self, texts: Sequence[str]) -> None:
        """Take a grammar of the words of the texts where they are few and short, else the English language model."""
        words = sorted({word for text in texts for word in text.split()})
        longest = max((len(text.split()) for text in texts), default=0)
        self._decoder = self._make(samprate=SAMPLE_RATE, loglevel="FATAL")
        strange = sum(self._decoder.lookup_word(word) is None for word in words)
        if strange:
            self.name += f"; its dictionary lacks {strange} of the {len(words)} different words, which it always misses"
        if not 0 < len(words) <= MOST_WORDS or longest > LONGEST_TEXT:
            return
        if strange:
            return
        word, text = " | ".join(words), " | ".join(" ".join(["<word>"] * n) for n in range(1, longest + 1))
        self._decoder.add_jsgf_string(
            "words", f"#JSGF V1.0;\ngrammar words;\n<word> = {word};\npublic <text> = {text};\n"
        )
        self._decoder.activate_search("words")
        self.name += f"; it is told that a clip has 1 to {longest} of {len(words)} words"

    def __call__(self, waveform: NDArray[np.float32], sample_rate: int) -> str:
        assert sample_rate == SAMPLE_RATE
        # It adapts to what it has heard; without this the result would depend on the order of the clips.
        self._decoder.reinit_feat()
        samples = (np.clip(waveform, -1, 1) * 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), False, True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return "" if hypothesis is None else hypothesis.hypstr


class TransformersRecogniser:
    """A model for automatic speech recognition by its hub name or folder, from safetensors, without foreign code."""

    def __init__(self, source: str, device: torch.device) -> None:
        with packages("teachers", f"the recogniser {source}"):
            from transformers import pipeline
        with model_error("--asr", source):
            self._pipeline: Any = pipeline(
                "automatic-speech-recognition",
                model=source,
                device=device,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        self.name = f"transformers model {source}"

    def prepare(self, texts: Sequence[str]) -> None:
        """Nothing: it knows its language."""

    def __call__(self, waveform: NDArray[np.float32], sample_rate: int) -> str:
        # Whisper refuses more than 30 s unless it marks times.
        long = {"return_timestamps": True} if len(waveform) > 30 * sample_rate and self._whisper else {}
        try:
            return self._pipeline({"raw": waveform, "sampling_rate": sample_rate}, **long)["text"]
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the recogniser fails ({str(error).strip().partition(chr(10))[0]})") from error

    @property
    def _whisper(self) -> bool:
        return self._pipeline.model.config.model_type == "whisper"


class FunctionRecogniser:
    """`module:function` of the user's: function(waveform, sample_rate) -> text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = load_function(name, "--asr")

    def prepare(self, texts: Sequence[str]) -> None:
        """Nothing: the function prepares itself."""

    def __call__(self, waveform: NDArray[np.float32], sample_rate: int) -> str:
        text = self._function(waveform, sample_rate)
        if not isinstance(text, str):
            raise UserError(f"{self.name}: expected text, got {type(text).__name__}")
        return text


Recogniser = PocketSphinx | TransformersRecogniser | FunctionRecogniser


def build_recogniser(name: str, device: torch.device) -> Recogniser:
    """ "pocketsphinx", module:function, or the name or folder of a transformers model.

    Raises:
        MissingPackage: it needs a package that is not installed.
        UserError: no such model or function."""
    if name == "pocketsphinx":
        return PocketSphinx()
    return FunctionRecogniser(name) if is_function_name(name) else TransformersRecogniser(name, device)


def as_numpy(waveform: Tensor) -> NDArray[np.float32]:
    return waveform.detach().cpu().numpy().astype(np.float32, copy=False)
