"""LASP and linear CKA measure what each layer stores; SCD compares them with FoG-A, what each layer contributes.

hidden [L, N, D] are the pooled hidden states of every layer for N clips, teacher [N, E] the pooled teacher features.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..models.dit import DiT
from .networks import by_name
from .runner import check_frames, probing
from .scores import LayerScores, whole_number
from .statistics import _top, kendall, spearman


def pooled_hidden(model: DiT, inputs: Mapping[str, Any]) -> Tensor:
    """The residual stream after every block, averaged over the valid frames: [L, N, D].

    It is computed in eval mode and without gradient.

    Args:
        model, inputs: as in `attribute_layers`, by name.

    Raises:
        TypeError, ValueError: model or inputs do not fit, or a sample has no valid frame.
    """
    if not isinstance(model, DiT):
        raise TypeError(f"model: expected an agrepa_fast.DiT, got {type(model).__name__}")
    inputs = by_name(inputs)
    if "mask" in inputs:
        check_frames(inputs["mask"].flatten(1).sum(1))
    with probing(model):
        _, hidden = model(**inputs, hidden_layers=range(model.depth))
        return torch.stack([ops.masked_mean(hidden[layer], inputs.get("mask")) for layer in range(model.depth)])


def lasp(hidden: Tensor, teacher: Tensor, fitted: Tensor, ridge: float = 1e-2) -> Tensor:
    """LASP (arXiv 2603.01006): cos(head(norm(pool(h_l))), teacher) of every layer through one frozen shared head.

    The head is a linear map with bias, fitted once by ridge regression to the normalised teacher features on all
    layers' states of the clips `fitted`, and then frozen; the cosine is taken on the other clips. norm is LayerNorm
    without affine.

    Args:
        hidden [L, N, D], teacher [N, E], fitted: bool [N], at least two clips inside and one outside.
        ridge: penalty, as a share of the mean variance of an input channel.

    Returns:
        [L, held-out clips] float64.

    Raises:
        ValueError: shapes do not fit, or too few clips on one side.
    """
    _check(hidden, teacher)
    if not isinstance(fitted, Tensor):
        raise TypeError(f"fitted: expected a tensor, got {type(fitted).__name__}")
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge: expected a finite number, at least 0, got {ridge}")
    if fitted.dtype != torch.bool or fitted.shape != teacher.shape[:1]:
        raise ValueError(f"fitted: expected bool [{teacher.shape[0]}], got {fitted.dtype} {list(fitted.shape)}")
    if fitted.sum() < 2 or fitted.all():
        raise ValueError(f"fitted: expected at least 2 clips to fit on and 1 held out, got {int(fitted.sum())}")
    states = F.layer_norm(hidden.double(), hidden.shape[-1:], eps=1e-6)
    goal = F.normalize(teacher.double(), dim=-1)
    x = states[:, fitted].flatten(0, 1)
    y = goal[fitted].repeat(hidden.shape[0], 1)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    penalty = ridge * gram.diagonal().mean().clamp_min(1e-12)
    weight = torch.linalg.solve(
        gram + penalty * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device), x.T @ y
    )
    predicted = (states[:, ~fitted] - x_mean) @ weight + y_mean
    return F.cosine_similarity(predicted, goal[~fitted].unsqueeze(0), dim=-1)


def linear_cka(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of every layer with the teacher: [L].

    `|X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F)` of centred features, computed from the N x N kernels; 0 to 1, unchanged by
    rotation and scale. Biased upwards where there are fewer clips than channels: compare layers, not numbers.
    """
    _check(hidden, teacher)
    x = hidden.double() - hidden.double().mean(1, keepdim=True)
    y = teacher.double() - teacher.double().mean(0)
    of_hidden, of_teacher = x @ x.mT, y @ y.T
    return (of_hidden * of_teacher).sum((1, 2)) / (of_hidden.square().sum((1, 2)).sqrt() * of_teacher.norm())


@dataclass(frozen=True)
class Dissociation:
    """The K highest layers by FoG-A and by LASP, how many layers they share, and the rank correlation.

    `low` and `high` are the 95 % interval of Spearman's rho, by a percentile bootstrap that draws the clips of the two
    separately."""

    layers: tuple[int, ...]
    foga: tuple[float, ...]
    stored: tuple[float, ...]
    most_used: tuple[int, ...]
    most_stored: tuple[int, ...]
    overlap: float
    spearman: float
    kendall: float
    low: float
    high: float

    @property
    def interval(self) -> dict[str, float]:
        """Spearman's rho and its bounds, by name."""
        return {"spearman": self.spearman, "low": self.low, "high": self.high}

    def to_csv(self, path: str | Path) -> None:
        """One row per layer: layer, foga, lasp, and whether it is among the K highest of each."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("layer", "foga", "lasp", "most_used", "most_stored"))
            for layer, used, stored in zip(self.layers, self.foga, self.stored):
                among = (int(layer in self.most_used), int(layer in self.most_stored))
                writer.writerow((layer, repr(used), repr(stored), *among))


def dissociation(scores: LayerScores, stored: Tensor, k: int = 3, resamples: int = 1000, seed: int = 0) -> Dissociation:
    """Compare what layers contribute (FoG-A `scores`) with what they store (LASP `stored` [L, clips]); AG-REPA's SCD.

    Args:
        scores: of whole layers. stored: from `lasp`, of the same layers.
        k: how many of the highest layers of each to compare.
        resamples, seed: of the bootstrap over clips, which gives the 95 % interval of the rank correlation.

    Returns:
        `Dissociation`: means, the K highest layers of each and their overlap, Spearman's and Kendall's correlation.

    Raises:
        ValueError, TypeError: layers, k or resamples do not fit, or the scores are of branches.
    """
    if not isinstance(scores, LayerScores) or not isinstance(stored, Tensor):
        got = f"{type(scores).__name__} and {type(stored).__name__}"
        raise TypeError(f"scores, stored: expected LayerScores and a tensor [layers, clips], got {got}")
    if scores.branches is not None:
        raise ValueError("scores: expected whole layers, got branches")
    if stored.dim() != 2 or stored.shape[0] != len(scores.layers):
        raise ValueError(f"stored: expected [{len(scores.layers)}, clips], got {list(stored.shape)}")
    if stored.numel() == 0 or not stored.isfinite().all():
        raise ValueError(f"stored: expected finite values of at least one clip, got {list(stored.shape)}")
    whole_number("k", k, 1, len(scores.layers), "layers")
    whole_number("resamples", resamples, 1)
    foga, lasp_means = scores.mean, stored.double().mean(1).cpu()
    tops: list[Sequence[int]] = [
        [scores.layers[i] for i in _top(means.unsqueeze(0), k)[0].tolist()] for means in (foga, lasp_means)
    ]
    generator = torch.Generator().manual_seed(seed)
    sums, counts = scores.by_clip()
    rho = []
    for _ in range(resamples):
        clips = torch.randint(counts.numel(), (counts.numel(),), generator=generator)
        columns = torch.randint(stored.shape[1], (stored.shape[1],), generator=generator)
        rho.append(spearman(sums[:, clips].sum(1) / counts[clips].sum(), stored[:, columns].double().mean(1).cpu()))
    low, high = torch.tensor(rho, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Dissociation(
        scores.layers,
        tuple(foga.tolist()),
        tuple(lasp_means.tolist()),
        tuple(tops[0]),
        tuple(tops[1]),
        len(set(tops[0]) & set(tops[1])) / k,
        spearman(foga, lasp_means),
        kendall(foga, lasp_means),
        low,
        high,
    )


def _check(hidden: Tensor, teacher: Tensor) -> None:
    for name, value in (("hidden", hidden), ("teacher", teacher)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
    if hidden.dim() != 3 or teacher.dim() != 2 or hidden.shape[1] != teacher.shape[0]:
        raise ValueError(
            f"expected hidden [layers, clips, width] and teacher [clips, channels], got {list(hidden.shape)} "
            f"and {list(teacher.shape)}"
        )
    for name, value in (("hidden", hidden), ("teacher", teacher)):
        if value.numel() == 0:
            raise ValueError(f"{name}: expected at least one of each, got {list(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name}: {int((~value.isfinite()).sum())} of {value.numel()} values are not finite")
