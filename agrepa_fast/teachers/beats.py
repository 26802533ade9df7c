"""BEATs (Chen et al. 2022, arXiv:2212.09058): audio [B, n] at 16 kHz -> features [B, T', width] at 6.25 Hz.

A transformer over patches of 16 frames x 16 bands of a filter bank [frames, 128]: 8 patches stand above each other in
time. A feature frame is their mean. Written anew, with the names of the published checkpoints' weights.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.libraries import import_torchaudio
from ..errors import UserError
from .base import LayeredTeacher, Teacher, torch_dtype

SAMPLE_RATE = 16_000
PATCH = 16
MELS = 128
BANDS = MELS // PATCH
SPAN, HOP = 400, 160  # samples of a filter bank's frame, and from one to the next
MEAN, STD = 15.41663, 6.55582  # of the filter banks, as published
LONGEST = 30.0  # seconds of a piece of a long recording; attention takes memory by its square

# The fields of a checkpoint's `cfg` that decide the network, with their defaults.
FIELDS: dict[str, Any] = {
    "input_patch_size": PATCH,
    "embed_dim": 512,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": False,
    "num_buckets": 320,
    "max_distance": 1280,
    "gru_rel_pos": False,
}


class _Attention(nn.Module):
    """Self-attention whose scores get a bias of relative position, gated by the query."""

    def __init__(self, config: Mapping[str, Any], has_table: bool) -> None:
        super().__init__()
        width, self.heads = config["encoder_embed_dim"], config["encoder_attention_heads"]
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.gated = bool(config["gru_rel_pos"])
        if has_table:
            self.relative_attention_bias = nn.Embedding(config["num_buckets"], self.heads)
        if self.gated:
            self.grep_linear = nn.Linear(width // self.heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        """x [B, N, D]; bias [H, N, N] or None; mask [B, 1, 1, N], 0 or -inf."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        added = mask
        if bias is not None:
            if self.gated:
                first, second = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, -1)
                bias = (first * (second * self.grep_a - 1) + 2) * bias
            added = bias + mask
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=added.to(query.dtype))
        return self.out_proj(x.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], has_table: bool) -> None:
        super().__init__()
        width = config["encoder_embed_dim"]
        self.self_attn = _Attention(config, has_table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config["encoder_ffn_embed_dim"])
        self.fc2 = nn.Linear(config["encoder_ffn_embed_dim"], width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.norm_first = bool(config["layer_norm_first"])
        self.alpha = (2 * config["encoder_layers"]) ** 0.25 if config["deep_norm"] else 1.0

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), bias, mask)
            return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, bias, mask))
        return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))


class _Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, span = config["encoder_embed_dim"], config["conv_pos"]
        position = nn.Conv1d(width, width, span, padding=span // 2, groups=config["conv_pos_groups"])
        self.pos_conv = nn.Sequential(nn.utils.parametrizations.weight_norm(position, dim=2))
        relative = bool(config["relative_position_embedding"])
        self.layers = nn.ModuleList(
            _Block(config, relative and number == 0) for number in range(config["encoder_layers"])
        )
        self.layer_norm = nn.LayerNorm(width)
        self.norm_first = bool(config["layer_norm_first"])
        self.buckets = config["num_buckets"] if relative else 0
        self.max_distance = config["max_distance"]

    def bias(self, length: int) -> Tensor | None:
        """What each head adds to the scores by relative position, [H, N, N]."""
        if not self.buckets:
            return None
        position = torch.arange(length)
        distance = position - position.unsqueeze(1)
        half = self.buckets // 2
        exact = half // 2
        far = (
            exact
            + (torch.log(distance.abs().float() / exact) / math.log(self.max_distance / exact) * (half - exact))
            .clamp(max=half - 1 - exact)
            .nan_to_num(neginf=0)
            .long()
        )
        bucket = half * (distance > 0) + torch.where(distance.abs() < exact, distance.abs(), far)
        table: Any = self.get_submodule("layers.0.self_attn.relative_attention_bias")
        return table(bucket.to(table.weight.device)).permute(2, 0, 1)

    def forward(self, x: Tensor, valid: Tensor) -> list[Tensor]:
        """x [B, N, D] and valid [B, N] to all hidden states, the final output last (once more)."""
        x = torch.where(valid.unsqueeze(-1), x, 0)
        # An even kernel gives one position too many.
        position = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]]
        x = x + F.gelu(position).transpose(1, 2)
        if not self.norm_first:
            x = self.layer_norm(x)
        # A row without anything valid is masked nowhere: its softmax would be over nothing.
        masked = ~(valid | ~valid.any(1, keepdim=True))
        mask = torch.zeros(masked.shape, device=x.device).masked_fill(masked, -torch.inf)[:, None, None]
        bias = self.bias(x.shape[1])
        states = [x]
        for block in self.layers:
            states.append(block(states[-1], bias, mask))
        return [*states, self.layer_norm(states[-1]) if self.norm_first else states[-1]]


class Beats(nn.Module):
    """The network of a checkpoint's configuration (`FIELDS`)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        embed, width = config["embed_dim"], config["encoder_embed_dim"]
        self.patch_embedding = nn.Conv2d(1, embed, PATCH, PATCH, bias=config["conv_bias"])
        self.layer_norm = nn.LayerNorm(embed)
        self.post_extract_proj = nn.Linear(embed, width) if embed != width else nn.Identity()
        self.encoder = _Encoder(config)

    def forward(self, banks: Tensor, frames: Tensor) -> list[Tensor]:
        """Normalised filter banks [B, 16 T, 128] with `frames` [B] patches in time -> hidden states [B, T, 8, D]."""
        patches = self.patch_embedding(banks.unsqueeze(1)).flatten(2).transpose(1, 2)
        valid = torch.arange(patches.shape[1], device=banks.device) // BANDS < frames.unsqueeze(1)
        states = self.encoder(self.post_extract_proj(self.layer_norm(patches)), valid)
        return [state.unflatten(1, (-1, BANDS)) for state in states]


def filter_banks(audio: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kaldi's log-mel filter banks of each clip alone, [B, 16 T, 128], and how many patches in time each fills."""
    fbank = import_torchaudio().compliance.kaldi.fbank
    counts = [max(0, (length - SPAN) // HOP + 1) // PATCH for length in lengths]
    banks = torch.zeros(len(lengths), max(1, *counts) * PATCH, MELS, device=audio.device)
    for row, (length, count) in enumerate(zip(lengths, counts)):
        if count:
            bank = fbank(audio[row : row + 1, :length] * 2**15, num_mel_bins=MELS, sample_frequency=SAMPLE_RATE)
            banks[row, : count * PATCH] = (bank[: count * PATCH] - MEAN) / (2 * STD)
    return banks.to(dtype), torch.tensor(counts, device=audio.device)


class BeatsTeacher(LayeredTeacher):
    """A published BEATs checkpoint, pre-trained or fine-tuned, read with `weights_only=True`.

    floor((floor((n - 400) / 160) + 1) / 16) frames at 6.25 Hz: the mean over the eight patches of each time. A clip
    below 0.175 s has none. Each clip's features are the same alone and in a padded batch. Frame i is centred 7.5 ms
    after (i + 0.5) / rate.

    Args:
        model: path of the checkpoint.
        layer: see `LayeredTeacher`; 0 is the input of the first block.
        dtype: "float32" (default), "bfloat16" or "float16".

    Raises:
        UserError: not a BEATs checkpoint, or a layer or dtype that does not exist.
    """

    def __init__(self, model: str, *, layer: int | None = None, dtype: str = "float32") -> None:
        config, weights = read_checkpoint(model)
        super().__init__(
            model,
            layers=config["encoder_layers"],
            layer=layer,
            width=config["encoder_embed_dim"],
            rate=SAMPLE_RATE / HOP / PATCH,
            sample_rate=SAMPLE_RATE,
            longest=LONGEST,
        )
        self.model = load_network(model, config, weights).to(torch_dtype(dtype))
        self.freeze()

    def encode_states(self, audio: Tensor, lengths: Tensor, layers: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """See `LayeredTeacher`."""
        banks, frames = filter_banks(audio, lengths.tolist(), self.model.patch_embedding.weight.dtype)
        *states, last = self.model(banks, frames)
        chosen = [last if layer is None else states[layer] for layer in layers]
        mask = torch.arange(last.shape[1], device=audio.device) < frames.unsqueeze(1)
        return torch.cat([state.float().mean(2) for state in chosen], -1), mask


class BeatsTokens(Teacher):
    """The tokens of a published BEATs tokenizer: for each patch the nearest of its codes, 50 tokens a second.

    The eight patches of a time follow each other from low to high frequencies. Features are whole numbers, [B, T', 1].

    Args:
        model: path of the tokenizer's checkpoint (Tokenizer_iter*.pt).

    Raises:
        UserError: not the checkpoint of a BEATs tokenizer.
    """

    grain = BANDS

    def __init__(self, model: str) -> None:
        config, weights = read_checkpoint(model)
        rate = SAMPLE_RATE / HOP / PATCH
        super().__init__(model, width=1, rate=rate * BANDS, sample_rate=SAMPLE_RATE, longest=LONGEST)
        try:
            codes = weights["quantize.embedding.weight"]
            first, second = (weights[f"quantize_layer.{number}.weight"] for number in (0, 2))
            biases = [weights[f"quantize_layer.{number}.bias"] for number in (0, 2)]
        except KeyError as error:
            raise UserError(f"tokenizer {model!r}: a BEATs model without codes: give a Tokenizer_iter*.pt") from error
        self.model = load_network(model, config, weights)
        self.project = nn.Sequential(nn.Linear(*first.shape[::-1]), nn.Tanh(), nn.Linear(*second.shape[::-1]))
        self.project.load_state_dict({"0.weight": first, "0.bias": biases[0], "2.weight": second, "2.bias": biases[1]})
        self.register_buffer("codes", codes)
        self.codes: Tensor
        self.freeze()

    def encode(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `Teacher.encode`."""
        banks, frames = filter_banks(audio, lengths.tolist(), torch.float32)
        points = F.normalize(self.project(self.model(banks, frames)[-1].flatten(1, 2)), dim=-1)
        distance = self.codes.square().sum(-1) - 2 * points @ self.codes.T
        tokens = distance.argmin(-1)
        mask = torch.arange(tokens.shape[1], device=audio.device) < BANDS * frames.unsqueeze(1)
        return tokens.unsqueeze(-1).float(), mask


def read_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration (`FIELDS`) and the weights of a published checkpoint.

    Raises:
        UserError: no such file, not such a checkpoint, or a configuration that is not supported.
    """
    if not Path(path).is_file():
        raise UserError(f"teacher {path!r}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        given, weights = dict(checkpoint["cfg"]), dict(checkpoint["model"])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"teacher {path!r}: not a BEATs checkpoint with cfg and model ({reason})") from error
    config = {name: given.get(name, default) for name, default in FIELDS.items()}
    for name, default in FIELDS.items():
        kinds = (bool, int) if isinstance(default, (bool, int)) else (str,)
        if not isinstance(config[name], kinds):
            raise UserError(f"teacher {path!r}: cfg.{name} is {config[name]!r}, expected a value like {default!r}")
    for name in ("input_patch_size", "activation_fn"):
        if config[name] != FIELDS[name]:
            raise UserError(f"teacher {path!r}: cfg.{name} {config[name]!r} is not supported, only {FIELDS[name]!r}")
    return config, weights


def load_network(path: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Beats:
    """The network with the weights of a checkpoint; what else the checkpoint has (a classifier) is left out.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    with torch.device("meta"):
        network = Beats(config)
    network = network.to_empty(device="cpu")
    try:
        report = network.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise UserError(
            f"teacher {path!r}: the weights do not fit cfg ({str(error).splitlines()[-1].strip()})"
        ) from error
    if report.missing_keys:
        raise UserError(
            f"teacher {path!r}: the file lacks {len(report.missing_keys)} weights, {report.missing_keys[0]!r} first"
        )
    return network
