"""Several teachers in as few forward passes as they need: those that read other layers of one encoder share a pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .base import Teacher

PIECE_SECONDS = 60.0  # of a long recording, for a teacher that has no window of its own


def encode_together(
    teachers: Mapping[str, Teacher], audio: Tensor, lengths: Tensor, sample_rate: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `Teacher.forward` gives for each teacher, {name: (features, mask)}; a shared encoder runs once."""
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, teacher in teachers.items():
        if name in results:
            continue
        kin = [other for other in teachers if teachers[other].encoder is teacher.encoder]
        together = teacher.forward_layers([teachers[other] for other in kin], audio, lengths, sample_rate)
        results.update(zip(kin, together, strict=True))
    return results


def encode_clips(
    teachers: Mapping[str, Teacher], clips: Sequence[Tensor], sample_rate: int, device: torch.device
) -> dict[str, list[Tensor]]:
    """The features of whole clips, however long: {name: [[frames, W] float32 on the CPU for each clip]}.

    A clip longer than what the teacher takes (PIECE_SECONDS where that is any length) is encoded in pieces. Each
    piece is given a little more sound than is kept of it, at least a frame: encoders whose frames overlap need it.

    Args:
        teachers: with one encoder in common, or a single one. clips: [n] float32 each.
    """
    first = next(iter(teachers.values()))
    step, piece = _piece(first, sample_rate)
    pieces, owners = [], []
    for number, clip in enumerate(clips):
        starts = range(0, max(1, len(clip) - (piece - step) if len(clip) > piece else 1), step)
        for start in starts:
            last = start == starts[-1]
            pieces.append(clip[start:] if last else clip[start : start + piece])
            owners.append((number, last))
    kept = round(step / sample_rate * first.rate)
    lengths = torch.tensor([len(part) for part in pieces])
    audio = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in clips] for name in teachers}
    encoded = encode_together(teachers, audio.to(device), lengths, sample_rate)
    for name, (features, mask) in encoded.items():
        for (number, last), row, valid in zip(owners, features.cpu(), mask.cpu()):
            frames = row[valid]
            if not last and len(frames) < kept:
                raise ValueError(f"teacher {name!r}: {len(frames)} frames of a piece that should have {kept}")
            rows[name][number].append(frames if last else frames[:kept])
    return {name: [torch.cat(parts) for parts in rows[name]] for name in teachers}


def _piece(teacher: Teacher, sample_rate: int) -> tuple[int, int]:
    """Samples from one piece to the next, a whole number of the teacher's frames, and samples of a piece."""
    frame = Fraction(sample_rate) / Fraction(teacher.rate).limit_denominator(1_000_000)
    # The fewest frames that are a whole number of samples and come out together.
    unit = math.lcm(frame.denominator, teacher.grain)
    longest = teacher.longest or PIECE_SECONDS
    count = int(longest * sample_rate / frame / unit) * unit - unit
    if count < unit:
        raise ValueError(f"teacher {teacher.name!r}: its window of {longest:g} s holds no two frames")
    return int(count * frame), int((count + unit) * frame)
