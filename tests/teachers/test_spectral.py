"""The built-in teacher against its formula in NumPy, its padding, and whether it tells sounds apart."""

from __future__ import annotations

import csv
import wave

import numpy as np
import pytest
import torch

from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.teachers import build_teacher
from agrepa_fast.teachers.spectral import MEAN, STD

RATE = 16_000


@pytest.fixture(scope="module")
def teacher():
    return build_teacher("spectral")


def htk_bank(bins, top, bands):
    mel = np.linspace(0, 2595 * np.log10(1 + top / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.linspace(0, top, bins)
    rising = (frequency[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def slope(values):
    out = np.zeros_like(values)
    for i in range(len(values)):
        for k in (-2, -1, 1, 2):
            out[i] += k * values[min(max(i + k, 0), len(values) - 1)] / 10
    return out


def by_formula(clip):
    """60 features of each 20 ms of a float64 clip at 16 kHz."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    bank = htk_bank(257, 8_000, 40)
    cosines = np.cos(np.pi / 40 * (np.arange(40)[:, None] + 0.5) * np.arange(20)) * np.sqrt(2 / 40)
    cosines[:, 0] = np.sqrt(1 / 40)
    quiet = np.concatenate([np.zeros(1_000), clip, np.zeros(1_000)])
    cepstra = []
    for i in range(int(np.ceil(len(clip) / 320))):
        centre = 1_000 + 320 * i + 160
        power = np.abs(np.fft.rfft(window * quiet[centre - 200 : centre + 200], 512)) ** 2
        cepstra.append(np.log(np.maximum(power @ bank, 1e-6)) @ cosines)
    cepstra = np.stack(cepstra)
    features = np.concatenate([cepstra, np.abs(slope(cepstra)), np.abs(slope(slope(cepstra)))], axis=1)
    return (features - np.array(MEAN)) / np.array(STD)


def chirp(seconds, low, high, seed):
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return 0.2 * np.sin(2 * np.pi * (low + (high - low) * time / 2 / seconds) * time) + 0.003 * noise


def test_equals_the_formula(teacher):
    clip = chirp(0.71, 200, 5_000, 0)
    features, mask = teacher(torch.tensor(clip, dtype=torch.float32)[None], torch.tensor([len(clip)]), RATE)
    expected = by_formula(clip)
    assert mask.sum() == len(expected) == 36
    np.testing.assert_allclose(features[0].numpy(), expected, atol=2e-3)
    assert np.abs(expected).max() > 1  # the tolerance is small beside the values


def test_the_clip_in_a_padded_batch_equals_the_clip_alone(teacher):
    clips = [torch.tensor(chirp(s, 300, 3_000, i), dtype=torch.float32) for i, s in enumerate((1.0, 0.613, 0.02))]
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = torch.full((3, 20_000), 0.5)
    for row, clip in zip(batch, clips):
        row[: len(clip)] = clip
    features, mask = teacher(batch, lengths, RATE)
    assert features.shape[1] == 63
    # Frame i is valid when it begins, at 320 i, before the end: 16,000, 9,808 and 320 samples.
    assert mask.sum(1).tolist() == [50, 31, 1]
    for row, clip in enumerate(clips):
        alone, whole = teacher(clip[None], lengths[row : row + 1], RATE)
        assert whole.all()
        torch.testing.assert_close(features[row][mask[row]], alone[0], atol=1e-5, rtol=0)


def test_an_empty_clip_has_no_frame(teacher):
    features, mask = teacher(torch.zeros(2, 800), torch.tensor([0, 800]), RATE)
    assert mask.tolist() == [[False, False, False], [True, True, True]]
    assert torch.isfinite(features).all()
    _, nobody = teacher(torch.zeros(1, 0), torch.tensor([0]), RATE)
    assert not nobody.any()


def test_a_click_is_heard_by_the_frame_whose_time_holds_it(teacher):
    for frame in (0, 3, 9):
        audio = torch.zeros(1, 3_200)
        audio[0, 320 * frame + 160] = 0.5
        cepstra = (teacher(audio, torch.tensor([3_200]), RATE)[0][0] * teacher.std + teacher.mean)[:, 0]
        assert cepstra.argmax() == frame


def test_pooled_movement_tells_a_moving_sound_from_a_steady_one(teacher):
    # Signed differences of both would sum to nearly nothing.
    time = torch.arange(RATE) / RATE
    steady = 0.2 * torch.sin(2 * torch.pi * 1_000 * time)
    wobble = 0.2 * torch.sin(2 * torch.pi * 1_000 * time + 60 * torch.sin(2 * torch.pi * 4 * time))
    features, _ = teacher(torch.stack([steady, wobble]), torch.tensor([RATE, RATE]), RATE)
    movement = (features * teacher.std + teacher.mean)[:, 5:-5, 20:40].mean(1)
    assert (movement[1] > 5 * movement[0]).all()


def test_half_the_sampling_rate_gives_nearly_the_same_low_frequencies(teacher):
    clip = torch.tensor(chirp(0.5, 200, 1_000, 0), dtype=torch.float32)[None]
    expected, _ = teacher(clip, torch.tensor([8_000]), RATE)
    from torchaudio.functional import resample

    at24 = resample(clip, RATE, 24_000)
    features, mask = teacher(at24, torch.tensor([12_000]), 24_000)
    assert mask.sum() == 25
    assert torch.cosine_similarity(features[0], expected[0], dim=-1)[2:-2].min() > 0.95


def test_scale_and_separation_on_the_built_in_corpus(teacher, tmp_path):
    manifest = write_corpus(tmp_path / "corpus", seed=5, speech=30, audio=40)
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="|"))
    clips = []
    for row in rows:
        with wave.open(str(tmp_path / "corpus" / row["audio_file"])) as sound:
            clips.append(np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32_768)
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = torch.zeros(len(clips), int(lengths.max()))
    for row, clip in zip(batch, clips):
        row[: len(clip)] = torch.tensor(clip)
    features, mask = teacher(batch, lengths, RATE)
    valid = features[mask]
    # Other clips than MEAN and STD were measured on: near 0 and 1, not equal.
    assert valid.mean(0).abs().max() < 0.5
    assert valid.std(0).min() > 0.6
    assert valid.std(0).max() < 1.6

    pooled = features.sum(1) / mask.sum(1, keepdim=True)
    cosine = torch.nn.functional.normalize(pooled, dim=1)
    cosine = cosine @ cosine.T
    same = torch.tensor([[a["text"] == b["text"] for b in rows] for a in rows])
    sounds = torch.tensor([row["domain"] == "audio" for row in rows])
    pairs = sounds[:, None] & sounds & ~torch.eye(len(rows), dtype=torch.bool)
    assert (same & pairs).sum() > 20
    assert cosine[pairs & same].mean() > 0.7
    assert cosine[pairs & ~same].mean().abs() < 0.3


def test_nothing_to_save_and_nothing_to_train(teacher):
    assert teacher.state_dict() == {}
    assert list(teacher.parameters()) == []
    assert (teacher.width, teacher.rate) == (60, 50.0)
