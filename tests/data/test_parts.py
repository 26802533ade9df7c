"""Parts of long sound files, read without decoding the rest: the bits of the whole file's samples, or its errors."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.data import sounds as module
from agrepa_fast.data.audio import AVERAGE, SEEKABLE, read_audio, read_part, read_sound
from agrepa_fast.data.clip import Clip
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.mel import MelConfig
from agrepa_fast.data.resampling import resample, resampled_length
from agrepa_fast.errors import UserError

MEL = MelConfig(sample_rate=16000, n_fft=512, win_length=512, hop_length=256, mels=16, f_max=8000)
SECONDS = 20
FORMATS = {
    "wav": [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAVEX", "PCM_U8"), ("RF64", "PCM_16")],
    "other": [("W64", "DOUBLE"), ("AIFF", "PCM_16"), ("AU", "FLOAT"), ("CAF", "ALAC_16"), ("FLAC", "PCM_16")],
    "ogg": [("OGG", "VORBIS"), ("OGG", "OPUS")],
}


def music(rate, channels=1):
    """Noise of changing loudness with clicks, so that codecs change the length of their blocks."""
    rng = np.random.default_rng(rate)
    sound = 0.1 * rng.standard_normal((SECONDS * rate, channels)) * rng.uniform(0.02, 1, SECONDS).repeat(rate)[:, None]
    sound[rng.integers(0, len(sound), 200)] = 0.9
    return sound


def write(path, sound, rate, form="WAV", subtype="PCM_16"):
    with soundfile.SoundFile(path, "w", rate, sound.shape[1], format=form, subtype=subtype) as file:
        for start in range(0, len(sound), rate):
            file.write(sound[start : start + rate])
    return path


def places(length, count, seed=0):
    """Random parts of 1 sample to 4 seconds, the whole, and both ends."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, length, count)
    parts = [(int(start), int(min(length, start + rng.integers(1, 64_000)))) for start in starts]
    return [(0, 1), (length - 1, length), (0, length), (length - 5000, length + 3), *parts]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_part_of_a_file_has_the_bits_of_the_whole(tmp_path, kind, rate):
    assert {form for group in FORMATS.values() for form, _ in group} == set(SEEKABLE)
    for form, subtype in FORMATS[kind]:
        path = write(tmp_path / f"{form}{subtype}", music(rate), rate, form, subtype)
        whole = read_audio(path, 16000)
        for start, stop in places(len(whole), 12):
            part = read_part(path, 16000, start, stop, length=len(whole))
            assert torch.equal(part, whole[start:stop]), (form, subtype, start, stop)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 44101, 96000, 768000])
def test_a_resampled_part_has_the_bits_of_the_whole(rate):
    from torchaudio.functional import resample as at_once

    frames = 5 * rate + 17
    sound = torch.from_numpy(np.random.default_rng(0).standard_normal(frames).astype(np.float32))
    asked = []

    def read(first, last):
        asked.append(last - first)
        return sound[first:last]

    length = resampled_length(frames, rate, 16000)
    whole = resample(read, frames, rate, 16000)
    assert len(whole) == length
    if rate != 44101:  # that ratio is rounded
        torch.testing.assert_close(whole, at_once(sound, rate, 16000), rtol=0, atol=2e-6)
    for start, stop in places(length, 20, seed=1):
        asked.clear()
        assert torch.equal(resample(read, frames, rate, 16000, start, stop), whole[start:stop])
        assert sum(asked) <= (stop - start) * rate / 16000 + 2 * (1 << 16) + 20_000


def test_lengths_after_resampling_are_exact():
    """Also where single precision is not: 20 hours are 3e9 samples."""
    assert resampled_length(20 * 3600 * 44100 + 1, 44100, 16000) == 20 * 3600 * 16000 + 1
    assert resampled_length(7, 16000, 16000) == 7


def test_channels_of_a_part_are_mixed_as_those_of_the_whole(tmp_path):
    """The channels cancel out in all of the file but its beginning: the average of the beginning would be wrong."""
    left = music(44100)
    both = np.concatenate([left, -0.5 * left], 1)
    both[:44100, 1] *= -1
    cancelled = np.concatenate([left, -left], 1)
    for sound, mix in ((both, AVERAGE), (cancelled, 0), (music(44100, 5), AVERAGE)):
        path = write(tmp_path / "x.flac", sound, 44100, "FLAC")
        whole = read_sound(path, 16000)
        assert whole.mix == mix
        for start, stop in places(len(whole.waveform), 8):
            assert read_part(path, 16000, start, stop, length=len(whole.waveform)) is None
            part = read_part(path, 16000, start, stop, length=len(whole.waveform), mix=mix)
            assert torch.equal(part, whole.waveform[start:stop])


def clip_of(path):
    return Clip(path, "a", "speech", None, None, f"list.csv:{path.name}")


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded whole."""
    seen = []
    original = module.read_sound
    monkeypatch.setattr(module, "read_sound", lambda path, *a, **k: seen.append(path) or original(path, *a, **k))
    return seen


@pytest.mark.parametrize("windows", [False, True])
def test_a_set_larger_than_the_cache_gives_the_same_samples(tmp_path, monkeypatch, decoded, windows):
    rates = ((16000, 1, "FLAC"), (44100, 1, "WAV"), (24000, 2, "WAV"))
    clips = [clip_of(write(tmp_path / f"{rate}", music(rate, channels), rate, form)) for rate, channels, form in rates]
    monkeypatch.setattr("agrepa_fast.data.dataset.SMALL_BYTES", 0)

    def samples():
        dataset = ClipDataset(clips, MEL, max_frames=60)
        assert dataset.check(0.0) == []
        dataset = dataset.in_windows() if windows else dataset
        return [dataset.item(i, torch.Generator().manual_seed(i + n)) for i in range(len(dataset)) for n in range(3)]

    kept = samples()
    assert [path.name for path in decoded] == ["16000", "44100", "24000"]  # then they come from the cache
    decoded.clear()
    monkeypatch.setattr(module, "CACHE_BYTES", 1000)
    for one, other in zip(samples(), kept, strict=True):
        assert torch.equal(one["audio"], other["audio"])
        assert torch.equal(one["mel"], other["mel"])
        assert one["start"] == other["start"]
    assert [path.name for path in decoded] == ["24000"]  # once, to learn how its channels are mixed


def test_what_is_wrong_in_a_part_or_with_all_of_a_file_is_still_an_error(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr("agrepa_fast.data.dataset.SMALL_BYTES", 0)
    monkeypatch.setattr(module, "CACHE_BYTES", 1000)
    sound = music(16000)
    sound[100_000] = np.nan
    sound[200_000] = 9
    broken = write(tmp_path / "broken.wav", sound, 16000, "WAV", "FLOAT")
    silent = write(tmp_path / "silent.wav", 1e-5 * music(16000), 16000, "WAV", "FLOAT")
    pause = music(16000)
    pause[:80_000] = 0
    paused = write(tmp_path / "pause.wav", pause, 16000)
    clips = [clip_of(path) for path in (broken, silent, paused)]
    sounds = module.Sounds(16000, 1, cache=True)
    whole = torch.from_numpy(soundfile.read(paused, dtype="float32")[0])
    assert torch.equal(sounds.part(clips[2], 10, 9000), whole[10:9000])  # silent here, and not everywhere
    assert decoded.pop() == paused
    assert len(sounds.part(clips[0], 0, 90_000)) == 90_000
    for clip, start, message in (
        (clips[0], 95_000, "holds NaN or infinite samples"),
        (clips[0], 199_000, "beyond full scale"),
        (clips[1], 0, "silent"),
    ):
        with pytest.raises(UserError, match=rf"{clip.path.name}: {message}"):
            sounds.part(clip, start, start + 10_000)
    # A file that changes its length during a run.
    write(paused, pause[:-8000], 16000)
    with pytest.raises(UserError, match="has 312000 samples, and had 320000 when the run began"):
        sounds.part(clips[2], 100_000, 110_000)
    # FLAC does not show in its header that its end is missing: the intact part is used.
    cut = write(tmp_path / "cut.flac", music(16000), 16000, "FLAC")
    expected = soundfile.read(cut, dtype="float32")[0][:50_000]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    np.testing.assert_array_equal(sounds.part(clip_of(cut), 0, 50_000).numpy(), expected)
    with pytest.raises(UserError, match=r"cut\.flac: (truncated|cannot be decoded)"):
        sounds.part(clip_of(cut), 300_000, 310_000)
