"""Word errors: jiwer's identities, the text form, the recognisers and what they refuse."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from agrepa_fast.data.audio import read_audio
from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.metric import MissingPackage
from agrepa_fast.evaluation.recognisers import PocketSphinx, build_recogniser
from agrepa_fast.evaluation.recordings import Recording
from agrepa_fast.evaluation.words import WordErrors, build_normaliser, build_words, plain

CPU = torch.device("cpu")


class Parrot:
    """Hears one fixed text."""

    name = "parrot"

    def __init__(self, text: str) -> None:
        self.text = text

    def prepare(self, texts) -> None:
        self.texts = texts

    def __call__(self, waveform, sample_rate: int) -> str:
        return self.text


def recording(text: str) -> Recording:
    return Recording("a", None, text, "speech")  # type: ignore[arg-type]


def measure(said: str, heard: str, sound: torch.Tensor | None = None) -> list[float]:
    metric = WordErrors(Parrot(heard))  # type: ignore[arg-type]
    return metric.measure(torch.ones(100) if sound is None else sound, recording(said), None).tolist()


@pytest.mark.parametrize(
    "said, heard, expected",
    [
        ("one two three", "one two three", [0, 3, 0, 13]),
        ("one two three", "", [3, 3, 13, 13]),
        ("one two three", "one three", [1, 3, 4, 13]),  # a deletion of "two "
        ("one two", "one two two", [1, 2, 4, 7]),  # an insertion
        ("one two", "one too", [1, 2, 1, 7]),  # a substitution
        ("Seven, five!", "7 FIVE", [0, 2, 0, 10]),
        ("no", "yes yes yes", [3, 1, 11, 2]),  # more errors than words
    ],
)
def test_counts(said: str, heard: str, expected: list[int]) -> None:
    assert measure(said, heard) == expected


def test_a_silent_clip_misses_every_word() -> None:
    assert measure("one two", "one two", torch.zeros(100)) == [2, 2, 7, 7]


@pytest.mark.parametrize("text", ["", "  ", "...!"])
def test_no_text(text: str) -> None:
    with pytest.raises(UserError, match="no text"):
        measure(text, "one")


def test_rates_are_sums_over_clips() -> None:
    """1 error in 1 word and 0 in 9 words: 0.1, not the mean 0.5."""
    metric = WordErrors(Parrot(""))  # type: ignore[arg-type]
    measured = torch.tensor([[1, 1, 3, 3], [0, 9, 0, 40]], dtype=torch.float64)
    estimates, _ = metric.estimate(measured, None, 0)
    assert (estimates["WER"].value, estimates["CER"].value) == pytest.approx((0.1, 3 / 43))


@pytest.mark.parametrize(
    "text, form",
    [
        ("Don’t  STOP — now!", "don't stop now"),
        ("'quoted' rock'n'roll", "quoted rock'n'roll"),
        ("7 42 a_b", "seven 42 a b"),
        ("Ｆｕｌｌ Straße", "full strasse"),
    ],
)
def test_plain_form(text: str, form: str) -> None:
    assert plain(text) == form


def test_the_english_form_is_whispers() -> None:
    assert build_normaliser("english")("Twenty-one isn't 21") == "21 is not 21"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Clips of the built-in corpus whose words an English dictionary knows."""
    clips = read_manifest(write_corpus(tmp_path_factory.mktemp("corpus") / "c", speech=40, audio=0))
    english = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    return [(c.text, read_audio(c.path, 16_000).numpy()) for c in clips if set(c.text.split()) <= english][:4]


def test_pocketsphinx_does_not_depend_on_the_order(spoken) -> None:
    recogniser = PocketSphinx()
    recogniser.prepare(["one", "two seven", "zero three"])
    forward = [recogniser(sound, 16_000) for _, sound in spoken]
    assert [recogniser(sound, 16_000) for _, sound in reversed(spoken)] == forward[::-1]
    assert {word for text in forward for word in text.split()} <= {"one", "two", "three", "seven", "zero"}
    assert "weak recogniser" in recogniser.name
    assert "1 to 2 of 5 words" in recogniser.name


@pytest.mark.parametrize("texts", [["a bell rings twice in the dark"], [f"word{i}" for i in range(30)], [], ["zzyzx"]])
def test_pocketsphinx_takes_its_language_model_elsewhere(texts) -> None:
    recogniser = PocketSphinx()
    recogniser.prepare(texts)
    assert "it is told" not in recogniser.name
    assert ("dictionary lacks" in recogniser.name) == (texts in (["zzyzx"], [f"word{i}" for i in range(30)]))
    assert recogniser(np.zeros(10, np.float32), 16_000) == ""


@pytest.mark.parametrize("package, build", [("jiwer", "parrot"), ("pocketsphinx", "pocketsphinx")])
def test_a_missing_package_names_its_extra(monkeypatch, package: str, build: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package}.*agrepa-fast\[wer\]"):
        WordErrors(Parrot("")) if build == "parrot" else build_recogniser(build, CPU)  # type: ignore[arg-type]


def test_unknown_models_and_functions(tmp_path, monkeypatch) -> None:
    (tmp_path / "myasr.py").write_text(
        "def number(x, rate): return 3\n"
        "def fails(x, rate): raise RuntimeError('no\\nluck')\n"
        "def quiet(x, rate): return f'{len(x)} {rate}'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, wanted in (
        ("nosuchmodule:f", "--asr nosuchmodule:f"),
        ("myasr:nosuch", "has no function 'nosuch'"),
        (str(tmp_path), "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=wanted) as caught:
            build_words(name, "plain", CPU)
        assert "\n" not in str(caught.value)
    for name, wanted in (("myasr:number", "expected text, got int"), ("myasr:fails", "myasr:fails: RuntimeError: no")):
        with pytest.raises(UserError, match=wanted):
            build_words(name, "plain", CPU).measure(torch.ones(9), recording("a"), None)
    assert build_words("myasr:quiet", "plain", CPU).measure(torch.ones(9), recording("nine 16000"), None)[0] == 0
    sys.modules.pop("myasr")
