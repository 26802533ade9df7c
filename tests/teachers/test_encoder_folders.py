"""Encoders from folders and from the hub: weights, preprocessing, and what is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers

from agrepa_fast.errors import UserError
from agrepa_fast.teachers import build_teacher
from agrepa_fast.teachers.encoders import TransformersTeacher

from .small import (
    LENGTHS,
    RATE,
    built,
    noisy_batch,
    small,
    waveform_config,
    whisper_config,
)


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
