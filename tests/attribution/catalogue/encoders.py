"""Encoders: of transformers (also those that teachers wrap), timm, torchvision and PyTorch itself."""

from __future__ import annotations

import timm
import torch
import torchvision
import transformers
from torch import nn

from .entry import Draw, Entry, N

SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 2),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def waveform(padded: bool) -> dict[str, torch.Tensor]:
    inputs = {"input_values": Draw()(N, 64)}
    if padded:  # the first clip is whole: alone it has no padding at all
        inputs["attention_mask"] = (torch.arange(64) < torch.tensor([[64], [40]])).long()
    return inputs


def hubert(padded: bool = False):
    return transformers.HubertModel(transformers.HubertConfig(**SPEECH)), waveform(padded)


def wav2vec2(padded: bool = False, **options):
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH, **options)), waveform(padded)


def wavlm():
    return transformers.WavLMModel(transformers.WavLMConfig(**SPEECH)), waveform(False)


def whisper():
    sizes = {"num_mel_bins": 4, "d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = transformers.WhisperConfig(**sizes, max_source_positions=6, decoder_layers=1)
    model = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
    return model, {"input_features": Draw()(N, 4, 12)}


def ast():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ASTConfig(
        **sizes, patch_size=4, frequency_stride=4, time_stride=4, max_length=8, num_mel_bins=8
    )
    return transformers.ASTModel(config), {"input_values": Draw()(N, 8, 8)}


def timm_vit():
    sizes = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 5,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
    }
    return timm.models.VisionTransformer(**sizes), (Draw()(N, 3, 8, 8),)


def torchvision_vit():
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return torchvision.models.VisionTransformer(**sizes, num_classes=5), (Draw()(N, 3, 8, 8),)


class TorchEncoder(nn.Module):
    """PyTorch's own encoder with a head and a tail; True in its mask stands for padding inside."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Linear(3, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)

    def forward(self, x, mask):
        return self.tail(self.encoder(self.head(x), src_key_padding_mask=~mask))


def torch_encoder():
    return TorchEncoder(), {"x": Draw()(N, 5, 3), "mask": torch.arange(5) < torch.tensor([[5], [3]])}


LAST = {"output": lambda output: output.last_hidden_state}

ENTRIES = [
    Entry("WhisperEncoder", whisper, "layers.0-2", **LAST),
    Entry("HubertModel", hubert, "encoder.layers.0-2", **LAST),
    Entry("HubertModel, padded", lambda: hubert(True), "encoder.layers.0-2", **LAST),
    Entry("Wav2Vec2Model", wav2vec2, "encoder.layers.0-2", **LAST),
    Entry("Wav2Vec2Model, padded", lambda: wav2vec2(True), "encoder.layers.0-2", **LAST),
    Entry(
        "Wav2Vec2Model, stable layer norm",
        lambda: wav2vec2(True, do_stable_layer_norm=True),
        "encoder.layers.0-2",
        **LAST,
    ),
    Entry("WavLMModel", wavlm, "encoder.layers.0-2", **LAST),
    Entry("ASTModel", ast, "layers.0-2", **LAST),
    Entry("timm VisionTransformer", timm_vit, "blocks.0-2"),
    Entry("torchvision VisionTransformer", torchvision_vit, "encoder.layers.encoder_layer_0-2"),
    Entry("torch TransformerEncoder", torch_encoder, "encoder.layers.0-2", mask="mask"),
]
