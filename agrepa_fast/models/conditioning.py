"""Token condition: tokens [B, S, K] -> embedding [B, T, C] on the mel's time axis, beside the reference mel.

There is one token stream ("single", K = 1), or two of equal length ("dual", K = 2): each primary token has a secondary
one;
the two are embedded apart, concatenated and projected. Samples may use different primary vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..buffers import FixedBuffers

RELEASED_VOCABULARIES = ("s3", "as")


class TokenConditioner(FixedBuffers):
    """Embed tokens, project, interpolate in time and L2-normalise per frame (arXiv 2603.01006).

    Args:
        vocabularies: {name: size} of the primary streams, one table and one projection each.
        width: channels of a token embedding and of the output.
        secondary: size of the second stream's vocabulary ("dual"), or 0 for "single".
    """

    offsets: Tensor

    def __init__(self, vocabularies: Mapping[str, int], width: int, secondary: int = 0) -> None:
        super().__init__()
        if not vocabularies or min(vocabularies.values()) < 1:
            raise ValueError(f"vocabularies: expected at least one non-empty one, got {dict(vocabularies)}")
        self.vocabularies = dict(vocabularies)
        self.width = width
        self.secondary = nn.Embedding(secondary, width) if secondary else None
        self.tables = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in vocabularies.items()})
        streams = 2 if secondary else 1
        self.projections = nn.ModuleDict({name: nn.Linear(streams * width, width, bias=False) for name in vocabularies})
        self.register_buffer("offsets", self.constants()["offsets"], persistent=False)

    def constants(self) -> dict[str, Tensor]:
        """The buffer with the first row of each vocabulary."""
        return {"offsets": torch.tensor([0, *self.vocabularies.values()]).cumsum(0)[:-1]}

    @property
    def topology(self) -> str:
        return "single" if self.secondary is None else "dual"

    def embed(self, tokens: Tensor, vocabulary: Tensor) -> Tensor:
        """tokens [B, S, K], vocabulary [B] (index into `vocabularies`) -> [B, S, C].

        The projections are applied to the tables instead of the tokens. The result is the same, and the samples of all
        vocabularies are one gather, without boolean indexing: fixed shapes and no host sync.
        """
        names = list(self.vocabularies)
        weights: list[Any] = [self.projections[name].weight for name in names]
        tables: list[Any] = [self.tables[name].weight for name in names]
        rows = tokens[:, :, 0] + self.offsets[vocabulary].unsqueeze(1)
        primary = torch.cat([table @ w[:, : self.width].T for table, w in zip(tables, weights)])
        embedded = F.embedding(rows, primary)
        if self.secondary is not None:
            second = torch.cat([self.secondary.weight @ w[:, self.width :].T for w in weights])
            offset = vocabulary * self.secondary.num_embeddings
            embedded = embedded + F.embedding(tokens[:, :, 1] + offset.unsqueeze(1), second)
        return embedded

    def forward(self, tokens: Tensor, token_lengths: Tensor, vocabulary: Tensor, mask: Tensor) -> Tensor:
        """Token embedding for each mel frame.

        Args:
            tokens: [B, S, K] int64, each below its vocabulary's size (not checked, since that would wait for the
                device). Tokens beyond a sample's length are not read.
            token_lengths: [B]; 0 means no tokens, which gives the null embedding, zeros.
            vocabulary: [B] index into `vocabularies`.
            mask: [B, T] bool, the valid mel frames (a prefix); a sample's tokens span its valid frames.

        Returns:
            [B, T, C], of unit L2 norm in each valid frame, zero elsewhere.
        """
        streams = 1 if self.secondary is None else 2
        if tokens.dim() != 3 or tokens.shape[2] != streams or 0 in tokens.shape:
            raise ValueError(
                f"tokens: expected non-empty [batch, tokens, {streams}] ({self.topology}), got {list(tokens.shape)}"
            )
        inside = torch.arange(tokens.shape[1], device=tokens.device) < token_lengths.unsqueeze(1)
        tokens = torch.where(inside.unsqueeze(-1), tokens, 0)
        stretched = interpolate_time(self.embed(tokens, vocabulary), token_lengths, mask.sum(1), mask.shape[1])
        kept = (mask & (token_lengths > 0).unsqueeze(1)).unsqueeze(-1)
        # In float32 or wider: in float16 the eps of normalize is zero, and 0 / 0 would be nan.
        unit = F.normalize(stretched.to(torch.promote_types(stretched.dtype, torch.float32)), dim=-1)
        return torch.where(kept, unit, 0).to(stretched.dtype)

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor]) -> TokenConditioner:
        """Tables and projections of a checkpoint in the layout of AG-REPA's released code (single topology).

        Raises:
            ValueError: names the missing key or the shape that does not fit.
        """
        names = [n for n in RELEASED_VOCABULARIES if f"token_embedding_{n}.weight" in state_dict]
        if not names:
            raise ValueError("released checkpoint: no 'token_embedding_s3.weight' or 'token_embedding_as.weight'")
        tables = {n: state_dict[f"token_embedding_{n}.weight"] for n in names}
        conditioner = cls({n: table.shape[0] for n, table in tables.items()}, tables[names[0]].shape[1])
        renamed = {}
        for name in names:
            if f"P_{name}.weight" not in state_dict:
                raise ValueError(f"released checkpoint: no 'P_{name}.weight'")
            renamed[f"tables.{name}.weight"] = tables[name]
            renamed[f"projections.{name}.weight"] = state_dict[f"P_{name}.weight"]
            width = conditioner.width
            for key, expected in (
                (f"token_embedding_{name}.weight", [tables[name].shape[0], width]),
                (f"P_{name}.weight", [width, width]),
            ):
                if list(state_dict[key].shape) != expected:
                    raise ValueError(
                        f"released checkpoint: {key!r} is {list(state_dict[key].shape)}, expected {expected}"
                    )
        conditioner.load_state_dict(renamed)
        return conditioner


def interpolate_time(x: Tensor, lengths: Tensor, frame_lengths: Tensor, frames: int) -> Tensor:
    """Stretch x[b, :lengths[b]] linearly over frame_lengths[b] frames: [B, S, C] -> [B, frames, C].

    Each sample is stretched as by `F.interpolate(mode="linear", align_corners=False)`, without a loop.
    """
    position = torch.arange(frames, device=x.device, dtype=torch.float32) + 0.5
    ratio = lengths.float() / frame_lengths.clamp_min(1).float()
    last = (lengths - 1).clamp_min(0).unsqueeze(1)
    source = (position * ratio.unsqueeze(1) - 0.5).clamp_min(0).minimum(last.float())
    left = source.floor().long()
    right = (left + 1).minimum(last)
    fraction = (source - left).unsqueeze(-1).to(x.dtype)
    gather = lambda index: x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))  # noqa: E731
    return torch.lerp(gather(left), gather(right), fraction)


def assemble_condition(
    embedding: Tensor,
    mel: Tensor,
    prompt: Tensor,
    keep_tokens: Tensor | None = None,
    keep_prompt: Tensor | None = None,
) -> Tensor:
    """The network's condition: token embedding beside reference mel.

    Args:
        embedding: [B, T, C]; mel: [B, T, M] clean mel; prompt: [B, T] bool, the frames shown as reference.
        keep_tokens, keep_prompt: [B] bool, False drops that part of the condition for the sample; None keeps.

    Returns:
        [B, T, C + M]. The null branch of guidance is keep_tokens all False (the reference stays).
    """
    if keep_tokens is not None:
        embedding = torch.where(keep_tokens[:, None, None], embedding, 0)
    if keep_prompt is not None:
        prompt = prompt & keep_prompt.unsqueeze(1)
    reference = torch.where(prompt.unsqueeze(-1), mel, 0)
    return torch.cat([embedding, reference.to(embedding.dtype)], dim=-1)
