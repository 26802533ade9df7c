"""align_time against a loop written from its definition, and the ways in which padding could leak."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrepa_fast.alignment.resample import align_time


def by_loop(teacher, teacher_rate, student_rate, frames, offset, teacher_mask, student_mask, mode):
    """The definition, one number at a time, in exact fractions where the offset allows."""
    batch, length, width = teacher.shape
    out = np.zeros((batch, frames, width))
    valid = np.zeros((batch, frames), dtype=bool)
    for b in range(batch):
        for j in range(frames):
            time = (j + Fraction(1, 2)) / Fraction(student_rate) + Fraction(float(offset[b]))
            owner = time * Fraction(teacher_rate) // 1
            if not (0 <= owner < length and teacher_mask[b, owner] and student_mask[b, j]):
                continue
            valid[b, j] = True
            if mode == "nearest":
                out[b, j] = teacher[b, owner]
                continue
            position = time * Fraction(teacher_rate) - Fraction(1, 2)
            left = position // 1
            fraction = float(position - left)
            pair = [(left, 1 - fraction), (left + 1, fraction)]
            pair = [(i, w) for i, w in pair if 0 <= i < length and teacher_mask[b, i]]
            if len(pair) == 1:
                out[b, j] = teacher[b, pair[0][0]]
            else:
                out[b, j] = sum(w * teacher[b, i] for i, w in pair)
    return out, valid


def lengths_mask(lengths, size):
    return torch.arange(size) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(
    "teacher_rate, student_rate",
    [(50.0, 93.75), (50.0, 50.0), (10.0, 93.75), (93.75, 50.0), (50.0, 22_050 / 256)],
)
def test_equals_the_definition(teacher_rate, student_rate, mode):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 20, 4, generator=generator, dtype=torch.float64)
    teacher_mask = lengths_mask([20, 13, 1], 20)
    teacher_mask[0, 7] = False  # holes are allowed too
    frames = int(20 / teacher_rate * student_rate) + 4
    student_mask = lengths_mask([frames, frames - 6, frames], frames)
    offset = torch.tensor([0.0, 0.0312, -0.0171])
    features, mask = align_time(
        teacher,
        teacher_rate=teacher_rate,
        student_rate=student_rate,
        frames=frames,
        offset=offset,
        teacher_mask=teacher_mask,
        student_mask=student_mask,
        mode=mode,
    )
    expected, valid = by_loop(
        teacher.numpy(),
        teacher_rate,
        student_rate,
        frames,
        offset,
        teacher_mask.numpy(),
        student_mask.numpy(),
        mode,
    )
    np.testing.assert_array_equal(mask.numpy(), valid)
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-5)
    assert 0 < mask.sum() < mask.numel()


@settings(max_examples=60, deadline=None)
@given(
    teacher_rate=st.sampled_from([10.0, 50.0, 12.5, 86.1328125, 100.0]),
    student_rate=st.sampled_from([93.75, 86.1328125, 50.0, 62.5, 21.5]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    frames=st.integers(1, 25),
)
def test_equals_the_definition_for_any_lengths(teacher_rate, student_rate, lengths, frames):
    teacher = torch.randn(len(lengths), 9, 2, dtype=torch.float64)
    teacher_mask = lengths_mask(lengths, 9)
    student_mask = torch.ones(len(lengths), frames, dtype=torch.bool)
    features, mask = align_time(
        teacher,
        teacher_rate=teacher_rate,
        student_rate=student_rate,
        frames=frames,
        teacher_mask=teacher_mask,
    )
    expected, valid = by_loop(
        teacher.numpy(),
        teacher_rate,
        student_rate,
        frames,
        [0.0] * len(lengths),
        teacher_mask.numpy(),
        student_mask.numpy(),
        "linear",
    )
    np.testing.assert_array_equal(mask.numpy(), valid)
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6)


def test_a_ramp_stays_a_ramp_and_does_not_drift():
    # 60 s at 50 Hz, each frame holding the time of its own centre: what comes out is the student's clock.
    centres = (torch.arange(3_000, dtype=torch.float64) + 0.5) / 50
    frames = 5_625  # 60 s at 93.75 Hz
    features, mask = align_time(centres[None, :, None], teacher_rate=50.0, student_rate=93.75, frames=frames)
    clock = (np.arange(frames) + 0.5) / 93.75
    inner = (clock >= 0.01) & (clock <= 59.99)
    assert mask.all()
    np.testing.assert_allclose(features[0, :, 0].numpy()[inner], clock[inner], rtol=0, atol=2e-9)
    assert inner.sum() == frames - 2  # one frame at each end is nearer to the edge than the outermost centre


def test_equal_rates_copy():
    teacher = torch.randn(2, 7, 3)
    features, mask = align_time(teacher, teacher_rate=50.0, student_rate=50.0, frames=7)
    assert torch.equal(features, teacher)
    assert mask.all()


def test_offset_reads_the_crop_of_a_longer_clip():
    # A crop that starts 0.4 s into the clip: teacher frames 20.. are what the student sees.
    teacher = torch.randn(2, 60, 3)
    offset = torch.tensor([0.4, 0.0])
    features, mask = align_time(teacher, teacher_rate=50.0, student_rate=50.0, frames=50, offset=offset)
    torch.testing.assert_close(features[0, :40], teacher[0, 20:], atol=1e-5, rtol=0)
    assert torch.equal(features[1], teacher[1, :50])
    assert mask.sum(1).tolist() == [40, 50]


def test_a_large_offset_in_double_stays_exact():
    teacher = torch.arange(1_000.0)[None, :, None] * torch.ones(1, 1, 2)
    offset = torch.tensor([19.013], dtype=torch.float64)
    features, _ = align_time(teacher, teacher_rate=50.0, student_rate=50.0, frames=10, offset=offset)
    np.testing.assert_allclose(features[0, :, 0].numpy(), np.arange(10) + 950.65, rtol=0, atol=1e-4)
    _, mask = align_time(teacher, teacher_rate=50.0, student_rate=50.0, frames=10, offset=-offset / 100)
    assert mask.sum() == 0  # 10 frames from 9.5 frames before the start: the last centre is at 0 - 0.0065


def test_a_sample_does_not_depend_on_the_others_padding():
    generator = torch.Generator().manual_seed(0)
    short = torch.randn(1, 12, 5, generator=generator)
    padded = torch.full((2, 40, 5), 7.0)
    padded[0, :12] = short[0]
    together, together_mask = align_time(
        padded, teacher_rate=50.0, student_rate=93.75, frames=75, teacher_mask=lengths_mask([12, 40], 40)
    )
    alone, alone_mask = align_time(short, teacher_rate=50.0, student_rate=93.75, frames=22)
    assert together_mask[0].sum() == alone_mask.sum() == 22  # 12 frames of 20 ms are 22.5 of the student's
    assert torch.equal(together[0, :22], alone[0])


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_junk_in_the_padding_reaches_neither_output_nor_gradient(junk, mode):
    clean = torch.randn(2, 10, 3)
    mask = lengths_mask([6, 10], 10)
    dirty = torch.where(mask.unsqueeze(-1), clean, junk).requires_grad_()
    arguments = {
        "teacher_rate": 50.0,
        "student_rate": 93.75,
        "frames": 19,
        "teacher_mask": mask,
        "mode": mode,
    }
    features, valid = align_time(dirty, **arguments)
    expected, _ = align_time(clean, **arguments)
    assert torch.equal(features, expected)
    assert (features[~valid] == 0).all()
    features.square().sum().backward()
    assert torch.isfinite(dirty.grad).all()
    assert (dirty.grad[~mask] == 0).all()
    assert (dirty.grad[mask] != 0).any()


def test_gradient():
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)

    def aligned(x):
        return align_time(
            x,
            teacher_rate=50.0,
            student_rate=93.75,
            frames=12,
            offset=torch.tensor([0.011, -0.013]),
            teacher_mask=lengths_mask([6, 4], 6),
        )[0]

    assert torch.autograd.gradcheck(aligned, teacher)


def test_bf16_is_interpolated_in_float32():
    teacher = torch.randn(1, 500, 4).bfloat16()
    arguments = {"teacher_rate": 50.0, "student_rate": 93.75, "frames": 930}
    features, _ = align_time(teacher, **arguments)
    exact, _ = align_time(teacher.double(), **arguments)
    assert features.dtype == torch.bfloat16
    # One rounding at the end: half a unit in the last of bf16's 8 bits, and a little for float32.
    error = (features.double() - exact).abs()
    assert (error <= exact.abs() * 2.0**-8 + 1e-6).all()


def test_one_graph_without_host_syncs():
    def aligned(x, mask, offset):
        return align_time(
            x,
            teacher_rate=50.0,
            student_rate=93.75,
            frames=30,
            offset=offset,
            teacher_mask=mask,
            student_mask=None,
        )

    inputs = (torch.randn(2, 20, 3), lengths_mask([20, 9], 20), torch.tensor([0.0, 0.05]))
    compiled = torch.compile(aligned, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(*inputs), aligned(*inputs)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher": torch.zeros(2, 5)}, r"^teacher: expected \[B, S, W\]"),
        ({"teacher": torch.zeros(2, 5, 3, dtype=torch.long)}, r"torch\.int64"),
        ({"teacher_rate": 0.0}, r"^teacher_rate: expected frames per second above 0, got 0\.0"),
        ({"student_rate": -1.0}, r"^student_rate: .* got -1\.0"),
        ({"student_rate": float("inf")}, r"^student_rate: .* got inf"),
        ({"student_rate": "50"}, r"^student_rate: .* got '50'"),
        ({"frames": 0}, r"^teacher, frames: expected at least one of each, got \[2, 5, 3\] and 0"),
        ({"offset": torch.zeros(3)}, r"^offset: expected floating \[2\] seconds, got \[3\]"),
        ({"teacher_mask": torch.ones(2, 4, dtype=torch.bool)}, r"^teacher_mask: expected bool \[2, 5\]"),
        (
            {"student_mask": torch.ones(2, 8)},
            r"^student_mask: expected bool \[2, 8\], got torch\.float32 \[2, 8\]",
        ),
        ({"mode": "cubic"}, r"^mode: expected .* got 'cubic'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"teacher": torch.zeros(2, 5, 3), "teacher_rate": 50.0, "student_rate": 93.75, "frames": 8}
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        align_time(arguments.pop("teacher"), **arguments)


def test_frames_are_a_number():
    for frames in (2.5, "8", None):
        with pytest.raises(TypeError, match=r"^frames: expected a number of frames, got"):
            align_time(torch.zeros(2, 5, 3), teacher_rate=50.0, student_rate=93.75, frames=frames)
