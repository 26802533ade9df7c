"""Sections `model` and `flow`: the network's sizes, what it predicts, condition dropout and the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...errors import UserError
from ...fields import Allowed, Section, between, from_below, one_of
from ...models.process import PARAMETRISATIONS, WEIGHTINGS, Process

SWAY = Allowed("null or at least -1, at most 1.75", lambda value: -1 <= value <= 1.75)


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
    """The generative process, condition dropout while training, and how samples are drawn."""

    path: Annotated[str, one_of(PARAMETRISATIONS), "path from noise to data (docs/paradigms.md)"] = "rectified"
    parametrisation: Annotated[
        str,
        one_of(("velocity", "v", "eps", "x0")),
        "what the network predicts: velocity on the rectified path, v on the others, or the noise or the data on any",
    ] = "velocity"
    weighting: Annotated[str, one_of(WEIGHTINGS), "weight of a sample in the loss by its t (docs/paradigms.md)"] = (
        "none"
    )
    token_dropout: Annotated[float, from_below(0, 1), "probability to train a sample without its tokens"] = 0.1
    prompt_dropout: Annotated[float, from_below(0, 1), "probability to train a sample without its reference"] = 0.1
    points: Annotated[int, between(2, 1000), "grid points of the sampler"] = 32
    guidance: Annotated[float, between(0, 100), "strength of classifier-free guidance; 1: none"] = 3.0
    method: Annotated[str, one_of(("euler", "midpoint")), "solver of the sampler"] = "euler"
    # Outside these bounds the grid of t would run backwards somewhere.
    sway: Annotated[
        float | None,
        SWAY,
        "sway of the sampler's grid of t: below 0 more of its points are near noise; null: -1 on the rectified path, "
        "0 on the others",
    ] = None

    def check(self) -> None:
        """Check that path, parametrisation and weighting fit together."""
        try:
            _ = self.process
        except ValueError as error:
            names, _, problem = str(error).partition(": ")
            fields = ", ".join(f"flow.{name}" for name in names.split(", "))
            raise UserError(f"{fields}: {problem}") from None

    @property
    def process(self) -> Process:
        """The path, what is predicted on it, and the weighting of the loss."""
        return Process(self.path, self.parametrisation, self.weighting)

    @property
    def sway_coefficient(self) -> float | None:
        """The coefficient of `flow.sway` that the sampler uses; None for a uniform grid."""
        if self.sway is None:
            return -1.0 if self.path == "rectified" else None
        return self.sway
