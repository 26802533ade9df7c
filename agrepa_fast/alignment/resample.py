"""Bring teacher features [B, S, W] to the student's frames: -> [B, frames, W], by a fixed rational rate.

Frame i of a sequence at rate r stands for the time from i/r to (i+1)/r and sits at its centre, (i + 0.5)/r.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from .rows import check_kind, described


def _ratio(teacher_rate: float, student_rate: float) -> tuple[int, int]:
    """teacher_rate / student_rate as a fraction of bounded terms, by its continued fraction.

    Plain integers rather than `fractions`, so that torch.compile can follow it; the bound keeps the int64
    positions below far from overflow for rates that are not short fractions."""
    a, b = float(teacher_rate).as_integer_ratio()
    c, d = float(student_rate).as_integer_ratio()
    numerator, denominator = a * d, b * c
    before, current = (0, 1), (1, 0)
    while denominator:
        whole = numerator // denominator
        following = (before[0] + whole * current[0], before[1] + whole * current[1])
        if following[1] > 1_000_000:
            break
        before, current = current, following
        numerator, denominator = denominator, numerator - whole * denominator
    return current


def align_time(
    teacher: Tensor,
    *,
    teacher_rate: float,
    student_rate: float,
    frames: int,
    offset: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    student_mask: Tensor | None = None,
    mode: str = "linear",
) -> tuple[Tensor, Tensor]:
    """Read teacher features at the times of the student's frames.

    Student frame j sits at `t = (j + 0.5)/student_rate + offset` on the teacher's clock, where it is teacher
    position `p = t * teacher_rate - 0.5`. The rate is a fixed ratio of integers: nothing depends on the
    length the batch was padded to, and positions do not drift. Where one of the two neighbours of p is
    missing (before the first frame, after the last valid one) the other stands alone.

    Args:
        teacher: [B, S, W] floating point; what invalid frames hold, NaN included, is never read.
        teacher_rate, student_rate: frames per second, as `Teacher.rate` and `MelConfig.frame_rate`.
        frames: student frames to fill.
        offset: [B] seconds: where in the teacher's audio the student's sequence starts. None is 0.
        teacher_mask: [B, S] bool, True where a teacher frame is valid. None: all are.
        student_mask: [B, frames] bool, True where a student frame is valid. None: all are.
        mode: "linear" interpolation, or "nearest": the teacher frame during which t falls.

    Returns:
        features [B, frames, W] in teacher's dtype (computed in float32 or wider), zero where invalid and
        differentiable in `teacher`; mask [B, frames] bool: the student frame is valid and t falls during a
        valid teacher frame.

    Raises:
        ValueError, TypeError: types, shapes or dtypes that do not fit, a rate that is not positive, an unknown mode.
    """
    given = {"teacher": teacher, "offset": offset, "teacher_mask": teacher_mask, "student_mask": student_mask}
    for name, value in given.items():
        if not isinstance(value, Tensor) and (name == "teacher" or value is not None):
            raise TypeError(f"{name}: expected a tensor, got {described(value)}")
    if teacher.ndim != 3 or not teacher.is_floating_point():
        raise ValueError(f"teacher: expected [B, S, W] floating point, got {list(teacher.shape)} {teacher.dtype}")
    check_kind("frames", frames, Integral, "a number of frames")
    batch, length, _ = teacher.shape
    _check_mask("teacher_mask", teacher_mask, (batch, length))
    _check_mask("student_mask", student_mask, (batch, frames))
    if 0 in teacher.shape or frames < 1:
        raise ValueError(f"teacher, frames: expected at least one of each, got {list(teacher.shape)} and {frames}")
    for name, rate in (("teacher_rate", teacher_rate), ("student_rate", student_rate)):
        if not isinstance(rate, Real) or not 0 < rate < float("inf"):
            raise ValueError(f"{name}: expected frames per second above 0, got {described(rate)}")
    if offset is not None and (offset.shape != (batch,) or not offset.is_floating_point()):
        raise ValueError(f"offset: expected floating [{batch}] seconds, got {list(offset.shape)} {offset.dtype}")
    if mode not in ("linear", "nearest"):
        raise ValueError(f'mode: expected "linear" or "nearest", got {mode!r}')

    # t * teacher_rate = (2 j + 1) * numerator / (2 * denominator), split into whole frames and a fraction in
    # integers: in float32 a position some thousand frames in would be off by a visible part of a frame.
    numerator, denominator = _ratio(teacher_rate, student_rate)
    scaled = (2 * torch.arange(frames, device=teacher.device) + 1) * numerator
    owner = torch.div(scaled, 2 * denominator, rounding_mode="floor").unsqueeze(0)
    within = ((scaled % (2 * denominator)).float() / (2 * denominator)).unsqueeze(0)
    if offset is not None:
        wide = torch.promote_types(offset.dtype, torch.float32)
        within = within + (offset.to(wide) * teacher_rate).unsqueeze(1)
        whole = within.floor()
        owner, within = owner + whole.long(), within - whole

    support = _valid(owner, teacher_mask, length)
    if mode == "nearest":
        aligned = _read(teacher, owner, support)
    else:
        # `within` runs from 0 to 1 over the owner's span, its centre at 0.5.
        other = torch.where(within < 0.5, owner - 1, owner + 1)
        present = _valid(other, teacher_mask, length)
        weight = torch.where(present, (within.float() - 0.5).abs(), 0.0).unsqueeze(-1)
        here = _read(teacher, owner, support)
        aligned = here + weight * (_read(teacher, other, present) - here)
    mask = support.expand(batch, frames)
    if student_mask is not None:
        mask = mask & student_mask
    return torch.where(mask.unsqueeze(-1), aligned, 0.0).to(teacher.dtype), mask


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    if mask is not None and (tuple(mask.shape) != shape or mask.dtype != torch.bool):
        raise ValueError(f"{name}: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")


def _valid(index: Tensor, teacher_mask: Tensor | None, length: int) -> Tensor:
    """[1 or B, frames] bool: the teacher frame `index` exists and is valid."""
    inside = (index >= 0) & (index < length)
    if teacher_mask is None:
        return inside
    return inside & teacher_mask.take_along_dim(index.clamp(0, length - 1), dim=1)


def _read(teacher: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Teacher frames [B, frames, W] in float32 or wider; zero, with zero gradient, where not valid."""
    values = teacher.take_along_dim(index.clamp(0, teacher.shape[1] - 1).unsqueeze(-1), dim=1)
    wide = torch.promote_types(teacher.dtype, torch.float32)
    return torch.where(valid.unsqueeze(-1), values.to(wide), 0.0)
