"""examples/train_teacher.py: what it saves is a teacher, and knows the sounds that it was taught."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.teachers import build_teacher

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "train_teacher.py"
RATE = 8_000


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(PROGRAM))


@pytest.fixture
def tones(tmp_path):
    """Forty tones in noise, low and high in turn, and one recording that is too long."""
    random = np.random.default_rng(0)
    rows = ["audio_file|text"]
    for number in range(41):
        seconds = random.uniform(0.3, 0.6) if number < 40 else 1.5
        times = np.arange(int(seconds * RATE)) / RATE
        hertz, name = [(300, "low"), (2000, "high")][number % 2]
        tone = 0.3 * np.sin(2 * np.pi * hertz * times) + 0.02 * random.standard_normal(len(times))
        soundfile.write(tmp_path / f"{number}.wav", tone, RATE)
        rows.append(f"{number}.wav|{name}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    return tmp_path


def test_an_encoder_learns_and_is_a_teacher(program, tones, tmp_path, capsys):
    losses = []
    for epochs in (1, 40):
        program["main"](tones, tmp_path / f"{epochs}", epochs=epochs, width=32, layers=1)
        printed = re.search(r"loss ([\d.]+); \d of 4 recordings", capsys.readouterr().out)
        losses.append(float(printed[1]))
    assert losses[1] < 0.5 * losses[0]
    teacher = build_teacher(tmp_path / "40")
    assert (teacher.width, teacher.rate) == (32, 50.0)
    _, mask = teacher(torch.randn(1, 16_000), torch.tensor([16_000]), 16_000)
    assert mask.shape == (1, 50)
    with pytest.raises(ValueError, match="hears at most 1 s"):
        teacher(torch.randn(1, 24_000), torch.tensor([24_000]), 16_000)


def test_what_is_heard_and_how_it_is_spelled(program, tones):
    waves, texts = program["recordings"](tones)
    assert waves.shape == (40, 16_000)  # the long one is left out
    letters = program["LETTERS"]
    assert [letters[i] for i in texts[1]] == list("high")
    steps = torch.tensor([[0, letters.index("o"), letters.index("o"), 0, letters.index("o"), letters.index("h")]])
    assert program["spelled"](torch.nn.functional.one_hot(steps, len(letters)).float()) == ["ooh"]


def test_recordings_without_a_text_teach_nothing(program, tones, tmp_path):
    (tones / "metadata.csv").write_text("audio_file|text\n40.wav|low\n0.wav|")
    with pytest.raises(SystemExit, match="no recording of at most 1 s with a text"):
        program["main"](tones, tmp_path / "teacher")
