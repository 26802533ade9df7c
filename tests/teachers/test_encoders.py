"""Transformers teachers on tiny random models: padding, frame counts, rates, freezing, loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from agrepa_fast.errors import UserError
from agrepa_fast.teachers.encoders import TransformersTeacher

from .small import (
    LENGTHS,
    MODELS,
    RATE,
    built,
    clap_config,
    frames_of,
    noisy_batch,
)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layer", [None, 1])
def test_clip_in_a_padded_batch_equals_the_clip_alone(kind, layer):
    teacher = TransformersTeacher(built(kind), layer=layer)
    audio = noisy_batch()
    features, mask = teacher(audio, LENGTHS, RATE)
    assert mask.sum(1).tolist() == [frames_of(kind, int(length)) for length in LENGTHS]
    for row, length in enumerate(LENGTHS):
        alone, whole = teacher(audio[row : row + 1, :length], length[None], RATE)
        assert whole.all()
        torch.testing.assert_close(features[row][mask[row]], alone[0], atol=1e-4, rtol=0)
        assert (features[row][~mask[row]] == 0).all()
    # The comparison means something: other audio gives other features.
    other, _ = teacher(-audio.flip(1), LENGTHS, RATE)
    assert (other[0] - features[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["hubert-group", "hubert"])
def test_group_norm_models_would_leak_padding_in_a_batch(kind):
    # Why the per-clip path exists; if this stops failing for group norm, the path can go.
    model = built(kind).eval()
    audio = noisy_batch()
    audio[1, LENGTHS[1] :] = 0
    attend = torch.arange(16_000) < LENGTHS[:2, None]
    with torch.no_grad():
        together = model(audio[:2], attention_mask=attend.long()).last_hidden_state[1]
        alone = model(audio[1:2, : LENGTHS[1]]).last_hidden_state[0]
    leak = (together[: len(alone)] - alone).abs().max()
    assert leak > 1e-3 if kind == "hubert-group" else leak < 1e-4


@pytest.mark.parametrize(
    "kind, rate", [("whisper", 50.0), ("hubert", 50.0), ("wavlm", 50.0), ("wav2vec2", 50.0), ("ast", 10.0)]
)
def test_width_and_rate_are_known_before_running(kind, rate):
    teacher = TransformersTeacher(built(kind))
    assert (teacher.width, teacher.rate, teacher.sample_rate) == (32, rate, RATE)
    features, _ = teacher(noisy_batch(), LENGTHS, RATE)
    assert features.shape[2] == 32


def test_frame_counts_of_the_published_front_ends():
    audio = torch.zeros(1, 32_000)
    audio[0, ::100] = 0.1
    for kind, count in {"whisper": 100, "hubert": 99, "ast": 20}.items():
        features, mask = TransformersTeacher(built(kind))(audio, torch.tensor([32_000]), RATE)
        assert features.shape[1] == count
        assert mask.all()


@pytest.mark.parametrize("kind", ["whisper", "hubert", "hubert-group", "ast"])
def test_a_clip_too_short_for_a_frame_gets_none_and_disturbs_nobody(kind):
    teacher = TransformersTeacher(built(kind))
    audio = noisy_batch()[:2]
    features, mask = teacher(audio, torch.tensor([16_000, 0]), RATE)
    assert not mask[1].any()
    assert torch.isfinite(features).all()
    alone, _ = teacher(audio[:1], torch.tensor([16_000]), RATE)
    torch.testing.assert_close(features[:1], alone, atol=1e-4, rtol=0)
    _, nobody = teacher(audio, torch.tensor([0, 0]), RATE)
    assert not nobody.any()


@pytest.mark.parametrize("kind", ["whisper", "hubert", "ast"])
def test_refuses_training_mode_and_gradients(kind):
    teacher = TransformersTeacher(built(kind))
    audio = noisy_batch()
    before, _ = teacher(audio, LENGTHS, RATE)
    student = torch.nn.ModuleDict({"teacher": teacher, "head": torch.nn.Linear(2, 2)})
    student.train()
    assert student["head"].training
    assert not any(module.training for module in teacher.modules())
    teacher.model.train()  # past the wrapper: layerdrop 0.5, dropout and SpecAugment would come alive
    audio.requires_grad_(True)
    after, _ = teacher(audio, LENGTHS, RATE)
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_whisper_matches_the_library_and_returns_the_audible_frames_only():
    model = built("whisper").eval()
    audio = noisy_batch()
    features, mask = TransformersTeacher(model)(audio, LENGTHS, RATE)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=3)
    inputs = extractor(audio[1, : LENGTHS[1]].numpy(), sampling_rate=RATE, return_tensors="pt").input_features
    assert inputs.shape[-1] == 300
    with torch.no_grad():
        expected = model.encoder(inputs).last_hidden_state[0]
    torch.testing.assert_close(features[1, :31], expected[:31], atol=1e-5, rtol=0)
    assert mask[1].sum() == 31


def test_ast_drops_prefix_tokens_and_averages_over_frequency():
    model = built("ast").eval()
    audio = noisy_batch()
    features, _ = TransformersTeacher(model)(audio, LENGTHS, RATE)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=216)
    inputs = extractor(audio[0].numpy(), sampling_rate=RATE, return_tensors="pt").input_values
    with torch.no_grad():
        tokens = model(inputs).last_hidden_state[0]
    # Token order by a marked patch: raising one patch of the spectrogram changes its embedding alone.
    marked = inputs.clone()
    marked[0, 30:31, 20:21] += 1.0
    with torch.no_grad():
        change = (model.embeddings(marked) - model.embeddings(inputs))[0].abs().sum(-1)
    touched = {(f, t) for f in range(5) for t in range(21) if change[2 + f * 21 + t] > 1e-6}
    assert touched == {(f, t) for f in (1, 2) for t in (2, 3)}
    expected = np.stack([tokens[[2 + f * 21 + t for f in range(5)]].mean(0).numpy() for t in range(10)])
    np.testing.assert_allclose(features[0].numpy(), expected, atol=1e-5)


def test_waveform_normalisation_is_the_extractors():
    model = built("wav2vec2").eval()
    audio = noisy_batch()
    features, _ = TransformersTeacher(model)(audio, LENGTHS, RATE)
    clip = audio[2, : LENGTHS[2]]
    with torch.no_grad():
        expected = model((clip - clip.mean())[None] / clip.std(correction=0)).last_hidden_state[0]
    torch.testing.assert_close(features[2, : len(expected)], expected, atol=1e-4, rtol=0)


def test_layer_picks_a_hidden_state():
    model = built("hubert")
    audio, lengths = noisy_batch()[:1], LENGTHS[:1]
    values = (audio - audio.mean()) / audio.std(correction=0)
    with torch.no_grad():
        states = model.eval()(values, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2, -2):
        features, _ = TransformersTeacher(model, layer=layer)(audio, lengths, RATE)
        torch.testing.assert_close(features, states[layer], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"layer 3 does not exist; hidden states are numbered 0 to 2"):
        TransformersTeacher(model, layer=3)


def test_audio_of_another_rate_is_resampled():
    teacher = TransformersTeacher(built("whisper"))
    # A tone inside the band is the same at any sampling rate (away from the filter's edges).
    at16 = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)[None]
    at24 = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(24_000) / 24_000)[None]
    expected, _ = teacher(at16, torch.tensor([16_000]), 16_000)
    features, mask = teacher(at24, torch.tensor([24_000]), 24_000)
    assert mask.sum() == 50
    closeness = torch.cosine_similarity(features[0, 5:45], expected[0, 5:45], dim=-1)
    assert closeness.min() > 0.999
    untold, _ = teacher(at24[:, :16_000], torch.tensor([16_000]), 16_000)
    assert torch.cosine_similarity(untold[0, 5:45], expected[0, 5:45], dim=-1).mean() < closeness.min()


@pytest.mark.parametrize("kind, seconds", [("whisper", 3), ("ast", 2.175)])
def test_a_clip_longer_than_the_window_is_refused(kind, seconds):
    teacher = TransformersTeacher(built(kind))
    window = int(seconds * RATE)
    audio = 0.1 * torch.randn(1, window + 1)
    teacher(audio, torch.tensor([window]), RATE)
    with pytest.raises(UserError, match=f"hears at most {seconds:g} s"):
        teacher(audio, torch.tensor([window + 1]), RATE)


@pytest.mark.parametrize("fusion", [False, True])
def test_clap_s_frames(fusion, monkeypatch):
    torch.manual_seed(0)
    extractor = transformers.ClapFeatureExtractor(feature_size=16, max_length_s=1)
    monkeypatch.setattr("agrepa_fast.teachers.encoders._extractor", lambda *a: extractor)
    teacher = TransformersTeacher(transformers.ClapAudioModel(clap_config(fusion)))
    assert (teacher.width, teacher.rate, teacher.sample_rate, teacher.longest) == (32, 32.0, 48_000, 1.0)
    lengths = torch.tensor([48_000, 20_000, 0])
    audio = 0.1 * torch.randn(3, 48_000, generator=torch.Generator().manual_seed(0))
    features, mask = teacher(audio, lengths, 48_000)
    assert mask.sum(1).tolist() == [32, 14, 0]  # ceil(20,000 / 1,500)
    alone, heard = teacher(audio[1:2, :20_000], lengths[1:2], 48_000)
    torch.testing.assert_close(features[1, mask[1]], alone[0, heard[0]], rtol=1e-4, atol=1e-5)
    # The frames are in the order of time: what changes late in the clip changes late frames most.
    changed = audio[:1].clone()
    changed[:, 40_000:] = 0
    moved = (teacher(changed, lengths[:1], 48_000)[0][0] - features[0]).norm(dim=-1)
    assert moved[28:].mean() > 2 * moved[:16].mean()
    with pytest.raises(UserError, match="hears at most 1 s"):
        teacher(torch.zeros(1, 48_001), torch.tensor([48_001]), 48_000)
    with pytest.raises(UserError, match="leave layer out"):
        TransformersTeacher(transformers.ClapAudioModel(clap_config()), layer=1)


def test_the_published_clap_has_3_2_frames_a_second():
    from agrepa_fast.teachers.encoders import _stride

    assert 48_000 / _stride(transformers.ClapAudioConfig(), transformers.ClapFeatureExtractor()) == 3.2


def test_the_table_of_the_docs_says_what_the_teachers_are():
    from agrepa_fast.teachers.beats import HOP, PATCH
    from agrepa_fast.teachers.encoders import _longest, _stride

    waveform = transformers.Wav2Vec2FeatureExtractor()
    music = transformers.Wav2Vec2FeatureExtractor(sampling_rate=24_000)
    published = {
        "Whisper": (transformers.WhisperConfig(), transformers.WhisperFeatureExtractor()),
        "wav2vec 2.0": (transformers.HubertConfig(), waveform),
        "MERT": (transformers.HubertConfig(), music),
        "AST": (transformers.ASTConfig(), transformers.ASTFeatureExtractor()),
        "CLAP": (transformers.ClapAudioConfig(), transformers.ClapFeatureExtractor()),
    }
    facts = {"spectral": (16_000, 50.0, None), "BEATs": (16_000, 16_000 / HOP / PATCH, None)}
    for name, (config, extractor) in published.items():
        rate = extractor.sampling_rate
        facts[name] = (rate, rate / _stride(config, extractor), _longest(config, extractor))
    page = (Path(__file__).resolve().parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines() if " Hz |" in line]
    for name, (sample_rate, rate, longest) in facts.items():
        [row] = [row for row in rows if row[0].startswith(name)]
        written = "any" if longest is None else f"{longest:g} s"
        assert row[1:3] == [f"{sample_rate / 1000:g} kHz", f"{rate:g} Hz"], name
        assert row[4] == written, name
