"""Transformers teachers on tiny random models: padding, frame counts, rates, freezing, loading."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from agrepa_fast.errors import UserError
from agrepa_fast.teachers import build_teacher
from agrepa_fast.teachers.encoders import TransformersTeacher

RATE = 16_000
# 1 s whole; ends inside a frame; not a multiple of any hop.
LENGTHS = torch.tensor([16_000, 9_700, 5_123])


def small(**more):
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        **more,
    }


def waveform_config(kind, norm):
    return kind(
        **small(
            conv_dim=(16,) * 7,
            feat_extract_norm=norm,
            do_stable_layer_norm=norm == "layer",
            conv_bias=norm == "layer",
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            layerdrop=0.5,
        )
    )


def whisper_config():
    # A window of 3 s instead of 30, to keep the test quick; every other number of the front end is Whisper's.
    return transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        vocab_size=64,
        max_source_positions=150,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def ast_config():
    return transformers.ASTConfig(**small(num_mel_bins=64, max_length=216, frequency_stride=10, time_stride=10))


MODELS = {
    "whisper": lambda: transformers.WhisperModel(whisper_config()),
    "hubert": lambda: transformers.HubertModel(waveform_config(transformers.HubertConfig, "layer")),
    "hubert-group": lambda: transformers.HubertModel(waveform_config(transformers.HubertConfig, "group")),
    "wavlm": lambda: transformers.WavLMModel(waveform_config(transformers.WavLMConfig, "layer")),
    "wavlm-group": lambda: transformers.WavLMModel(waveform_config(transformers.WavLMConfig, "group")),
    "wav2vec2": lambda: transformers.Wav2Vec2Model(waveform_config(transformers.Wav2Vec2Config, "layer")),
    "wav2vec2-group": lambda: transformers.Wav2Vec2Model(waveform_config(transformers.Wav2Vec2Config, "group")),
    "unispeech": lambda: transformers.UniSpeechModel(waveform_config(transformers.UniSpeechConfig, "layer")),
    "unispeech-sat": lambda: transformers.UniSpeechSatModel(waveform_config(transformers.UniSpeechSatConfig, "layer")),
    "data2vec": lambda: transformers.Data2VecAudioModel(waveform_config(transformers.Data2VecAudioConfig, "layer")),
    "ast": lambda: transformers.ASTModel(ast_config()),
}


def clap_config(fusion=False):
    """A window of 1.28 s; 2 stages, so 64 frames in it: 50 Hz."""
    return transformers.ClapAudioConfig(
        num_mel_bins=16,
        spec_size=64,
        patch_size=4,
        patch_stride=[4, 4],
        depths=[1, 1],
        num_attention_heads=[2, 2],
        window_size=4,
        patch_embeds_hidden_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        enable_fusion=fusion,
        fusion_type="aff_2d" if fusion else None,
    )


def built(kind, seed=0):
    torch.manual_seed(seed)
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide leaks
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def noisy_batch():
    audio = 0.1 * torch.randn(3, 16_000, generator=torch.Generator().manual_seed(1))
    for row, length in zip(audio, LENGTHS):
        row[length:] = 0.7  # must not be heard
    return audio


def frames_of(kind, samples):
    if kind == "whisper":
        return int(np.ceil(samples / 320))
    if kind == "ast":
        return int(np.ceil(((samples - 400) // 160 + 1) / 10))
    return (samples - 400) // 320 + 1


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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


@pytest.mark.parametrize("kind", ["whisper", "hubert-group", "wavlm", "wav2vec2", "ast"])
def test_a_saved_folder_gives_the_same_features(kind, tmp_path):
    model = built(kind)
    model.save_pretrained(tmp_path)
    audio = noisy_batch()
    expected, expected_mask = TransformersTeacher(model)(audio, LENGTHS, RATE)
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json"):
        teacher = build_teacher(str(tmp_path))
    features, mask = teacher(audio, LENGTHS, RATE)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    assert torch.equal(mask, expected_mask)
    assert teacher.name == str(tmp_path)


def test_the_folders_own_preprocessing_is_used(tmp_path):
    model = built("wav2vec2")
    model.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        teacher = build_teacher(tmp_path)
    audio = noisy_batch()[:1]
    features, _ = teacher(audio, LENGTHS[:1], RATE)
    with torch.no_grad():
        expected = model.eval()(audio).last_hidden_state
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_broken_preprocessing_is_not_replaced_by_defaults(tmp_path):
    built("wav2vec2").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{not json")
    with pytest.raises(UserError, match=r"preprocessor_config\.json is unusable"):
        build_teacher(tmp_path)


def test_head_and_decoder_are_left_out(tmp_path):
    audio = noisy_batch()
    torch.manual_seed(0)
    tagger = transformers.Wav2Vec2ForCTC(waveform_config(transformers.Wav2Vec2Config, "layer"))
    assert type(TransformersTeacher(tagger).model).__name__ == "Wav2Vec2Model"
    torch.manual_seed(0)
    whisper = transformers.WhisperForConditionalGeneration(whisper_config())
    whisper.save_pretrained(tmp_path)
    expected, _ = TransformersTeacher(whisper.model.encoder)(audio, LENGTHS, RATE)
    with pytest.warns(UserWarning, match="using the defaults of whisper"):
        teacher = build_teacher(tmp_path)
    assert not any("decoder" in name for name, _ in teacher.named_parameters())
    torch.testing.assert_close(teacher(audio, LENGTHS, RATE)[0], expected, atol=1e-6, rtol=0)


def test_dtype_of_a_loaded_model(tmp_path):
    built("hubert").to(torch.float16).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="preprocessor_config"):
        wide, narrow = build_teacher(tmp_path), build_teacher(tmp_path, dtype="bfloat16")
    # Published Whisper weights are fp16 in the file; the default is to compute in float32 all the same.
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    features, _ = narrow(noisy_batch(), LENGTHS, RATE)
    expected, _ = wide(noisy_batch(), LENGTHS, RATE)
    assert features.dtype == torch.float32
    assert torch.cosine_similarity(features[0], expected[0], dim=-1).min() > 0.99
    with pytest.raises(UserError, match="teacher dtype 'bf16': choose float32, bfloat16, float16"):
        build_teacher(tmp_path, dtype="bf16")


def test_pickled_weights_are_refused(tmp_path):
    model = built("hubert")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors in the folder; pickled weights \(\.bin\)"):
        build_teacher(tmp_path)


def test_missing_weights_are_refused_rather_than_random(tmp_path):
    from safetensors.torch import load_file, save_file

    built("hubert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.1.attention.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*'encoder\.layers\.1\.attention\.k_proj\.weight'"):
        build_teacher(tmp_path)


def test_folders_and_architectures_that_cannot_be_teachers(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        build_teacher(tmp_path)
    with pytest.raises(UserError, match="revision 'main': only a model named on the hub"):
        build_teacher(tmp_path, revision="main")
    transformers.BertModel(transformers.BertConfig(vocab_size=8, **small())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="architecture 'bert' is not supported"):
        build_teacher(tmp_path)
    adapted = transformers.Wav2Vec2Config(**small(conv_dim=(16,) * 7, add_adapter=True))
    with pytest.raises(UserError, match="add_adapter"):
        TransformersTeacher(transformers.Wav2Vec2Model(adapted))


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'nobody-here/no-such-model' cannot be loaded .* path of its folder"
    ) as caught:
        build_teacher("nobody-here/no-such-model")
    assert "\n" not in str(caught.value)


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


def mert(folder, **changes):
    """A folder as MERT's authors publish it: HuBERT's weights under a model type of their own."""
    model = built("hubert-group")
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=24_000).save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    facts |= {"model_type": "mert_model", "architectures": ["MERTModel"], "attention_relax": -1.0, "deepnorm": False}
    facts |= {"feature_extractor_cqt": False, "auto_map": {"AutoModel": "modeling_MERT.MERTModel"}} | changes
    (folder / "config.json").write_text(json.dumps(facts))
    return model


def test_mert_loads_as_hubert(tmp_path):
    model = mert(tmp_path)
    teacher = build_teacher(tmp_path, layer=1)
    assert (teacher.rate, teacher.sample_rate) == (75.0, 24_000)
    audio = 0.1 * torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0))
    features, mask = teacher(audio, torch.tensor([24_000]), 24_000)
    normal = (audio - audio.mean()) / (audio.var(unbiased=False) + 1e-7).sqrt()
    with torch.no_grad():
        wanted = model.eval()(normal, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)
    assert mask.sum() == (24_000 - 400) // 320 + 1


@pytest.mark.parametrize(
    "option, value", [("feature_extractor_cqt", True), ("deepnorm", True), ("attention_relax", 32.0)]
)
def test_mert_that_is_not_hubert_is_refused(tmp_path, option, value):
    mert(tmp_path, **{option: value})
    with pytest.raises(UserError, match=f"MERT with {option} {value} needs code that is not run"):
        build_teacher(tmp_path)


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
