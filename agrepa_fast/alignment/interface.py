"""BiT-C: the token embedding that the network is given, pulled toward the same frozen teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from .rows import (
    Domains,
    check_targets,
    check_teachers,
    check_tensor,
    check_weight,
    check_width,
    count,
    described,
    domain_weights,
    mean_of,
    rank_shares,
    row_mask,
    similarity_of,
    takes_global_means,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class InterfaceLoss(nn.Module):
    """BiT-C (arXiv 2603.01006): the pooled token embedding toward each teacher, through one bias-free Linear.

    Args:
        width: C of the token embedding.
        teachers: {name: width of its features}.
        weights: {teacher: weight of its term}, 1 where left out; the paper takes 0.5 for speech and 1 for audio.
        process_group: as `AlignmentLoss`.

    Raises:
        ValueError, TypeError: a weight of an unknown teacher or below 0, or another argument that does not fit.
    """

    def __init__(
        self,
        width: int,
        teachers: Mapping[str, int],
        weights: Mapping[str, float],
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_teachers(teachers)
        check_width("width", width)
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights: expected a mapping {{teacher: weight}}, got {described(weights)}")
        for name, factor in weights.items():
            if name not in teachers:
                raise ValueError(f"weights: expected some of the teachers {list(teachers)}, got {name!r}")
            check_weight(f"weights[{name!r}]", factor)
        self.width = width
        self.process_group = process_group
        self.teachers = dict(teachers)
        self.weights = {name: float(weights.get(name, 1.0)) for name in teachers}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size, bias=False) for name, size in teachers.items()})
        for weight in self.heads.parameters():
            nn.init.orthogonal_(weight)

    def forward(
        self,
        embedding: Tensor,
        targets: Mapping[str, Tensor],
        mask: Tensor | None = None,
        domains: Domains = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics "cosine/<teacher>/tokens".

        embedding [B, T, C]; targets {teacher: [B, W]}; mask [B, T]; domains, and means over several ranks, as
        `AlignmentLoss`; kept [B] bool: the samples whose tokens were not dropped.

        Raises:
            ValueError, TypeError: a missing teacher, or a container, type or shape that does not fit, by name.
        """
        form = f"[batch, frames, {self.width}]"
        if not isinstance(embedding, Tensor):
            raise TypeError(f"embedding: expected a tensor {form}, got {described(embedding)}")
        if embedding.dim() != 3 or embedding.shape[2] != self.width:
            raise ValueError(f"embedding: expected {form}, got {list(embedding.shape)}")
        check_targets(self.teachers, targets, embedding.shape[:1])
        check_tensor("mask", mask, embedding.shape[:2], torch.bool)
        check_tensor("kept", kept, embedding.shape[:1], torch.bool)
        pooled = ops.masked_mean(embedding, mask)
        rows = self._rows(targets, mask, domains, kept)
        shares = None
        if takes_global_means(self.process_group):
            counts = {name: count(rows[name], targets[name]) for name in self.teachers}
            shares = rank_shares(counts, self.process_group)
        total = embedding.new_zeros((), dtype=torch.float32)
        metrics = {}
        for name in self.teachers:
            weight: Tensor = self.heads[name].weight  # type: ignore[assignment]
            loss = ops.projection_cosine_loss(
                pooled.to(weight.dtype),
                weight,
                None,
                targets[name].detach(),
                mask=rows[name],
                reduction="none",
            )
            mean = mean_of(loss, rows[name])
            metrics[f"cosine/{name}/tokens"] = similarity_of(mean, rows[name])
            total = total + self.weights[name] * (mean if shares is None else shares[name] * mean)
        return total, metrics

    def _rows(
        self, targets: Mapping[str, Tensor], mask: Tensor | None, domains: Domains, kept: Tensor | None
    ) -> dict[str, Tensor | None]:
        """{teacher: [B] bool, the samples that count}."""
        by_domain = domain_weights(list(self.teachers), domains, next(iter(targets.values())))
        rows = {name: row_mask(by_domain[name], mask, targets[name]) for name in self.teachers}
        if kept is None:
            return rows
        return {name: kept if row is None else row & kept for name, row in rows.items()}
