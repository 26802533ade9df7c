"""Which rows count in the losses of alignment, and means over them: for `AlignmentLoss` and `InterfaceLoss`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn

from ..errors import UserError

Domains = Mapping[str, Tensor] | Sequence[str] | None


def check_teachers(teachers: Mapping[str, int]) -> None:
    if not teachers:
        raise ValueError("teachers: expected at least one {name: width}")
    taken = nn.ModuleDict()
    for name in teachers:
        # Names become keys of a ModuleDict, which has attributes and a path separator of its own.
        if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
            raise UserError(f"teachers: {name!r} cannot name a module: choose another name, without dots")


def check_targets(teachers: Mapping[str, int], targets: Mapping[str, Tensor], rows: Sequence[int]) -> None:
    """Every teacher has a target [*rows, its width]."""
    for name, size in teachers.items():
        if name not in targets:
            raise ValueError(f"targets: no features of teacher {name!r}, only {sorted(targets)}")
        if targets[name].shape != (*rows, size):
            raise ValueError(f"targets[{name!r}]: expected {[*rows, size]}, got {list(targets[name].shape)}")


def domain_weights(teachers: Sequence[str], domains: Domains, like: Tensor) -> dict[str, Tensor | None]:
    """{teacher: [B] bool or None}: which samples count for each teacher."""
    if domains is None:
        return dict.fromkeys(teachers)
    if isinstance(domains, Mapping):
        missing = set(teachers) - set(domains)
        if missing:
            raise ValueError(f"domains: no weights for teacher {sorted(missing)[0]!r}, only {sorted(domains)}")
        for name in teachers:
            if domains[name].shape != like.shape[:1]:
                raise ValueError(f"domains[{name!r}]: expected [{like.shape[0]}], got {list(domains[name].shape)}")
        return {name: domains[name] != 0 for name in teachers}
    unknown = set(domains) - set(teachers)
    if unknown or len(domains) != like.shape[0]:
        raise ValueError(
            f"domains: expected {like.shape[0]} names among the teachers {list(teachers)}, got {list(domains)}"
        )
    return {name: torch.tensor([d == name for d in domains], device=like.device) for name in teachers}


def row_mask(kept: Tensor | None, mask: Tensor | None, target: Tensor) -> Tensor | None:
    """Rows of the loss that count: [B] for pooled targets, [B, T] for frames. Fixed shapes, no gather."""
    if target.dim() == 2:  # pooled: a sample without a valid frame has nothing to align
        mask = None if mask is None else mask.any(1)
    elif kept is not None:
        kept = kept.unsqueeze(1).expand(target.shape[:2])
    if kept is None or mask is None:
        return mask if kept is None else kept
    return mask & kept


def counted_frames(kept: Iterable[Tensor | None], mask: Tensor | None, frames: int) -> Tensor | None:
    """[B, T] bool: the valid frames of samples that count for any teacher; None when all do. kept: [B] each."""
    by_teacher = list(kept)
    if any(samples is None for samples in by_teacher):
        return mask
    counted = torch.stack(by_teacher).any(0).unsqueeze(1)  # type: ignore[arg-type]
    return counted.expand(-1, frames) if mask is None else mask & counted


def where_counted(sample_weight: Tensor, counted: Tensor | None) -> Tensor:
    """The weights [B] or [B, 1] of what counts, 0 elsewhere: what does not count may have nan for a weight."""
    return sample_weight if counted is None else torch.where(counted, sample_weight, 0)


def mean_of(loss: Tensor, rows: Tensor | None) -> Tensor:
    """Mean over the rows that count; 0 when there is none."""
    return loss.mean() if rows is None else loss.sum() / rows.sum().clamp_min(1)


def similarity_of(loss: Tensor, rows: Tensor | None) -> Tensor:
    """The mean raw cosine behind a mean loss (or 1 - another distance); nan when no row counted."""
    similarity = 1 - loss.detach()
    return similarity if rows is None else torch.where(rows.any(), similarity, torch.nan)


def rank_shares(targets: Mapping[str, Tensor], rows: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """This rank's rows that count over the mean rank's, for each teacher; `AlignmentLoss.shares`."""
    counts = torch.stack(
        [
            targets[name].new_tensor(targets[name][..., 0].numel(), dtype=torch.float32) if r is None else r.sum()
            for name, r in rows.items()
        ]
    ).float()
    total = counts.clone()
    distributed.all_reduce(total)
    found = counts * distributed.get_world_size() / total.clamp_min(1)
    return dict(zip(rows, found.unbind()))


def comparable(rows: Tensor | None) -> Tensor | None:
    """Which sets of rows [..., N] -> [...] have two rows to compare."""
    return None if rows is None else rows.sum(-1) >= 2
