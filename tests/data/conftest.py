"""Sound files, lists and samples of the data tests."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from .clips import HOP, make_clip


@pytest.fixture
def waves(tmp_path):
    """Six sound files of several kinds with a text each: [(path, text)]."""
    rng = np.random.default_rng(0)
    made = []
    for number, kind in enumerate(("wav", "flac", "ogg", "wav", "flac", "wav")):
        path = tmp_path / "files" / f"clip{number}.{kind}"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(9_000 + 3_000 * number), 16000)
        made.append((path, f"text {number}"))
    return made


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """23 sounds of 5 to 70 mel frames, the last 6 of the domain audio."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    samples = rng.integers(5 * HOP, 70 * HOP, size=23)
    return [
        make_clip(folder, number, int(length), domain="speech" if number < 17 else "audio")
        for number, length in enumerate(samples)
    ]
