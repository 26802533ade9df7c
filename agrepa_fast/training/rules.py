"""What the values of a run's configuration may be; their types are `config`'s business."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..alignment.loss import OBJECTIVES
from ..alignment.policy import POLICIES
from ..alignment.schedule import TIMESTEP_WEIGHTS
from ..errors import UserError

if TYPE_CHECKING:
    from .config import RunConfig

ENGINES = ("auto", "eager", "compile", "graph")


def check(config: RunConfig) -> None:
    """Hold the values of a configuration against what they may be, alone and together.

    Raises:
        UserError: the first that does not fit; names the key, what was expected and the value.
    """
    c = config
    rules = [
        (c.train.steps >= 1, "train.steps", "at least 1", c.train.steps),
        (c.train.seed >= 0, "train.seed", "0 or more", c.train.seed),
        (c.train.log_every >= 1, "train.log_every", "at least 1", c.train.log_every),
        (c.train.valid_every >= 1, "train.valid_every", "at least 1", c.train.valid_every),
        (c.train.valid_samples >= 1, "train.valid_samples", "at least 1", c.train.valid_samples),
        (c.train.checkpoint_every >= 1, "train.checkpoint_every", "at least 1", c.train.checkpoint_every),
        (c.train.keep >= 1, "train.keep", "at least 1", c.train.keep),
        (c.train.engine in ENGINES, "train.engine", "one of " + ", ".join(ENGINES), c.train.engine),
        (c.model.attention in ("sdpa", "xformers"), "model.attention", "sdpa or xformers", c.model.attention),
        (
            c.model.attention == "sdpa" or c.train.engine in ("auto", "eager"),
            "train.engine",
            "auto or eager, as model.attention is xformers (its shapes follow the data)",
            c.train.engine,
        ),
        (c.train.accumulate >= 1, "train.accumulate", "at least 1", c.train.accumulate),
        (c.train.max_skipped >= 1, "train.max_skipped", "at least 1", c.train.max_skipped),
        (c.train.diagnose_every >= 0, "train.diagnose_every", "0 or more", c.train.diagnose_every),
        (c.probe.every >= 0, "probe.every", "0 or more", c.probe.every),
        (
            c.probe.every == 0 or POLICIES.get(c.alignment.policy) in ("values", "scores"),
            "probe.every",
            f"0, as policy {c.alignment.policy} does not look at scores",
            c.probe.every,
        ),
        (0 <= c.probe.momentum < 1, "probe.momentum", "in [0, 1)", c.probe.momentum),
        (c.probe.margin >= 0, "probe.margin", "0 or more", c.probe.margin),
        (
            c.train.precision in ("auto", "fp32", "bf16"),
            "train.precision",
            "auto, fp32 or bf16",
            c.train.precision,
        ),
        (bool(c.data.train), "data.train", "at least one manifest", c.data.train),
        (0 < c.data.valid_share < 1, "data.valid_share", "between 0 and 1", c.data.valid_share),
        (c.data.max_seconds > 0, "data.max_seconds", "more than 0", c.data.max_seconds),
        (c.data.buckets >= 1, "data.buckets", "at least 1", c.data.buckets),
        (c.data.workers >= 0, "data.workers", "0 or more", c.data.workers),
        (
            0 <= c.data.unreadable_share <= 1,
            "data.unreadable_share",
            "between 0 and 1",
            c.data.unreadable_share,
        ),
        (1 <= c.probe.k <= c.model.depth, "probe.k", f"1 to model.depth ({c.model.depth})", c.probe.k),
        (c.probe.samples >= 1, "probe.samples", "at least 1", c.probe.samples),
        (
            bool(c.probe.t_grid) and all(0 <= t <= 1 for t in c.probe.t_grid),
            "probe.t_grid",
            "numbers in [0, 1]",
            c.probe.t_grid,
        ),
        (c.probe.metric in ("rms", "squared"), "probe.metric", "rms or squared", c.probe.metric),
        (c.alignment.pool in ("mean", None), "alignment.pool", "mean or null", c.alignment.pool),
        (
            c.alignment.objective in OBJECTIVES,
            "alignment.objective",
            "one of " + ", ".join(OBJECTIVES),
            c.alignment.objective,
        ),
        (
            not c.alignment.standardise_targets or c.alignment.pool is None,
            "alignment.standardise_targets",
            "alignment.pool null with it",
            c.alignment.pool,
        ),
        (
            c.alignment.timestep_weight == "uniform" or c.alignment.objective == "cosine" or c.alignment.pool is None,
            "alignment.timestep_weight",
            f"uniform with pooled {c.alignment.objective}, which compares samples with each other",
            c.alignment.timestep_weight,
        ),
        (c.alignment.mask in ("valid", "span"), "alignment.mask", "valid or span", c.alignment.mask),
        (c.alignment.policy in POLICIES, "alignment.policy", "one of " + ", ".join(POLICIES), c.alignment.policy),
        (
            len(set(c.alignment.layers)) == len(c.alignment.layers)
            and all(0 <= layer < c.model.depth for layer in c.alignment.layers),
            "alignment.layers",
            f"distinct layers from 0 to {c.model.depth - 1}",
            list(c.alignment.layers),
        ),
        (
            not (c.alignment.layers and c.alignment.selection),
            "alignment.layers, alignment.selection",
            "one of the two",
            (list(c.alignment.layers), c.alignment.selection),
        ),
        (
            c.alignment.policy != "fixed" or bool(c.alignment.layers),
            "alignment.policy",
            "alignment.layers with it",
            c.alignment.policy,
        ),
        (
            c.alignment.stop_similarity is None or -1 <= c.alignment.stop_similarity <= 1,
            "alignment.stop_similarity",
            "null or a cosine in [-1, 1]",
            c.alignment.stop_similarity,
        ),
        (
            c.alignment.timestep_weight in TIMESTEP_WEIGHTS,
            "alignment.timestep_weight",
            "one of " + ", ".join(TIMESTEP_WEIGHTS),
            c.alignment.timestep_weight,
        ),
        (bool(c.alignment.teachers), "alignment.teachers", "at least one", c.alignment.teachers),
        (
            0 <= c.alignment.decay_start <= c.alignment.stop <= 1,
            "alignment.decay_start, alignment.stop",
            "shares with decay_start <= stop <= 1",
            (c.alignment.decay_start, c.alignment.stop),
        ),
        (c.flow.method in ("euler", "midpoint"), "flow.method", "euler or midpoint", c.flow.method),
        (c.flow.points >= 2, "flow.points", "at least 2", c.flow.points),
        (0 <= c.flow.token_dropout < 1, "flow.token_dropout", "in [0, 1)", c.flow.token_dropout),
        (0 <= c.flow.prompt_dropout < 1, "flow.prompt_dropout", "in [0, 1)", c.flow.prompt_dropout),
        (c.optimizer.lr > 0, "optimizer.lr", "more than 0", c.optimizer.lr),
        (0 <= c.optimizer.ema_decay < 1, "optimizer.ema_decay", "in [0, 1)", c.optimizer.ema_decay),
        (
            0 < c.optimizer.warmup_share < 1,
            "optimizer.warmup_share",
            "between 0 and 1",
            c.optimizer.warmup_share,
        ),
    ]
    for fits, key, expected, value in rules:
        if not fits:
            raise UserError(f"{key}: expected {expected}, got {value!r}")
    try:
        _ = config.dit
    except ValueError as error:
        raise UserError(f"model: {error}") from None
