"""Which rows count in the losses of alignment, and means over them: for `AlignmentLoss` and `InterfaceLoss`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from ..errors import UserError
from ..ops.library import eager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Domains = Mapping[str, Tensor] | Sequence[str] | None


def grouped_ranks() -> bool:
    """Whether this process is a rank of a process group."""
    return distributed.is_available() and distributed.is_initialized()


class ZeroGradient(torch.autograd.Function):
    """0 as a function of parameters: each of them gets a gradient of exactly zero, whatever it holds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*parameters: Tensor) -> Tensor:
        return torch.zeros((), device=parameters[0].device)  # a plain tensor also for parameters that are sharded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def described(value: object) -> str:
    """Describe a value of a wrong type in a few words, for an error message."""
    name = type(value).__name__
    if value is None or isinstance(value, str | Real):
        return repr(value)[:60]
    shape = getattr(value, "shape", None)
    if shape is not None and not isinstance(value, Real):
        return f"{name} {list(shape)}"
    return f"{name} of {len(value)}" if hasattr(value, "__len__") else name


def check_kind(name: str, value: object, kind: Any, form: str) -> None:
    """`value` is of this type (or union of types). form: what was expected, in words."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {form}, got {described(value)}")


def check_weight(name: str, value: object) -> None:
    if not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {described(value)}")


def check_times(t: Tensor) -> None:
    """ValueError unless every time is in [0, 1]. It reads CPU tensors alone: for others the host would have to wait."""
    if t.device.type != "cpu" or not eager(t) or t.numel() == 0:
        return
    low, high = (float(bound) for bound in t.detach().aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"t: expected times in [0, 1], 0 noise and 1 data, got {low if low < 0 else high:g}")


def check_teachers(teachers: Mapping[str, int]) -> None:
    """{name: width}, each name fit for a module and each width a positive integer."""
    if not isinstance(teachers, Mapping):
        raise TypeError(f"teachers: expected a mapping {{name: width}}, got {described(teachers)}")
    if not teachers:
        raise ValueError("teachers: expected at least one {name: width}")
    taken = nn.ModuleDict()
    for name, width in teachers.items():
        # Names become keys of a ModuleDict, which has attributes and a path separator of its own.
        if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
            raise UserError(f"teachers: {name!r} cannot name a module: choose another name, without dots")
        check_width(f"teachers[{name!r}]", width)


def check_width(name: str, width: int) -> None:
    if not isinstance(width, Integral) or isinstance(width, bool) or width < 1:
        raise ValueError(f"{name}: expected a width, an integer of at least 1, got {described(width)}")


def check_tensors(name: str, values: object, keys: Iterable[Hashable], what: str, form: str) -> None:
    """`values` is a mapping that has a tensor for each of the keys. what: the thing, form: the mapping, in words."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a mapping {form}, got {described(values)}")
    for key in keys:
        if key not in values:
            raise ValueError(f"{name}: no {what} {key!r}, only {sorted(values, key=str)}")
        if not isinstance(values[key], Tensor):
            raise TypeError(f"{name}[{key!r}]: expected a tensor, got {described(values[key])}")


def check_tensor(name: str, value: object, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """`value` is None or a tensor of this shape, and dtype."""
    if value is None:
        return
    # Messages are made where they are needed: torch.compile follows the checks, and no work on their strings.
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, {_form(shape, dtype)}, got {described(value)}")
    if value.shape != tuple(shape) or dtype not in (None, value.dtype):
        given = list(value.shape) if dtype is None else f"{value.dtype} {list(value.shape)}"
        raise ValueError(f"{name}: expected {_form(shape, dtype)}, got {given}")


def _form(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    return str(list(shape)) if dtype is None else f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def check_targets(teachers: Mapping[str, int], targets: Mapping[str, Tensor], rows: Sequence[int]) -> None:
    """Every teacher has a target [*rows, its width]."""
    check_tensors("targets", targets, teachers, "features of teacher", "{teacher: features}")
    for name, size in teachers.items():
        check_tensor(f"targets[{name!r}]", targets[name], [*rows, size])
        if not targets[name].is_floating_point():
            raise ValueError(f"targets[{name!r}]: expected floating point, got {targets[name].dtype}")


def domain_weights(teachers: Sequence[str], domains: Domains, like: Tensor) -> dict[str, Tensor | None]:
    """{teacher: [B] bool or None}: which samples count for each teacher."""
    if domains is None:
        return dict.fromkeys(teachers)
    size = like.shape[0]
    if isinstance(domains, Mapping):
        check_tensors("domains", domains, teachers, "weights for teacher", "{teacher: [B]}")
        for name in teachers:
            check_tensor(f"domains[{name!r}]", domains[name], [size])
        return {name: domains[name] != 0 for name in teachers}
    form = f"{{teacher: [{size}]}}, or {size} names among the teachers {list(teachers)}"
    if not isinstance(domains, Sequence) or isinstance(domains, (str, bytes)):
        raise TypeError(f"domains: expected {form}, got {described(domains)}")
    if len(domains) != size or any(domain not in teachers for domain in domains):
        raise ValueError(f"domains: expected {form}, got {list(domains)!r:.80}")
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


def mean_of(loss: Tensor, rows: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean over the rows that count, along one dimension or all; 0 when there is none."""
    return loss.mean(dim) if rows is None else loss.sum(dim) / rows.sum(dim).clamp_min(1)


def means_of(
    losses: Tensor, counted: Tensor | None, factor: Tensor | None, dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mean of the losses that count, over `dim` or all, and the same with a factor on each loss."""
    mean = mean_of(losses, counted, dim)
    return mean, mean if factor is None else mean_of(losses * where_counted(factor, counted), counted, dim)


def stacked(values: Sequence[Tensor | None], default: Tensor | None) -> Tensor | None:
    """[len(values), ...] with `default` for None; None where all are None."""
    if all(value is None for value in values):
        return None
    return torch.stack([default if value is None else value for value in values])  # type: ignore[misc]


def similarity_of(loss: Tensor, rows: Tensor | None) -> Tensor:
    """The mean raw cosine behind a mean loss (or 1 - another distance); nan when no row counted."""
    similarity = 1 - loss.detach()
    return similarity if rows is None else torch.where(rows.any(), similarity, torch.nan)


def takes_global_means(group: ProcessGroup | None) -> bool:
    """Whether a loss is to take its means over all ranks: there are several, and gradients are recorded."""
    return grouped_ranks() and distributed.get_world_size(group) > 1 and torch.is_grad_enabled()


def rank_shares(
    counts: Mapping[str, Tensor], group: ProcessGroup | None, must_agree: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """{teacher: this rank's count over the mean rank's} of {teacher: what this rank counts}.

    A mean over a rank's rows, times its share, averaged over ranks (as DDP does with gradients) is the mean over all
    ranks' rows. Every rank of the group must call it: one small all-reduce.

    must_agree: float32 tensors that have to be the same on all ranks. Where they are not, the device raises (on a CPU
    at once, as a RuntimeError); the host does not wait for the answer."""
    mine = torch.cat([torch.stack(list(counts.values())).float(), *(value.flatten() for value in must_agree)])
    total = mine.clone()
    distributed.all_reduce(total, group=group)
    ranks = distributed.get_world_size(group)
    if must_agree:
        held, summed = mine[len(counts) :], total[len(counts) :]
        agree = ((summed - ranks * held).abs() <= 1e-5 * ranks * held.abs()).all()
        torch._assert_async(agree, "alignment: ranks have different layers or weights; use selection.synchronised()")
    shares = mine[: len(counts)] * ranks / total[: len(counts)].clamp_min(1)
    return dict(zip(counts, shares.unbind()))


def count(rows: Tensor | None, every: Tensor) -> Tensor:
    """How many rows count, a scalar; without a mask, all rows of `every` [..., any]."""
    return every.new_full((), every.shape[:-1].numel(), dtype=torch.float32) if rows is None else rows.sum()


def comparable(rows: Tensor | None) -> Tensor | None:
    """Which sets of rows [..., N] -> [...] have two rows to compare."""
    return None if rows is None else rows.sum(-1) >= 2
