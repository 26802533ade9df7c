"""Spectral distance by hand formula, speaker similarity and opinion scores: values, and what they refuse."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.distortion import SpectralDistance, cepstrum, mel_cepstral_distortion
from agrepa_fast.evaluation.metric import MissingPackage
from agrepa_fast.evaluation.opinion import build_opinion
from agrepa_fast.evaluation.recordings import Recording
from agrepa_fast.evaluation.speaker import SpeakerSimilarity, build_speaker

CPU = torch.device("cpu")
CLIP = Recording("a", None, "", "speech")  # type: ignore[arg-type]


def noise(seed: int, seconds: float = 0.5, loudness: float = 0.1) -> torch.Tensor:
    return loudness * torch.randn(round(16_000 * seconds), generator=torch.Generator().manual_seed(seed))


def test_mcd_by_hand() -> None:
    """Log-mels 0.3 cos(2 x) and 0.4 cos(5 x) apart: c_2 = 0.3 and c_5 = 0.4, so 10 / ln 10 sqrt(2 (0.09 + 0.16))."""
    b = torch.arange(80, dtype=torch.float64)
    x = math.pi * (b + 0.5) / 80
    base = torch.randn(7, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = base + 0.3 * torch.cos(2 * x) + 0.4 * torch.cos(5 * x) + 1.7
    expected = torch.zeros(13, dtype=torch.float64)
    expected[1], expected[4] = 0.3, 0.4
    torch.testing.assert_close(cepstrum(moved - base)[0], expected)
    assert mel_cepstral_distortion(moved, base).item() == pytest.approx(10 / math.log(10) * math.sqrt(0.5))


def test_mcd_by_a_loop() -> None:
    a, b = (torch.randn(5, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    total = 0.0
    for t in range(5):
        squares = 0.0
        for k in range(1, 14):
            c = [
                2 / 80 * sum(m[t, i].item() * math.cos(math.pi * k * (i + 0.5) / 80) for i in range(80)) for m in (a, b)
            ]
            squares += (c[0] - c[1]) ** 2
        total += 10 / math.log(10) * math.sqrt(2 * squares) / 5
    assert mel_cepstral_distortion(a, b).item() == pytest.approx(total)


def test_a_gain_changes_the_log_mel_distance_alone() -> None:
    sound = noise(0)
    mcd, log_mel = SpectralDistance().measure(3 * sound, CLIP, sound).tolist()
    assert mcd == pytest.approx(0, abs=1e-4)
    assert log_mel == pytest.approx(math.log(3), abs=1e-4)


def test_durations_must_match() -> None:
    metric = SpectralDistance()
    with pytest.raises(UserError, match=r"lasts 0.50 s, its reference 0.56 s"):
        metric.measure(noise(0), CLIP, noise(1, 0.56))
    with pytest.raises(UserError, match="shorter than one window"):
        metric.measure(noise(0, 0.03), CLIP, noise(1, 0.03))
    # A hop of difference is cut away.
    assert metric.measure(noise(0, 0.51), CLIP, noise(0, 0.51)[:8000]).tolist() == [0, 0]


def test_speaker_similarity_is_a_cosine() -> None:
    metric = SpeakerSimilarity("x", lambda x, rate: [x[0], x[1]])
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert metric.measure(a, CLIP, b).tolist() == pytest.approx([24 / 25])


@pytest.mark.parametrize(
    "embed, reason",
    [
        (lambda x, rate: np.zeros(3), "zero"),
        (lambda x, rate: [math.nan], "not finite"),
        (lambda x, rate: [], "empty"),
        (lambda x, rate: "words", "vector of numbers"),
        (lambda x, rate: None, "not finite|vector of numbers"),
        (lambda x, rate: np.ones(len(x)), "2 and 3 numbers cannot be compared"),
    ],
)
def test_speaker_refusals(embed, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        SpeakerSimilarity("x", embed).measure(torch.ones(2), CLIP, torch.ones(3))


@pytest.mark.parametrize(
    "value, reason",
    [("nan", "NaN"), ("[1, 2]", "expected a number"), ("True", "expected a number"), ("np.ones(2)", "one number")],
)
def test_opinion_refusals(tmp_path, monkeypatch, value: str, reason: str) -> None:
    (tmp_path / "mymos.py").write_text(f"import numpy as np\nnan = float('nan')\ndef f(x, rate): return {value}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymos", raising=False)
    with pytest.raises(UserError, match=reason):
        build_opinion("mymos:f").measure(torch.ones(3), CLIP, None)


@pytest.mark.parametrize("value", ["x.sum() / rate", "np.float32(x.sum() / rate)", "torch.tensor([3 / rate])"])
def test_opinion_of_a_function(tmp_path, monkeypatch, value: str) -> None:
    (tmp_path / "mymos.py").write_text(f"import numpy as np, torch\ndef f(x, rate): return {value}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymos", raising=False)
    assert build_opinion("mymos:f").measure(torch.ones(3), CLIP, None).tolist() == pytest.approx([3 / 16_000])


def test_dnsmos_is_the_packages_own_score() -> None:
    """Our sessions take fewer threads than the package's. The numbers are what `speechmos.dnsmos.run` returned."""
    metric = build_opinion("dnsmos")
    expected = [1.105325, 1.183321, 1.094655, 2.097856]
    assert metric.measure(noise(0, 9.1).clamp(-1, 1), CLIP, None).tolist() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match="silent"):
        metric.measure(torch.zeros(16_000), CLIP, None)


@pytest.mark.parametrize(
    "package, build, extra",
    [
        ("speechmos", lambda: build_opinion("dnsmos"), "mos"),
        ("onnxruntime", lambda: build_opinion("dnsmos"), "mos"),
        ("resemblyzer", lambda: build_speaker("resemblyzer", CPU), "speaker"),
        ("transformers", lambda: build_speaker("some/model", CPU), "teachers"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, package: str, build, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package}.*agrepa-fast\[{extra}\]"):
        build()


def test_resemblyzer_hears_no_voice(monkeypatch) -> None:
    """What its voice detection leaves empty would otherwise be embedded as silence."""
    fake = SimpleNamespace(
        VoiceEncoder=lambda device, verbose: SimpleNamespace(embed_utterance=lambda wav: np.ones(4)),
        preprocess_wav=lambda wav: wav[: 0 if wav[0] < 0 else None],
    )
    monkeypatch.setitem(sys.modules, "resemblyzer", fake)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.1.4")
    metric = build_speaker("resemblyzer", CPU)
    assert metric.measure(torch.ones(5), CLIP, torch.ones(5)).item() == pytest.approx(1)
    for silent in (torch.zeros(5), -torch.ones(5)):
        with pytest.raises(UserError, match="no voice is detected"):
            metric.measure(silent, CLIP, torch.ones(5))


def test_an_unknown_model_of_speakers_is_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match=r"--speaker .*cannot be loaded") as caught:
        build_speaker(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--mos utmos: expected dnsmos, none, or module:function"):
        build_opinion("utmos")
