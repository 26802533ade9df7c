"""Video transformers of diffusers."""

from __future__ import annotations

import diffusers
import torch

from .entry import Draw, Entry, N
from .images import HEADS, IMAGE_FIRST, PADDED, STEPS


def video(frames: int = 1) -> dict[str, torch.Tensor]:
    draw = Draw()
    return {
        "hidden_states": draw(N, 3, frames, 4, 4),
        "encoder_hidden_states": draw(N, 3, 12),
        "timestep": STEPS,
    }


def hunyuan_video():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1}
    widths = {"text_embed_dim": 12, "pooled_projection_dim": 10, "rope_axes_dim": (2, 2, 4), "guidance_embeds": False}
    model = diffusers.HunyuanVideoTransformer3DModel(**sizes, **widths, **HEADS)
    return model, {**video(), "encoder_attention_mask": PADDED, "pooled_projections": Draw()(N, 10)}


def wan(**options):
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32}
    return diffusers.WanTransformer3DModel(**sizes, **HEADS, rope_max_seq_len=8, **options), video()


def ltx():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "cross_attention_dim": 16, "caption_channels": 12}
    inputs = {"hidden_states": Draw()(N, 4, 3), "encoder_attention_mask": PADDED}
    model = diffusers.LTXVideoTransformer3DModel(**sizes, **HEADS)
    return model, {**video(), **inputs, "num_frames": 1, "height": 2, "width": 2}


def ltx2():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 2, "cross_attention_dim": 16, "caption_channels": 12}
    audio = {"audio_in_channels": 3, "audio_out_channels": 3, "audio_cross_attention_dim": 16}
    heads = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8}
    draw = Draw()
    inputs = {"hidden_states": draw(N, 4, 3), "audio_hidden_states": draw(N, 5, 3), "timestep": STEPS.double()}
    texts = {"encoder_hidden_states": draw(N, 3, 12), "audio_encoder_hidden_states": draw(N, 3, 12)}
    model = diffusers.LTX2VideoTransformer3DModel(**sizes, **audio, **heads, **HEADS)
    return model, {**inputs, **texts, "num_frames": 1, "height": 2, "width": 2, "audio_num_frames": 5}


def cogvideox():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "time_embed_dim": 8, "text_embed_dim": 12}
    video_sizes = {"sample_width": 4, "sample_height": 4, "sample_frames": 1, "max_text_seq_length": 3}
    model = diffusers.CogVideoXTransformer3DModel(**sizes, **video_sizes, **HEADS)
    return model, {**video(), "hidden_states": Draw()(N, 1, 3, 4, 4)}


def mochi():
    sizes = {"num_layers": 3, "in_channels": 3, "text_embed_dim": 16, "pooled_projection_dim": 8, "time_embed_dim": 4}
    model = diffusers.MochiTransformer3DModel(**sizes, num_attention_heads=8, attention_head_dim=4)
    return model, {**video(), "encoder_hidden_states": Draw()(N, 3, 16), "encoder_attention_mask": PADDED.bool()}


def latte():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 2, "sample_size": 4, "patch_size": 2}
    norms = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False}
    more = {"cross_attention_dim": 16, "caption_channels": 12, "video_length": 2, "activation_fn": "gelu-approximate"}
    return diffusers.LatteTransformer3DModel(**sizes, **norms, **more, **HEADS), video(2)


ENTRIES = [
    Entry(
        "HunyuanVideoTransformer3DModel",
        hunyuan_video,
        "transformer_blocks.0-1 single_transformer_blocks.0-1",
        IMAGE_FIRST,
        beside={"context_embedder.token_refiner.refiner_blocks": "they refine the text alone"},
    ),
    Entry("WanTransformer3DModel", wan, "blocks.0-2"),
    Entry("LTXVideoTransformer3DModel", ltx, "transformer_blocks.0-2"),
    Entry("LTX2VideoTransformer3DModel", ltx2, "transformer_blocks.0-1", "hidden_states audio_hidden_states"),
    Entry("CogVideoXTransformer3DModel", cogvideox, "transformer_blocks.0-2", IMAGE_FIRST),
    Entry("MochiTransformer3DModel", mochi, "transformer_blocks.0-2", IMAGE_FIRST, single=True),
    Entry(
        "LatteTransformer3DModel",
        latte,
        "transformer_blocks.0 temporal_transformer_blocks.0 transformer_blocks.1 temporal_transformer_blocks.1",
        "hidden_states",
    ),
]
