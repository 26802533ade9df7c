"""Representation alignment: pull chosen hidden states toward frozen teachers.

    L = sum_k lambda_k sum_teacher mean_rows(1 - cos(head_k(norm(pool(h_k))), teacher))

hidden {layer: [B, T, D]}; targets {teacher: [B, W] pooled or [B, T, W] per frame}. Layers and teachers are paired
by name, never by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .heads import MLPHead
from .policy import LayerSelection

Domains = Mapping[str, Tensor] | Sequence[str] | None


def _check_pool(pool: str | None) -> None:
    if pool not in ("mean", None):
        raise ValueError(f'pool: expected "mean" or None (frame by frame), got {pool!r}')


def _domain_weights(teachers: Sequence[str], domains: Domains, like: Tensor) -> dict[str, Tensor | None]:
    """{teacher: [B] bool or None}: which samples count for each teacher."""
    if domains is None:
        return dict.fromkeys(teachers)
    if isinstance(domains, Mapping):
        missing = set(teachers) - set(domains)
        if missing:
            raise ValueError(f"domains: no weights for teacher {sorted(missing)[0]!r}, only {sorted(domains)}")
        return {name: domains[name] != 0 for name in teachers}
    unknown = set(domains) - set(teachers)
    if unknown or len(domains) != like.shape[0]:
        raise ValueError(
            f"domains: expected {like.shape[0]} names among the teachers {list(teachers)}, got {list(domains)}"
        )
    return {name: torch.tensor([d == name for d in domains], device=like.device) for name in teachers}


def _row_mask(kept: Tensor | None, mask: Tensor | None, target: Tensor) -> Tensor | None:
    """Rows of the loss that count: [B] for pooled targets, [B, T] for frames. Fixed shapes, no gather."""
    if target.dim() == 2:  # pooled: a sample without a valid frame has nothing to align
        mask = None if mask is None else mask.any(1)
    elif kept is not None:
        kept = kept.unsqueeze(1).expand(target.shape[:2])
    if kept is None or mask is None:
        return mask if kept is None else kept
    return mask & kept


def _mean(loss: Tensor, rows: Tensor | None) -> Tensor:
    """Mean over the rows that count; 0 when there is none."""
    return loss.mean() if rows is None else loss.sum() / rows.sum().clamp_min(1)


def _cosine(loss: Tensor, rows: Tensor | None) -> Tensor:
    """The mean raw cosine behind a mean loss; nan when no row counted."""
    cosine = 1 - loss.detach()
    return cosine if rows is None else torch.where(rows.any(), cosine, torch.nan)


class AlignmentLoss(nn.Module):
    """AG-REPA's loss over the layers of a selection, one head for each layer and teacher.

    The heads live here, outside the backbone: their own parameters and state dict, nothing at inference.
    `select` changes the weights in place. Pooled heads cost next to nothing, so all of them always run and
    re-selection changes numbers, not graphs; frame-wise heads are dear, so only the selected ones (`active`) run.

    Args:
        width: D of the hidden states.
        teachers: {name: width of its features}.
        selection: the layers that get heads, and their weights.
        pool: "mean" over the valid frames (AG-REPA; targets [B, W]), or None, frame by frame (REPA; [B, T, W]).
    """

    weights: Tensor

    def __init__(
        self,
        width: int,
        teachers: Mapping[str, int],
        selection: LayerSelection,
        pool: str | None = "mean",
    ) -> None:
        super().__init__()
        _check_pool(pool)
        if not teachers:
            raise ValueError("teachers: expected at least one {name: width}")
        self.width = width
        self.teachers = dict(teachers)
        self.layers = selection.layers
        self.active = selection.layers
        self.pool = pool
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleDict({str(layer): MLPHead(width, size) for layer in self.layers})
                for name, size in self.teachers.items()
            }
        )
        self.register_buffer("weights", torch.tensor(selection.weights, dtype=torch.float32))

    def select(self, selection: LayerSelection) -> None:
        """Take the weights of another selection among the layers that have heads; the others get 0."""
        unknown = set(selection.layers) - set(self.layers)
        if unknown:
            raise ValueError(f"selection: layer {min(unknown)} has no head, only {list(self.layers)}")
        weights = dict(zip(selection.layers, selection.weights))
        self.weights.copy_(torch.tensor([weights.get(layer, 0.0) for layer in self.layers]))
        if self.pool is None:
            self.active = selection.layers

    def forward(
        self,
        hidden: Mapping[int, Tensor],
        targets: Mapping[str, Tensor],
        mask: Tensor | None = None,
        domains: Domains = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and metrics.

        Args:
            hidden: {layer: [B, T, D]} for every active layer (others are ignored).
            targets: {teacher: [B, W]} when pooled, else {teacher: [B, T, W]} at the hidden states' frames
                (`align_time`). No gradient reaches them.
            mask: [B, T] bool, the frames that count.
            domains: which samples count for each teacher: {teacher: [B], 0 where not}, or B names of
                teachers, one for each sample; None = all samples for all teachers.

        Returns:
            The loss, and detached scalars on the device: "cosine/<teacher>/<layer>", the mean raw cosine
            (nan when none of the teacher's samples is in the batch).

        Raises:
            ValueError: a missing layer or teacher, or a shape that does not fit, by name.
        """
        for name, size in self.teachers.items():
            if name not in targets:
                raise ValueError(f"targets: no features of teacher {name!r}, only {sorted(targets)}")
            if targets[name].shape[-1] != size or targets[name].dim() != (2 if self.pool else 3):
                form = f"[batch, {size}]" if self.pool else f"[batch, frames, {size}]"
                raise ValueError(f"targets[{name!r}]: expected {form}, got {list(targets[name].shape)}")
        for layer in self.active:
            if layer not in hidden:
                raise ValueError(f"hidden: no hidden state of layer {layer}, only {sorted(hidden)}")
        any_hidden = hidden[self.active[0]]
        kept = _domain_weights(list(self.teachers), domains, any_hidden)
        metrics: dict[str, Tensor] = {}
        loss = any_hidden.new_zeros((), dtype=torch.float32)
        for layer in self.active:
            x = hidden[layer] if self.pool is None else ops.masked_mean(hidden[layer], mask)
            x = F.layer_norm(x, (self.width,))
            weight = self.weights[self.layers.index(layer)]
            for name in self.teachers:
                head = self.heads.get_submodule(f"{name}.{layer}")
                assert isinstance(head, MLPHead)
                target = targets[name].detach()
                rows = _row_mask(kept[name], mask, target)
                distance = _mean(head.loss(x, target, rows), rows)
                metrics[f"cosine/{name}/{layer}"] = _cosine(distance, rows)
                loss = loss + weight * distance
        return loss, metrics


class InterfaceLoss(nn.Module):
    """BiT-C (arXiv 2603.01006): the pooled token embedding toward each teacher, through one bias-free Linear.

    Args:
        width: C of the token embedding.
        teachers: {name: width of its features}.
        weights: {teacher: weight of its term}; the paper takes 0.5 for speech and 1 for audio.
    """

    def __init__(self, width: int, teachers: Mapping[str, int], weights: Mapping[str, float]) -> None:
        super().__init__()
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

        embedding [B, T, C]; targets {teacher: [B, W]}; mask [B, T]; domains as `AlignmentLoss`;
        kept [B] bool: the samples whose tokens were not dropped."""
        pooled = ops.masked_mean(embedding, mask)
        by_domain = _domain_weights(list(self.teachers), domains, embedding)
        total = embedding.new_zeros((), dtype=torch.float32)
        metrics = {}
        for name in self.teachers:
            rows = _row_mask(by_domain[name], mask, targets[name])
            if kept is not None:
                rows = kept if rows is None else rows & kept
            loss = ops.projection_cosine_loss(
                pooled,
                self.heads.get_parameter(f"{name}.weight"),
                None,
                targets[name].detach(),
                mask=rows,
                reduction="none",
            )
            mean = _mean(loss, rows)
            metrics[f"cosine/{name}/tokens"] = _cosine(mean, rows)
            total = total + self.weights[name] * mean
        return total, metrics
