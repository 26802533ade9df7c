"""Small encoders with random weights, and a batch of noise for them."""

from __future__ import annotations

import numpy as np
import torch
import transformers

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
    # Positional convolutions of 16 channels a group: oneDNN computes fewer wrongly in bfloat16 on CPUs with AMX.
    return kind(
        **small(
            conv_dim=(16,) * 7,
            feat_extract_norm=norm,
            do_stable_layer_norm=norm == "layer",
            conv_bias=norm == "layer",
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
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
