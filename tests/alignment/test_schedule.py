"""AlignmentSchedule: every phase by hand, no jump between phases, and the arguments it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from agrepa_fast import AlignmentSchedule, SimilarityStop, timestep_weight
from agrepa_fast.errors import UserError


def test_every_phase():
    schedule = AlignmentSchedule(start=10, ramp=4, decay_start=20, stop=30)
    assert [schedule(step) for step in (0, 9)] == [0, 0]
    assert [schedule(step) for step in (10, 11, 12, 13, 14, 19)] == [0.25, 0.5, 0.75, 1, 1, 1]
    expected = [0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert [schedule(step) for step in range(20, 30)] == pytest.approx(expected)
    assert schedule(20) == 1
    assert schedule(25) == pytest.approx(0.5)
    assert [schedule(step) for step in (30, 31, 10**9)] == [0, 0, 0]


def test_no_jump_between_phases():
    schedule = AlignmentSchedule(start=100, ramp=200, decay_start=600, stop=1000)
    values = [schedule(step) for step in range(1100)]
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    # The steepest part is the ramp's 1/200; the cosine's is pi / 2 / 400.
    assert max(steps) <= 1 / 200 + 1e-12
    assert all(after >= before for before, after in itertools.pairwise(values[:600]))
    assert all(after <= before for before, after in itertools.pairwise(values[600:]))
    assert max(values) == 1
    assert min(values) == 0


def test_decay_may_begin_within_the_ramp():
    """Then both apply; the factor stays continuous and never reaches 1."""
    schedule = AlignmentSchedule(start=0, ramp=20, decay_start=10, stop=30)
    assert schedule(9) == pytest.approx(10 / 20)
    assert schedule(15) == pytest.approx(16 / 20 * 0.5 * (1 + math.cos(math.pi * 5 / 20)))
    assert max(schedule(step) for step in range(30)) < 1


def test_without_ramp_and_without_decay():
    schedule = AlignmentSchedule(start=5, ramp=0, decay_start=8, stop=8)
    assert [schedule(step) for step in range(4, 10)] == [0, 1, 1, 1, 0, 0]


def test_an_empty_schedule_is_always_off():
    assert {AlignmentSchedule(0, 0, 0, 0)(step) for step in range(5)} == {0.0}


@pytest.mark.parametrize("phases", [(-1, 0, 5, 9), (6, 0, 5, 9), (0, 0, 10, 9), (0, -1, 5, 9)])
def test_phases_out_of_order_are_refused(phases):
    with pytest.raises(ValueError, match=r"0 <= start <= decay_start <= stop and ramp >= 0, got .*start="):
        AlignmentSchedule(*phases)


def test_a_line_a_constant_and_a_hard_stop():
    line = AlignmentSchedule(start=0, ramp=0, decay_start=10, stop=20, decay="linear")
    assert [line(step) for step in (9, 10, 12, 15, 19, 20)] == pytest.approx([1, 1, 0.8, 0.5, 0.1, 0])
    constant = AlignmentSchedule.constant(start=5, ramp=2)
    assert [constant(step) for step in (4, 5, 6, 7, 10**12)] == [0, 0.5, 1, 1, 1]
    hard = AlignmentSchedule(start=0, ramp=0, decay_start=7, stop=7)
    assert [hard(step) for step in (0, 6, 7)] == [1, 1, 0]
    with pytest.raises(UserError, match='decay: expected "cosine" or "linear", got \'step\''):
        AlignmentSchedule(0, 0, 1, 2, "step")


def test_stop_by_similarity():
    """The running mean by hand; a nan is passed over; once stopped it stays so, also after loading."""
    stop = SimilarityStop(threshold=0.5, momentum=0.5)
    cosines = [torch.nan, 0.2, 0.6, torch.nan, 0.6, 0.7, -1.0, -1.0]
    means = [torch.nan, 0.2, 0.4, 0.4, 0.5, 0.6, -0.2, -0.6]
    factors = []
    for cosine, mean in zip(cosines, means):
        factors.append(stop(torch.tensor(cosine)).item())
        assert stop.mean.item() == pytest.approx(mean, nan_ok=True, abs=1e-6)
    assert factors[:4] == [1, 1, 1, 1]
    assert factors[5:] == [0, 0, 0]
    restored = SimilarityStop(threshold=0.5)
    restored.load_state_dict(stop.state_dict())
    assert restored(torch.tensor(-1.0)).item() == 0
    with pytest.raises(UserError, match="threshold"):
        SimilarityStop(threshold=1.5)


@pytest.mark.parametrize("kind, at_quarter", [("uniform", 1.0), ("data", 0.5), ("noise", 1.5), ("middle", 1.125)])
def test_timestep_weights_have_mean_one(kind, at_quarter):
    assert timestep_weight(torch.tensor([0.25]), kind).item() == pytest.approx(at_quarter)
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert timestep_weight(t, kind).mean().item() == pytest.approx(1, abs=1e-5)


def test_unknown_timestep_weighting():
    with pytest.raises(UserError, match="expected one of uniform, data, noise, middle, got 'late'"):
        timestep_weight(torch.tensor([0.5]), "late")
