"""Word and character error rate: what a recogniser hears against the text of the clip, counted by jiwer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .callables import load_function
from .metric import Metric, packages
from .recognisers import Recogniser, as_numpy, build_recogniser
from .recordings import Recording, is_silent

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def plain(text: str) -> str:
    """Lower case, without punctuation except apostrophes inside words, one space between words.

    A word that is one digit is written out in English, because recognisers write "7" for "seven"."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)|[^\w\s']|_", " ", text)
    return " ".join(DIGITS[int(word)] if re.fullmatch("[0-9]", word) else word for word in text.split())


def build_normaliser(name: str) -> Callable[[str], str]:
    """ "plain"; "english", Whisper's normaliser of English numbers and spellings; or module:function (text -> text).

    Raises:
        MissingPackage: "english" without transformers.
        UserError: no such function."""
    if name == "plain":
        return plain
    if name == "english":
        with packages("teachers", "the english text form"):
            from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
        return EnglishTextNormalizer({})
    return load_function(name, "--text-form")


class WordErrors(Metric):
    """WER and CER over all clips: errors of all clips over words (characters) of all clips."""

    key = "wer"
    title = "Word and character error rate"
    columns = {"WER": "lower", "CER": "lower"}  # noqa: RUF012
    spoken = needs_text = whole = True

    def __init__(self, recogniser: Recogniser, normalise: Callable[[str], str] = plain) -> None:
        with packages("wer", "the word error rate"):
            import jiwer
        self._jiwer: Any = jiwer
        self.recogniser = recogniser
        self.normalise = normalise
        self.note = "Errors over words of all clips: more than 1 is possible. A silent clip counts as all words missed."

    @property
    def tool(self) -> str:  # type: ignore[override]
        return self.recogniser.name

    def prepare(self, texts: list[str]) -> None:
        """Show the texts to the recogniser, in the form in which they are compared."""
        self.recogniser.prepare([self._form(text) for text in texts if text])

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        """[4]: word errors, words, character errors, characters."""
        said = self._form(clip.text)
        if not said:
            raise UserError("no text to compare with")
        heard = "" if is_silent(waveform) else self._form(self.recogniser(as_numpy(waveform), self.sample_rate))
        return torch.tensor([*self.errors(said, heard)], dtype=torch.float64)

    def errors(self, said: str, heard: str) -> tuple[int, int, int, int]:
        """Word errors, words, character errors and characters of one text."""
        counts = []
        for output in (self._jiwer.process_words(said, heard), self._jiwer.process_characters(said, heard)):
            counts.append(output.substitutions + output.deletions + output.insertions)
            counts.append(output.substitutions + output.deletions + output.hits)
        return counts[0], counts[1], counts[2], counts[3]

    def terms(self, measured: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Errors and words, or errors and characters."""
        return measured[:, 2 * column], measured[:, 2 * column + 1]

    def _form(self, text: str) -> str:
        form = self.normalise(text)
        if not isinstance(form, str):
            raise UserError(f"--text-form: expected text from the function, got {type(form).__name__}")
        return " ".join(form.split())


def build_words(asr: str, text_form: str, device: torch.device) -> WordErrors:
    """The metric with a recogniser (`build_recogniser`) and a text form (`build_normaliser`) by their names."""
    return WordErrors(build_recogniser(asr, device), build_normaliser(text_form))
