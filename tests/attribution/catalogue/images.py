"""Image transformers of diffusers."""

from __future__ import annotations

import diffusers
import torch

from .entry import Draw, Entry, N

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PADDED = torch.tensor([[1, 1, 1], [1, 1, 0]])
STEPS = torch.tensor([200, 700])
JOINT = "encoder_hidden_states hidden_states"
IMAGE_FIRST = "hidden_states encoder_hidden_states"


def times() -> torch.Tensor:
    return torch.tensor([0.2, 0.7]).double()


def ids(count: int, axes: int = 3) -> torch.Tensor:
    """[count, axes] positions of tokens, as pipelines of FLUX make them."""
    places = torch.arange(count)
    return torch.stack([0 * places, places // 2, places % 2, places][:axes], -1)


def image(text: int = 3) -> dict[str, torch.Tensor]:
    draw = Draw()
    return {"hidden_states": draw(N, 3, 4, 4), "encoder_hidden_states": draw(N, text, 12)}


def flux(text: int = 3):
    sizes = {"in_channels": 4, "num_layers": 2, "num_single_layers": 3, "axes_dims_rope": (2, 2, 4)}
    model = diffusers.FluxTransformer2DModel(**sizes, **HEADS, joint_attention_dim=12, pooled_projection_dim=10)
    draw = Draw()
    tokens = {"hidden_states": draw(N, 4, 4), "encoder_hidden_states": draw(N, text, 12)}
    places = {"img_ids": ids(4), "txt_ids": ids(text)}
    return model, {**tokens, **places, "pooled_projections": draw(N, 10), "timestep": times()}


def flux2():
    sizes = {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (2, 2, 2, 2)}
    options = {"joint_attention_dim": 12, "timestep_guidance_channels": 8, "guidance_embeds": False}
    draw = Draw()
    inputs = {"hidden_states": draw(N, 4, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    model = diffusers.Flux2Transformer2DModel(**sizes, **HEADS, **options)
    return model, {**inputs, "img_ids": ids(4, 4), "txt_ids": ids(3, 4)}


def chroma():
    sizes = {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (2, 2, 4)}
    guidance = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model = diffusers.ChromaTransformer2DModel(**sizes, **HEADS, **guidance, joint_attention_dim=12)
    draw = Draw()
    inputs = {"hidden_states": draw(N, 4, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    return model, {**inputs, "img_ids": ids(4), "txt_ids": ids(3)}


def sd3(**options):
    sizes = {"sample_size": 4, "num_layers": 3, "in_channels": 3, "out_channels": 3, "pos_embed_max_size": 4}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    model = diffusers.SD3Transformer2DModel(**sizes, **widths, **HEADS, **options)
    return model, {**image(), "pooled_projections": Draw()(N, 10), "timestep": times()}


def auraflow():
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "num_mmdit_layers": 2, "num_single_dit_layers": 2}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 4}
    return diffusers.AuraFlowTransformer2DModel(**sizes, **widths, **HEADS), {**image(), "timestep": times()}


def cogview4():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "sample_size": 4, "rope_axes_dim": (4, 4)}
    widths = {"text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4}
    size = torch.full((N, 2), 4.0)
    inputs = {"timestep": STEPS, "original_size": size, "target_size": size, "crop_coords": 0 * size}
    return diffusers.CogView4Transformer2DModel(**sizes, **widths, **HEADS), {**image(), **inputs}


def cogview3():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "sample_size": 4, "pos_embed_max_size": 4}
    widths = {"text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4}
    size = torch.full((N, 2), 4.0)
    inputs = {"timestep": STEPS, "original_size": size, "target_size": size, "crop_coords": 0 * size}
    return diffusers.CogView3PlusTransformer2DModel(**sizes, **widths, **HEADS), {**image(), **inputs}


def lumina2():
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "hidden_size": 16, "num_layers": 3}
    heads = {"num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "cap_feat_dim": 12}
    axes = {"axes_dim_rope": (4, 2, 2), "axes_lens": (16, 16, 16)}
    model = diffusers.Lumina2Transformer2DModel(**sizes, **heads, **axes)
    return model, {**image(), "timestep": times(), "encoder_attention_mask": PADDED.bool()}


def pixart():
    sizes = {"in_channels": 3, "out_channels": 6, "num_layers": 3, "norm_num_groups": 1, "sample_size": 4}
    widths = {"cross_attention_dim": 16, "caption_channels": 12, "use_additional_conditions": False}
    added = {"resolution": None, "aspect_ratio": None}
    inputs = {"timestep": STEPS, "added_cond_kwargs": added, "encoder_attention_mask": PADDED}
    return diffusers.PixArtTransformer2DModel(**sizes, **widths, **HEADS), {**image(), **inputs}


def sana():
    sizes = {"in_channels": 3, "out_channels": 3, "num_layers": 3, "sample_size": 4, "caption_channels": 12}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    return diffusers.SanaTransformer2DModel(**sizes, **cross, **HEADS), {**image(), "timestep": STEPS}


def dit():
    sizes = {"num_layers": 3, "sample_size": 4, "in_channels": 3, "out_channels": 3, "norm_num_groups": 1}
    model = diffusers.DiTTransformer2DModel(**sizes, **HEADS, num_embeds_ada_norm=10)
    return model, {"hidden_states": Draw()(N, 3, 4, 4), "timestep": STEPS, "class_labels": torch.tensor([1, 4])}


def qwen_image():
    sizes = {"in_channels": 4, "out_channels": 1, "num_layers": 3, "axes_dims_rope": (2, 2, 4)}
    draw = Draw()
    inputs = {"hidden_states": draw(N, 4, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    model = diffusers.QwenImageTransformer2DModel(**sizes, **HEADS, joint_attention_dim=12)
    return model, {**inputs, "encoder_hidden_states_mask": PADDED.bool(), "img_shapes": [[(1, 2, 2)]] * N}


def z_image():
    sizes = {"in_channels": 3, "dim": 16, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    model = diffusers.ZImageTransformer2DModel(**sizes, cap_feat_dim=12, axes_dims=[2, 2, 4], axes_lens=[64, 16, 16])
    draw = Draw()
    return model, {
        "x": [draw(3, 1, 4, 4) for _ in range(N)],
        "t": times(),
        "cap_feats": [draw(3, 12) for _ in range(N)],
    }


def prx():
    sizes = {"in_channels": 3, "context_in_dim": 12, "hidden_size": 16, "num_heads": 2, "depth": 3, "axes_dim": [4, 4]}
    return diffusers.PRXTransformer2DModel(**sizes), {**image(), "timestep": times()}


def unet():
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16)}
    more = {"layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 12, "attention_head_dim": 4}
    model = diffusers.UNet2DConditionModel(**sizes, **more, down_block_types=down, up_block_types=up)
    draw = Draw()
    return model, {"sample": draw(N, 3, 4, 4), "timestep": STEPS, "encoder_hidden_states": draw(N, 3, 12)}


TWO_LISTS = {"transformer_blocks": JOINT, "single_transformer_blocks": "hidden_states"}
TEXT = {"context_refiner": "it refines the text before it joins the image"}
REFINERS = "noise_refiner.0 layers.0-2"

ENTRIES = [
    Entry("FluxTransformer2DModel", flux, "transformer_blocks.0-1 single_transformer_blocks.0-2", JOINT),
    Entry(
        "FluxTransformer2DModel, as many text tokens as samples",
        lambda: flux(text=N),
        "transformer_blocks.0-1 single_transformer_blocks.0-2",
        JOINT,
    ),
    Entry("Flux2Transformer2DModel", flux2, "transformer_blocks.0-1 single_transformer_blocks.0-1", TWO_LISTS),
    Entry(
        "ChromaTransformer2DModel",
        chroma,
        "transformer_blocks.0-1 single_transformer_blocks.0-1",
        TWO_LISTS,
        beside={"distilled_guidance_layer.layers": "they make the modulation out of the timestep"},
    ),
    Entry("SD3Transformer2DModel", sd3, "transformer_blocks.0-2", JOINT),
    Entry(
        "SD3Transformer2DModel, dual attention",
        lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        "transformer_blocks.0-2",
        JOINT,
    ),
    Entry(
        "AuraFlowTransformer2DModel",
        auraflow,
        "joint_transformer_blocks.0-1 single_transformer_blocks.0-1",
        {"joint_transformer_blocks": JOINT, "single_transformer_blocks": "hidden_states"},
    ),
    Entry("CogView3PlusTransformer2DModel", cogview3, "transformer_blocks.0-2", IMAGE_FIRST),
    Entry("CogView4Transformer2DModel", cogview4, "transformer_blocks.0-2", IMAGE_FIRST),
    Entry("Lumina2Transformer2DModel", lumina2, REFINERS, beside=TEXT),
    Entry("PixArtTransformer2DModel", pixart, "transformer_blocks.0-2"),
    Entry("SanaTransformer2DModel", sana, "transformer_blocks.0-2"),
    Entry("DiTTransformer2DModel", dit, "transformer_blocks.0-2"),
    Entry("QwenImageTransformer2DModel", qwen_image, "transformer_blocks.0-2", JOINT),
    Entry("ZImageTransformer2DModel", z_image, REFINERS, beside=TEXT, output=lambda output: torch.stack(output.sample)),
    Entry("PRXTransformer2DModel", prx, "blocks.0-2"),
]
