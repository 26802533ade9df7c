"""`BucketBatches`: coverage of every clip, ranks, seeds, balance of the domains."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrepa_fast.data.buckets import BucketBatches


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    frames_per_batch=st.integers(1, 400),
    seed=st.integers(0, 9),
    world_size=st.integers(1, 3),
)
def test_every_epoch_covers_every_clip_in_its_bucket(lengths, frames_per_batch, seed, world_size):
    buckets = (25, 50, 100)
    ranks = [
        BucketBatches(
            lengths,
            buckets=buckets,
            frames_per_batch=frames_per_batch,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for epoch in (0, 1):
        drawn: Counter[int] = Counter()
        waste: Counter[int] = Counter()
        for position in range(ranks[0].steps_per_epoch):
            step = epoch * ranks[0].steps_per_epoch + position
            parts = [batches.batch(step) for batches in ranks]
            (frames,) = {frames for frames, _ in parts}
            waste[frames] += world_size * max(1, frames_per_batch // frames)
            for _, indices in parts:
                assert len(indices) == max(1, frames_per_batch // frames)
                drawn.update(indices)
                for index in indices:
                    assert frames == min(size for size in buckets if size >= lengths[index])
        assert set(drawn) == set(range(len(lengths)))
        for frames, total in waste.items():
            shorter = {25: 0, 50: 25, 100: 50}[frames]
            members = sum(shorter < length <= frames for length in lengths)
            # No more than one filled batch.
            assert total - members < world_size * max(1, frames_per_batch // frames)


def test_ranks_share_nothing_when_there_is_enough():
    lengths = [10] * 24
    ranks = [
        BucketBatches(lengths, buckets=(10,), frames_per_batch=40, seed=1, rank=rank, world_size=3) for rank in range(3)
    ]
    assert ranks[0].steps_per_epoch == 2
    seen = [index for step in range(2) for batches in ranks for index in batches.batch(step)[1]]
    assert sorted(seen) == list(range(24))


def test_epochs_and_seeds_differ_and_steps_are_random_access():
    def plan(seed):
        batches = BucketBatches([10] * 40, buckets=(10,), frames_per_batch=80, seed=seed)
        return batches, [batches.batch(step) for step in range(10)]

    batches, first = plan(1)
    assert [batches.batch(step) for step in reversed(range(10))] == first[::-1]
    assert plan(1)[1] == first
    assert plan(2)[1] != first
    assert first[:5] != first[5:]


def test_shapes_are_the_buckets_in_use():
    batches = BucketBatches([5, 60, 61], buckets=(100, 10, 50), frames_per_batch=120, seed=0)
    assert batches.shapes == [(12, 10), (1, 100)]
    assert batches.steps_per_epoch == 1 + 2
    assert {(len(indices), frames) for frames, indices in map(batches.batch, range(3))} == {
        (12, 10),
        (1, 100),
    }


@pytest.mark.parametrize("few, many", [(40, 400), (130, 170)])
def test_balance_draws_domains_equally_and_evenly(few, many):
    domains = ["speech"] * many + ["audio"] * few
    lengths = [10 + index % 2 for index in range(many + few)]
    options = {"buckets": (10, 11), "frames_per_batch": 80, "seed": 2, "domains": domains}
    batches = BucketBatches(lengths, balance=True, **options)
    drawn: Counter[int] = Counter()
    for step in range(batches.steps_per_epoch):
        indices = batches.batch(step)[1]
        audio = sum(domains[index] == "audio" for index in indices)
        assert abs(audio - len(indices) / 2) <= 2
        drawn.update(indices)
    counts = Counter(domains[index] for index in drawn.elements())
    assert counts["audio"] / counts.total() == pytest.approx(0.5, abs=0.02)
    assert set(drawn) == set(range(many + few))
    # The repeats are spread over the smaller domain: no clip far more often than another.
    repeats = [drawn[index] for index in range(many, many + few)]
    assert max(repeats) - min(repeats) <= 2
    plain = BucketBatches(lengths, balance=False, **options)
    shares = Counter(domains[index] for step in range(plain.steps_per_epoch) for index in plain.batch(step)[1])
    assert shares["audio"] / shares.total() == pytest.approx(few / (few + many), abs=0.03)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": []}, "lengths is empty"),
        ({"buckets": ()}, "positive buckets"),
        ({"frames_per_batch": 0}, "positive buckets"),
        ({"buckets": (5,)}, "a clip of 10 frames fits no bucket, the longest is 5"),
        ({"rank": 2, "world_size": 2}, "rank 2 is outside a world of 2"),
        ({"seed": -1}, "seed"),
        ({"balance": True}, "needs the domain"),
        ({"domains": ["a"]}, "1 domains for 2 clips"),
    ],
)
def test_misuse(change, message):
    options = {"lengths": [10, 10], "buckets": (10,), "frames_per_batch": 10, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        BucketBatches(options.pop("lengths"), **options)
