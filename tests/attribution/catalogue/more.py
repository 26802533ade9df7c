"""More image and video transformers of diffusers, most of them relatives of those in images.py and videos.py."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .entry import Draw, Entry, N
from .images import HEADS, IMAGE_FIRST, JOINT, PADDED, STEPS, TWO_LISTS, ids, times
from .videos import video

LISTS = {**HEADS, "num_layers": 2, "num_single_layers": 2}
BOTH = "transformer_blocks.0-1 single_transformer_blocks.0-1"
ROPE = {"axes_dims_rope": (2, 2, 4), "joint_attention_dim": 12, "in_channels": 4}
REFINED = {"context_embedder.token_refiner.refiner_blocks": "they refine the text alone"}


def tokens(axes: int = 3) -> dict[str, Any]:
    draw = Draw()
    states = {"hidden_states": draw(N, 4, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    return {**states, "img_ids": ids(4, axes), "txt_ids": ids(3, axes)}


def bria_fibo():
    layers = [Draw()(N, 3, 8) for _ in range(4)]
    return diffusers.BriaFiboTransformer2DModel(**LISTS, **ROPE, text_encoder_dim=8), {
        **tokens(),
        "text_encoder_layers": layers,
    }


def flux3():
    sizes = {**ROPE, "cond_in_channels": 4, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)}
    return diffusers.Flux3Transformer2DModel(**LISTS, **sizes), tokens(4)


def ernie_image():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 32, "text_in_dim": 12}
    model = diffusers.ErnieImageTransformer2DModel(**sizes, in_channels=4, out_channels=4, rope_axes_dim=(4, 2, 2))
    draw = Draw()
    inputs = {"hidden_states": draw(N, 4, 2, 2), "timestep": STEPS.double(), "text_bth": draw(N, 3, 12)}
    return model, {**inputs, "text_lens": torch.tensor([3, 2])}


def krea2():
    text = {"text_hidden_dim": 12, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1}
    more = {"text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    sizes = {"in_channels": 4, "num_layers": 3, "num_key_value_heads": 1, "intermediate_size": 32}
    model = diffusers.Krea2Transformer2DModel(
        **sizes, **text, **more, **HEADS, timestep_embed_dim=8, axes_dims_rope=(4, 2, 2)
    )
    draw = Draw()
    inputs = {"hidden_states": draw(N, 4, 4), "encoder_hidden_states": draw(N, 3, 2, 12), "timestep": times()}
    return model, {**inputs, "position_ids": ids(7)}


def hidream():
    sizes = {"patch_size": 2, "in_channels": 3, "out_channels": 3, "text_emb_dim": 8, "max_resolution": (4, 4)}
    experts = {"num_routed_experts": 2, "num_activated_experts": 1, "llama_layers": [0, 1, 0, 1]}
    model = diffusers.HiDreamImageTransformer2DModel(
        **LISTS, **sizes, **experts, caption_channels=[12, 10], axes_dims_rope=(4, 2, 2)
    )
    draw = Draw()
    texts = {"encoder_hidden_states_t5": draw(N, 3, 12), "encoder_hidden_states_llama3": draw(2, N, 3, 10)}
    return model, {"hidden_states": draw(N, 3, 4, 4), "timesteps": STEPS, "pooled_embeds": draw(N, 8), **texts}


def hunyuan_dit():
    sizes = {"in_channels": 3, "patch_size": 2, "sample_size": 4, "hidden_size": 16, "num_layers": 4, "text_len": 3}
    texts = {"cross_attention_dim": 12, "cross_attention_dim_t5": 16, "pooled_projection_dim": 8, "text_len_t5": 2}
    model = diffusers.HunyuanDiT2DModel(**sizes, **texts, **HEADS, use_style_cond_and_image_meta_size=False)
    draw = Draw()
    states = {"hidden_states": draw(N, 3, 4, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": STEPS.double()}
    second = {"encoder_hidden_states_t5": draw(N, 2, 16), "text_embedding_mask_t5": torch.ones(N, 2).long()}
    return model, {**states, **second, "text_embedding_mask": PADDED}


def hunyuan_image():
    sizes = {"in_channels": 3, "out_channels": 3, "num_refiner_layers": 1, "text_embed_dim": 12}
    draw = Draw()
    states = {"hidden_states": draw(N, 3, 4, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": STEPS.double()}
    model = diffusers.HunyuanImageTransformer2DModel(**LISTS, **sizes, rope_axes_dim=(4, 4))
    return model, {**states, "encoder_attention_mask": PADDED}


def hunyuan_video15():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "num_refiner_layers": 1, "rope_axes_dim": (2, 2, 4)}
    texts = {"text_embed_dim": 12, "text_embed_2_dim": 10, "image_embed_dim": 8}
    draw = Draw()
    second = {"encoder_hidden_states_2": draw(N, 2, 10), "encoder_attention_mask_2": torch.ones(N, 2).long()}
    inputs = {**video(), **second, "timestep": STEPS.double(), "encoder_attention_mask": PADDED}
    model = diffusers.HunyuanVideo15Transformer3DModel(**sizes, **texts, **HEADS)
    return model, {**inputs, "image_embeds": draw(N, 2, 8)}


def cosmos():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "text_embed_dim": 12, "adaln_lora_dim": 4}
    model = diffusers.CosmosTransformer3DModel(
        **sizes, num_attention_heads=2, attention_head_dim=12, max_size=(4, 4, 4)
    )
    return model, {**video(), "timestep": times(), "padding_mask": torch.zeros(1, 1, 4, 4).double()}


def kandinsky5():
    sizes = {"in_visual_dim": 3, "out_visual_dim": 3, "in_text_dim": 12, "in_text_dim2": 10, "time_dim": 8}
    more = {"model_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (2, 2, 4)}
    draw = Draw()
    states = {"hidden_states": draw(N, 1, 4, 4, 3), "encoder_hidden_states": draw(N, 3, 12), "timestep": STEPS.double()}
    places = {"visual_rope_pos": (torch.arange(1), torch.arange(2), torch.arange(2)), "text_rope_pos": torch.arange(3)}
    return diffusers.Kandinsky5Transformer3DModel(**sizes, **more), {
        **states,
        **places,
        "pooled_projections": draw(N, 10),
    }


def wan_relative(name: str, inputs: dict[str, Any], **options):
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32}
    return getattr(diffusers, name)(**sizes, **HEADS, rope_max_seq_len=8, **options), {**video(), **inputs}


def motif_video():
    sizes = {"in_channels": 3, "out_channels": 3, "text_embed_dim": 12, "rope_axes_dim": (2, 2, 4)}
    return diffusers.MotifVideoTransformer3DModel(**LISTS, **sizes), video()


def allegro():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "cross_attention_dim": 24, "caption_channels": 12}
    frames = {"sample_height": 4, "sample_width": 4, "sample_frames": 1}
    model = diffusers.AllegroTransformer3DModel(**sizes, **frames, num_attention_heads=2, attention_head_dim=12)
    return model, {**video(), "image_rotary_emb": None}


IMAGES = [
    Entry("BriaTransformer2DModel", lambda: (diffusers.BriaTransformer2DModel(**LISTS, **ROPE), tokens()), BOTH, JOINT),
    Entry(
        "BriaFiboTransformer2DModel",
        bria_fibo,
        BOTH,
        TWO_LISTS,
        beside={"caption_projection": "projections"},
    ),
    Entry("ErnieImageTransformer2DModel", ernie_image, "layers.0-2"),
    Entry(
        "Flux3Transformer2DModel",
        flux3,
        "mode_blocks.image.0-1 single_transformer_blocks.0-1",
        {"mode_blocks.image": "", "single_transformer_blocks": JOINT},
        beside={"txt_mode_blocks": "blocks over the text alone, before it joins the image"},
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        hidream,
        "double_stream_blocks.0-1 single_stream_blocks.0-1",
        {"double_stream_blocks": IMAGE_FIRST, "single_stream_blocks": "hidden_states"},
    ),
    Entry("HunyuanDiT2DModel", hunyuan_dit, "blocks.0-3"),
    Entry("HunyuanImageTransformer2DModel", hunyuan_image, BOTH, IMAGE_FIRST, beside=REFINED),
    Entry("Krea2Transformer2DModel", krea2, "transformer_blocks.0-2", beside={"text_fusion": "blocks over the text"}),
    Entry(
        "LongCatImageTransformer2DModel",
        lambda: (diffusers.LongCatImageTransformer2DModel(**LISTS, **ROPE), tokens()),
        BOTH,
        JOINT,
    ),
    Entry(
        "OvisImageTransformer2DModel",
        lambda: (diffusers.OvisImageTransformer2DModel(**LISTS, **ROPE, out_channels=4), tokens()),
        BOTH,
        JOINT,
    ),
]
VIDEOS = [
    Entry("AllegroTransformer3DModel", allegro, "transformer_blocks.0-2"),
    Entry("CosmosTransformer3DModel", cosmos, "transformer_blocks.0-2", single=True),
    Entry("HunyuanVideo15Transformer3DModel", hunyuan_video15, "transformer_blocks.0-2", IMAGE_FIRST, beside=REFINED),
    Entry(
        "Kandinsky5Transformer3DModel",
        kandinsky5,
        "visual_transformer_blocks.0-2",
        beside={"text_transformer_blocks": "blocks over the text"},
        single=True,
    ),
    Entry("MotifVideoTransformer3DModel", motif_video, BOTH, IMAGE_FIRST, single=True),
    Entry("SkyReelsV2Transformer3DModel", lambda: wan_relative("SkyReelsV2Transformer3DModel", {}), "blocks.0-2"),
    Entry(
        "WanVACETransformer3DModel",
        lambda: wan_relative(
            "WanVACETransformer3DModel",
            {"control_hidden_states": Draw()(N, 4, 1, 4, 4)},
            vace_layers=[0, 2],
            vace_in_channels=4,
        ),
        "blocks.0-2",
        beside={"vace_blocks": "they make the control signals that the blocks add"},
    ),
]
