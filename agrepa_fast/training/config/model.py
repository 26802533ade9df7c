"""Sections `model` and `flow`: the network's sizes, condition dropout and the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...errors import UserError
from ...fields import Section, between, from_below, one_of


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """Sizes of the network (see DiTConfig); its mel bins come from `mel`."""

    depth: Annotated[int, between(1, 512), "blocks, each of attention and feed-forward"] = 12
    width: Annotated[int, between(2, 16_384), "channels of the residual stream; even, a multiple of heads"] = 384
    heads: Annotated[int, between(1, 1024), "attention heads"] = 6
    ff_ratio: Annotated[int, between(1, 64), "inner width of the feed-forward, as a multiple of width"] = 4
    dropout: Annotated[float, from_below(0, 1), "dropout of attention weights and feed-forward while training"] = 0.1
    token_width: Annotated[int, between(1, 4096), "channels of the token embedding"] = 256
    attention: Annotated[
        str,
        one_of(("sdpa", "xformers")),
        "sdpa: padded batches; xformers: packed, valid frames alone (a GPU, and train.engine eager)",
    ] = "sdpa"

    def check(self) -> None:
        """Check that the heads divide the width."""
        if self.width % self.heads:
            raise UserError(f"model.width: expected a multiple of model.heads ({self.heads}), got {self.width}")
        if self.width % 2:
            raise UserError(f"model.width: expected an even number (sinusoids come in pairs), got {self.width}")


@dataclass(frozen=True)
class FlowConfig(Section, name="flow"):
    """Condition dropout while training, and how samples are drawn."""

    token_dropout: Annotated[float, from_below(0, 1), "probability to train a sample without its tokens"] = 0.1
    prompt_dropout: Annotated[float, from_below(0, 1), "probability to train a sample without its reference"] = 0.1
    points: Annotated[int, between(2, 1000), "grid points of the sampler"] = 32
    guidance: Annotated[float, between(0, 100), "strength of classifier-free guidance; 1: none"] = 3.0
    method: Annotated[str, one_of(("euler", "midpoint")), "solver of the sampler"] = "euler"
    # Outside these bounds the grid of t would run backwards somewhere.
    sway: Annotated[
        float, between(-1, 1.75), "sway of the sampler's grid of t: below 0 more of its points are near noise"
    ] = -1.0
