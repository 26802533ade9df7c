"""The built-in corpus: the same bytes each time, complete or absent, and sounds that follow their texts."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from agrepa_fast.data.audio import read_audio
from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.data.events import EVENTS, sound_event
from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.data.mel import MEL_PRESETS, LogMel
from agrepa_fast.data.voice import LEXICON
from agrepa_fast.errors import UserError


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_other_seed_other_sounds(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_corpus(tmp_path / name, seed=seed, speech=4, audio=5)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) == 4 + 5 + 2
    assert all(first[name] != other[name] for name in first if name.endswith(".wav"))


def test_a_larger_corpus_begins_with_a_smaller_one(tmp_path):
    write_corpus(tmp_path / "small", speech=2, audio=2)
    write_corpus(tmp_path / "large", speech=3, audio=4)
    small, large = digests(tmp_path / "small"), digests(tmp_path / "large")
    wavs = [name for name in small if name.endswith(".wav")]
    assert len(wavs) == 4
    assert all(small[name] == large[name] for name in wavs)


def test_reused_when_the_same_and_refused_when_not(tmp_path):
    folder = tmp_path / "corpus"
    metadata = write_corpus(folder, speech=2, audio=2)
    clip = read_manifest(metadata)[0].path
    before = clip.stat().st_mtime_ns
    assert write_corpus(folder, speech=2, audio=2) == metadata
    assert clip.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="choose another folder or delete it"):
        write_corpus(folder, speech=2, audio=3)
    clip.unlink()
    with pytest.raises(UserError, match="does not hold this corpus"):
        write_corpus(folder, speech=2, audio=2)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_corpus(tmp_path / "corpus", speech=1, audio=1)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_finished_first_wins(tmp_path, monkeypatch):
    folder, ready = tmp_path / "corpus", tmp_path / "ready"
    write_corpus(ready, speech=1, audio=1)

    def lose(source, target):
        shutil.copytree(ready, target)
        raise OSError("Directory not empty")

    monkeypatch.setattr("agrepa_fast.data.corpus.os.replace", lose)
    assert write_corpus(folder, speech=1, audio=1) == folder / "metadata.csv"
    assert digests(folder) == digests(ready)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "ready"]


@pytest.mark.parametrize("kind", EVENTS)
def test_every_sound_event_is_a_sound(kind):
    for index in range(30):
        rng = np.random.default_rng(index)
        waveform, _ = sound_event(kind, rng, rng.uniform(1.0, 2.0), 16000)
        assert np.isfinite(waveform).all(), f"{kind} {index} is not finite"
        assert np.abs(waveform).max() > 0.1, f"{kind} {index} is silent"


def test_bad_sizes_are_refused(tmp_path):
    for values, message in (
        ({"speech": 0, "audio": 0}, "at least one clip"),
        ({"speech": -1}, "at least one clip"),
        ({"seed": -1}, "must not be negative"),
        ({"sample_rate": 8000}, "at least 16000"),
    ):
        with pytest.raises(UserError, match=message):
            write_corpus(tmp_path / "corpus", **values)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    metadata = write_corpus(tmp_path_factory.mktemp("data") / "corpus", speech=96, audio=78)
    log_mel = LogMel(MEL_PRESETS["compact-16khz"])
    clips = read_manifest(metadata)
    return [(clip, log_mel(read_audio(clip.path, 16000))) for clip in clips]


def nearest_centroid(features, labels):
    """Share of the odd-numbered samples that lie nearest to their own class's mean of even-numbered ones."""
    features = torch.stack(features)
    kinds = sorted(set(labels))
    number = torch.tensor([kinds.index(label) for label in labels])
    train = torch.zeros(len(labels), dtype=torch.bool)
    for kind in range(len(kinds)):
        train[torch.nonzero(number == kind).flatten()[::2]] = True
    centroids = torch.stack([features[train & (number == kind)].mean(0) for kind in range(len(kinds))])
    guess = torch.cdist(features[~train], centroids).argmin(1)
    return float((guess == number[~train]).double().mean()), 1 / len(kinds)


def test_every_clip_is_usable(corpus):
    assert len(corpus) == 174
    for clip, mel in corpus:
        # 1 + samples // 256 frames of 0.5 to 2 s.
        assert 1 + 8000 // 256 <= mel.shape[0] <= 1 + 32000 // 256
        assert clip.text
        assert (clip.speaker is not None) == (clip.domain == "speech")
        if clip.domain == "speech":
            assert 1 <= len(clip.text.split()) <= 3
            assert set(clip.text.split()) <= set(LEXICON)


def test_the_compact_preset_is_normalised_on_it(corpus):
    frames = torch.cat([mel for _, mel in corpus])
    assert float(frames.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(frames.std()) == pytest.approx(1.0, abs=0.1)


def test_sound_classes_can_be_told_apart(corpus):
    sounds = [(clip, mel) for clip, mel in corpus if clip.domain == "audio"]
    labels = [clip.path.name.split("_")[0] for clip, _ in sounds]
    features = [torch.cat([mel.mean(0), mel.std(0)]) for _, mel in sounds]
    share, chance = nearest_centroid(features, labels)
    assert chance == pytest.approx(1 / 13)
    assert share > 0.8


def test_words_can_be_told_apart_across_voices(corpus):
    stretch = torch.nn.functional.interpolate
    spoken = [(clip, mel) for clip, mel in corpus if clip.domain == "speech" and " " not in clip.text]
    counts = {clip.text: sum(other.text == clip.text for other, _ in spoken) for clip, _ in spoken}
    spoken = [(clip, mel) for clip, mel in spoken if counts[clip.text] >= 2]
    features = [stretch(mel.T[None], size=16, mode="linear")[0].flatten() for _, mel in spoken]
    share, chance = nearest_centroid(features, [clip.text for clip, _ in spoken])
    assert len(spoken) >= 15
    assert share > 5 * chance


def test_captions_follow_their_parameters(corpus):
    """A high bell has its energy in higher mel bins than a low one, in every pair."""
    bins = torch.arange(64.0)

    def centre(mel):
        power = torch.exp(2 * (mel * 2.676 - 1.54)).sum(0)
        return float((power * bins).sum() / power.sum())

    low = [centre(mel) for clip, mel in corpus if clip.text == "a low bell rings"]
    high = [centre(mel) for clip, mel in corpus if clip.text == "a high bell rings"]
    assert low
    assert high
    assert max(low) < min(high)
