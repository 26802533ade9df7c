"""Audio transformers: of diffusers, f5-tts, x-transformers and voicebox-pytorch, and two forms that others use."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from x_transformers import ContinuousTransformerWrapper, Encoder

from .entry import Draw, Entry, N
from .images import HEADS, PADDED, times
from .packages import f5_tts, voicebox


def stable_audio(rows: int = 5):
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "num_layers": 3, "time_proj_dim": 8}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_attention_heads": 1}
    widths = {"cross_attention_dim": 8, "global_states_input_dim": 10, "cross_attention_input_dim": 12}
    draw = Draw()
    inputs = {"hidden_states": draw(N, 3, rows - 1), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    globals_ = {"global_hidden_states": draw(N, 1, 10), "rotary_embedding": (draw(rows, 4), draw(rows, 4))}
    return diffusers.StableAudioDiTModel(**sizes, **heads, **widths), {**inputs, **globals_}


def stable_audio3():
    sizes = {"io_channels": 3, "embed_dim": 64, "depth": 3, "num_heads": 2, "cond_token_dim": 12}
    more = {"global_cond_dim": 10, "local_add_cond_dim": 3, "timestep_features_dim": 8, "num_memory_tokens": 2}
    draw = Draw()
    inputs = {"hidden_states": draw(N, 3, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    return diffusers.StableAudio3DiTModel(**sizes, **more), {**inputs, "global_hidden_states": draw(N, 10)}


def ace_step():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8, "in_channels": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    model = diffusers.AceStepTransformer1DModel(**sizes, **heads, audio_acoustic_hidden_dim=4, encoder_hidden_size=12)
    draw = Draw()
    inputs = {"hidden_states": draw(N, 6, 4), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    return model, {**inputs, "timestep_r": times(), "context_latents": draw(N, 6, 8)}


def minimax_music3():
    sizes = {"in_channels": 3, "condition_dim": 12, "num_layers": 3, "ff_inner_dim": 32, "rotary_dim": 4}
    draw = Draw()
    inputs = {"hidden_states": draw(N, 3, 4), "encoder_hidden_states": draw(N, 4, 12), "timestep": times()}
    return diffusers.MiniMaxMusic3Transformer1DModel(**sizes, **HEADS, fourier_embedding_dim=8), inputs


def longcat(**options):
    sizes = {"dit_dim": 16, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 3}
    draw = Draw()
    inputs = {"hidden_states": draw(N, 4, 3), "encoder_hidden_states": draw(N, 3, 12), "timestep": times()}
    model = diffusers.LongCatAudioDiTTransformer(**sizes, use_latent_condition=False, **options)
    return model, {**inputs, "encoder_attention_mask": PADDED.bool()}


def f5_inputs(masked: bool = True):
    draw = Draw()
    inputs = {
        "x": draw(N, 7, 6),
        "cond": draw(N, 7, 6),
        "text": torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]]),
        "time": times(),
    }
    return {**inputs, "mask": torch.arange(7) < torch.tensor([[5], [7]])} if masked else inputs


F5_SIZES = {"dim": 32, "heads": 2, "dim_head": 16, "ff_mult": 2, "mel_dim": 6, "text_num_embeds": 9}


def f5_dit(masked: bool = True, **options):
    return f5_tts("dit", "DiT")(**F5_SIZES, depth=3, conv_layers=1, **options), f5_inputs(masked)


def f5_mmdit():
    return f5_tts("mmdit", "MMDiT")(**F5_SIZES, depth=3), f5_inputs()


def f5_unett(**options):
    return f5_tts("unett", "UNetT")(**F5_SIZES, depth=4, **options), f5_inputs()


def x_transformer():
    layers = Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    return ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=8, attn_layers=layers), (Draw()(N, 5, 3),)


def voicebox_model():
    sizes = {"dim_in": 3, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_register_tokens": 2}
    model = voicebox("VoiceBox")(**sizes, num_cond_tokens=9, dim_cond_emb=4, conv_pos_embed_kernel_size=3)
    draw = Draw()
    tokens = {"cond_token_ids": torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 8, 8]]), "cond_drop_prob": 0.0}
    return model, {"x": draw(N, 5, 3), "cond": draw(N, 5, 3), "times": times(), **tokens}


class MatchaDecoder(nn.Module):
    """The U-Net of Matcha-TTS and CosyVoice: each stage is a list of a resnet, a list of transformer blocks, and a
    convolution; the stages of the way up join what those of the way down left."""

    class Resnet(nn.Module):
        def __init__(self, inner: int, outer: int) -> None:
            super().__init__()
            self.conv, self.time = nn.Conv1d(inner, outer, 3, padding=1), nn.Linear(8, outer)
            self.straight = nn.Conv1d(inner, outer, 1)

        def forward(self, x, mask, t):
            return torch.tanh(self.conv(x * mask) + self.time(t)[..., None]) * mask + self.straight(x * mask)

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def stage(inner: int) -> nn.ModuleList:
            blocks = [BasicTransformerBlock(width, 2, 8, activation_fn="gelu") for _ in range(2)]
            return nn.ModuleList([self.Resnet(inner, width), nn.ModuleList(blocks)])

        self.time = nn.Linear(1, 8)
        self.down_blocks = nn.ModuleList([nn.ModuleList([*stage(6), nn.Conv1d(width, width, 3, 2, 1)])])
        self.mid_blocks = nn.ModuleList([stage(width)])
        self.up_blocks = nn.ModuleList([nn.ModuleList([*stage(2 * width), nn.Conv1d(width, 3, 3, 1, 1)])])

    def forward(self, x, mask, mu, t):
        t = torch.sin(self.time(t[:, None]))
        x, kept = torch.cat([x, mu], 1), []

        def run(resnet, blocks, x, mask):
            x = resnet(x, mask, t).mT
            for block in blocks:
                x = block(hidden_states=x, timestep=t)
            return x.mT

        for resnet, blocks, down in self.down_blocks:
            x = run(resnet, blocks, x, mask)
            kept.append((x, mask))
            x, mask = down(x * mask), mask[..., ::2]
        for resnet, blocks in self.mid_blocks:
            x = run(resnet, blocks, x, mask)
        for resnet, blocks, last in self.up_blocks:
            skip, mask = kept.pop()
            x = x.repeat_interleave(2, -1)[..., : skip.shape[-1]]
            x = run(resnet, blocks, torch.cat([x, skip], 1), mask)
            x = last(x * mask)
        return x * mask


def matcha():
    draw = Draw()
    return MatchaDecoder(), {
        "x": draw(N, 3, 6),
        "mask": torch.ones(N, 1, 6).double(),
        "mu": draw(N, 3, 6),
        "t": times(),
    }


class MMAudioLike(nn.Module):
    """As in MMAudio: joint blocks over three streams, given by position, then blocks over the latent alone."""

    class Joint(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

        def forward(self, latent, clip, text, c):
            shared = sum(torch.tanh(p(s)).mean(1, keepdim=True) for p, s in zip(self.parts, (latent, clip, text)))
            return latent + torch.sin(latent) * shared * c, clip + shared.cos() * clip, text + shared * text

    class Fused(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x, c):
            return x + torch.tanh(self.linear(x) * (1 + c))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.head, self.tail = nn.Linear(3, width), nn.Linear(width, 3)
        self.clip, self.text, self.time = nn.Linear(5, width), nn.Linear(4, width), nn.Linear(1, width)
        self.joint_blocks = nn.ModuleList(self.Joint(width) for _ in range(2))
        self.fused_blocks = nn.ModuleList(self.Fused(width) for _ in range(3))

    def forward(self, latent, t, clip_f, text_f):
        latent, clip, text, c = self.head(latent), self.clip(clip_f), self.text(text_f), self.time(t[:, None, None])
        for joint in self.joint_blocks:
            latent, clip, text = joint(latent, clip, text, c)
        c = c + clip.mean(1, keepdim=True)
        for fused in self.fused_blocks:
            latent = fused(latent, c)
        return self.tail(latent)


def mmaudio_like():
    draw = Draw()
    return MMAudioLike(), {"latent": draw(N, 5, 3), "t": times(), "clip_f": draw(N, 4, 5), "text_f": draw(N, 3, 4)}


TEXT = {"text_embed.text_blocks": "convolutions over the text before it joins the audio"}
F5_BLOCKS, F5_STATES = "transformer_blocks.0-2", "c x"

ENTRIES = [
    Entry("StableAudioDiTModel", stable_audio, "transformer_blocks.0-2"),
    Entry("StableAudioDiTModel, as many rotary rows as samples", lambda: stable_audio(N), "transformer_blocks.0-2"),
    Entry("StableAudio3DiTModel", stable_audio3, "transformer_blocks.0-2"),
    Entry("AceStepTransformer1DModel", ace_step, "layers.0-2", single=True),
    Entry("MiniMaxMusic3Transformer1DModel", minimax_music3, "transformer_blocks.0-2"),
    Entry(
        "LongCatAudioDiTTransformer", longcat, "blocks.0-2", beside={"text_conv_layer": "convolutions over the text"}
    ),
    Entry("f5_tts DiT", f5_dit, F5_BLOCKS, mask="mask", beside=TEXT),
    Entry("f5_tts DiT, no mask", lambda: f5_dit(False), F5_BLOCKS, beside=TEXT),
    Entry("f5_tts DiT, long skip", lambda: f5_dit(long_skip_connection=True), F5_BLOCKS, mask="mask", beside=TEXT),
    Entry("f5_tts MMDiT", f5_mmdit, F5_BLOCKS, F5_STATES, mask="mask"),
    Entry("f5_tts UNetT", f5_unett, "layers.0-3", zeroed=("2", "4"), mask="mask"),
    Entry(
        "f5_tts UNetT, added skips",
        lambda: f5_unett(skip_connect_type="add"),
        "layers.0-3",
        zeroed=("2", "4"),
        mask="mask",
    ),
    Entry("x_transformers ContinuousTransformerWrapper", x_transformer, "attn_layers.layers.0-3", zeroed=("1",)),
    Entry("voicebox_pytorch VoiceBox", voicebox_model, "transformer.layers.0-1", zeroed=("3", "5")),
    Entry(
        "Matcha-TTS decoder",
        matcha,
        "down_blocks.0.1.0-1 mid_blocks.0.1.0-1 up_blocks.0.1.0-1",
        beside={"mid_blocks.0.0": "a resnet; those of the other stages change the shape"},
    ),
    Entry(
        "MMAudio-like network",
        mmaudio_like,
        "joint_blocks.0-1 fused_blocks.0-2",
        {"joint_blocks": "latent clip text", "fused_blocks": "x"},
    ),
]
