"""U-Nets, and networks of other kinds than transformers with one list of blocks."""

from __future__ import annotations

import operator
from typing import Any

import diffusers
import timm
import torch
import torchaudio
import torchvision
import transformers
import x_transformers
from torch import nn

from .entry import Draw, Entry, N
from .images import STEPS
from .videos import video

WIDTHS = {"in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8}


class First(nn.Module):
    """Returns the first of several results."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.net(x, lengths)[0]


def unet_2d_condition():
    model = diffusers.UNet2DConditionModel(
        **WIDTHS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    draw = Draw()
    return model, {"sample": draw(N, 3, 8, 8), "timestep": STEPS.double(), "encoder_hidden_states": draw(N, 3, 12)}


def unet_of_one_width():
    """Its last stage takes a state and skips of one shape, so that the stage's state is not clear."""
    sizes = {**WIDTHS, "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",)}
    more = {"cross_attention_dim": 12, "attention_head_dim": 4, "norm_num_groups": 4}
    model = diffusers.UNet2DConditionModel(**sizes, **more, up_block_types=("CrossAttnUpBlock2D",))
    draw = Draw()
    return model, {"sample": draw(N, 3, 4, 4), "timestep": 500, "encoder_hidden_states": draw(N, 3, 12)}


def unet_1d():
    model = diffusers.UNet1DModel(
        sample_size=16,
        extra_in_channels=64,
        time_embedding_type="fourier",
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    )
    return model, {"sample": Draw()(N, 2, 16), "timestep": STEPS}


def sana_video():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 4, "mlp_ratio": 2.0}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    model = diffusers.SanaVideoTransformer3DModel(
        **sizes, **cross, in_channels=3, out_channels=3, caption_channels=12, rope_max_seq_len=8
    )
    return model, {**video(), "timestep": STEPS.double()}


def conformer():
    net = First(torchaudio.models.Conformer(16, 2, 32, 3, 3))
    return net, {"x": Draw()(N, 9, 16), "lengths": torch.tensor([9, 6])}


def swin():
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [2, 2]}
    model = torchvision.models.SwinTransformer([2, 2], **sizes, num_classes=5)
    return model, {"x": Draw()(N, 3, 16, 16)}


def convnext():
    model = timm.create_model("convnext_atto", depths=(2, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5)
    return model, {"x": Draw()(N, 3, 32, 32)}


def wav2vec2_bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=8, conv_depthwise_kernel_size=3)
    return transformers.Wav2Vec2BertModel(config), {"input_features": Draw()(N, 8, 8)}


def mamba():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=3, state_size=4, vocab_size=20)
    return transformers.MambaModel(config), {"inputs_embeds": Draw()(N, 6, 16), "use_cache": False}


def llama():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=20)
    return transformers.LlamaModel(config), {"inputs_embeds": Draw()(N, 6, 16)}


def bert():
    """A norm after each sum, inside the modules that hold the branches."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=20)
    return transformers.BertModel(config), {"inputs_embeds": Draw()(N, 6, 16)}


def phi():
    """Attention and feed-forward beside each other, behind one dropout."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.PhiConfig(**sizes, vocab_size=20)
    return transformers.PhiModel(config), {"inputs_embeds": Draw()(N, 6, 16)}


def scaled_residuals():
    encoder = x_transformers.Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, scale_residual=True)
    return encoder, {"x": Draw()(N, 5, 16)}


HIDDEN = operator.attrgetter("last_hidden_state")
STAGE = "a stage, whose blocks are units"
ENTRIES = [
    Entry(
        "UNet2DConditionModel",
        unet_2d_condition,
        "down_blocks.0.resnets.0 down_blocks.0.attentions.0 mid_block.resnets.0 mid_block.attentions.0 "
        "mid_block.resnets.1 up_blocks.1.attentions.0-1",
        beside={"down_blocks.0": STAGE, "up_blocks.1": STAGE},
    ),
    Entry(
        "UNet2DConditionModel, one width",
        unet_of_one_width,
        "down_blocks.0.resnets.0 down_blocks.0.attentions.0 mid_block.resnets.0 mid_block.attentions.0 "
        "mid_block.resnets.1 up_blocks.0.attentions.0-1",
        beside={"down_blocks.0": STAGE, "up_blocks.0": STAGE},
    ),
    Entry(
        "UNet1DModel",
        unet_1d,
        "down_blocks.0.resnets.1-2 down_blocks.1.resnets.0 down_blocks.1.attentions.0 down_blocks.1.resnets.1 "
        "down_blocks.1.attentions.1 down_blocks.1.resnets.2 down_blocks.1.attentions.2 "
        + " ".join(f"mid_block.resnets.{i} mid_block.attentions.{i}" for i in range(6))
        + " up_blocks.0.attentions.0 up_blocks.0.resnets.1 up_blocks.0.attentions.1 up_blocks.0.resnets.2 "
        "up_blocks.0.attentions.2 up_blocks.1.resnets.1",
        beside={"down_blocks": STAGE, "up_blocks": STAGE},
    ),
    Entry("SanaVideoTransformer3DModel", sana_video, "transformer_blocks.0-2"),
    Entry("torchaudio Conformer", conformer, "net.conformer_layers.0-2"),
    Entry(
        "torchvision SwinTransformer",
        swin,
        "features.1.0-1 features.3.0-1",
        beside={"features.1": STAGE, "features.3": STAGE},
    ),
    Entry(
        "timm ConvNeXt",
        convnext,
        "stages.0.blocks.0-1 stages.1.blocks.0 stages.2.blocks.0 stages.3.blocks.0",
        beside={"stages.0": STAGE},
    ),
    Entry("Wav2Vec2BertModel", wav2vec2_bert, "encoder.layers.0-2", output=HIDDEN),
    Entry("MambaModel", mamba, "layers.0-2", output=HIDDEN),
    Entry("BertModel", bert, "encoder.layer.0-2", output=HIDDEN),
    Entry("PhiModel", phi, "layers.0-2", output=HIDDEN),
    Entry("LlamaModel", llama, "layers.0-2", output=HIDDEN),
    Entry("x_transformers Encoder, scaled residuals", scaled_residuals, "layers.0-3", zeroed=("1",)),
]
