"""Batches: fixed shapes, coverage, determinism from (seed, step), ranks, crops, prompts, unreadable clips."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from agrepa_fast.data.batches import collate, load_batch
from agrepa_fast.data.buckets import BucketBatches
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.loading import iterate
from agrepa_fast.data.manifest import Clip
from agrepa_fast.data.mel import LogMel, MelConfig
from agrepa_fast.errors import UserError

CONFIG = MelConfig(sample_rate=8000, n_fft=256, win_length=256, hop_length=64, mels=8, f_max=4000.0)
HOP = CONFIG.hop_length
BUCKETS = (20, 40)


def make_clip(folder, number, samples, *, text=None, domain="speech", tokens=None):
    """A clip whose sample i has the value (i + 1) / 20000, so that a crop tells where it was cut."""
    path = folder / f"{number}.wav"
    soundfile.write(path, (np.arange(samples) + 1) / 20000, 8000, subtype="FLOAT")
    return Clip(path, f"clip {number}" if text is None else text, domain, None, tokens, f"list.csv:{number}")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    samples = rng.integers(5 * HOP, 70 * HOP, size=23)
    return [
        make_clip(folder, number, int(length), domain="speech" if number < 17 else "audio")
        for number, length in enumerate(samples)
    ]


def build(clips, **options):
    dataset = ClipDataset(clips, CONFIG, **{"max_frames": 40, **options})
    batches = BucketBatches(dataset.lengths, buckets=BUCKETS, frames_per_batch=160, seed=5)
    return dataset, batches


def same(first, second):
    for field in dataclasses.fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype, field.name
            assert torch.equal(one, two), field.name
        else:
            assert one == two, field.name


def test_lengths_are_frames_up_to_the_maximum(clips):
    dataset, _ = build(clips)
    samples = [soundfile.info(clip.path).frames for clip in clips]
    assert dataset.lengths == [min(40, 1 + count // HOP) for count in samples]
    assert max(samples) > 41 * HOP


def test_batch_contents_follow_from_the_waveform(clips):
    dataset, batches = build(clips)
    log_mel = LogMel(CONFIG)
    for step in range(batches.steps_per_epoch):
        batch = load_batch(dataset, batches, step, seed=5)
        count, frames = batch.mask.shape
        assert (count, frames) in ((8, 20), (4, 40))
        assert batch.mel.shape == (count, frames, 8)
        assert batch.audio.shape == (count, frames * HOP - 1)
        assert batch.indices.tolist() == list(batches.batch(step)[1])
        for row, clip in enumerate(batch.clips):
            assert clip == clips[int(batch.indices[row])]
            length = int(batch.audio_lengths[row])
            real = 1 + length // HOP
            audio = batch.audio[row, :length]
            # A ramp: consecutive samples of the file from a hop boundary on.
            start = round(float(audio[0]) * 20000) - 1
            assert start % HOP == 0
            torch.testing.assert_close(audio, (torch.arange(length) + start + 1) / 20000)
            assert not batch.audio[row, length:].any()
            assert batch.mask[row].tolist() == [True] * real + [False] * (frames - real)
            torch.testing.assert_close(batch.mel[row, :real], log_mel(audio), atol=1e-5, rtol=0)
            assert not batch.mel[row, real:].any()
            wanted = list(clip.text.encode())
            if soundfile.info(clip.path).frames < 40 * HOP:
                assert (start, length) == (0, soundfile.info(clip.path).frames)
                assert batch.token_lengths[row] == len(wanted)
                assert batch.tokens[row, : len(wanted), 0].tolist() == wanted
            assert not batch.tokens[row, int(batch.token_lengths[row]) :].any()
            assert batch.domains[int(batch.domain[row])] == clip.domain
        assert batch.domains == ("audio", "speech")
        assert batch.tokens.shape == (count, 16, 1)
        assert not batch.vocabulary.any()


def test_prompt_is_a_prefix_of_the_crop_of_the_asked_share(clips):
    dataset, batches = build(clips, prompt_share=(0.2, 0.6))
    shares = []
    for batch in iterate(dataset, batches, start=0, stop=3 * batches.steps_per_epoch):
        assert not (batch.prompt & ~batch.mask).any()
        lengths, frames = batch.prompt.sum(1), batch.mask.sum(1)
        assert torch.equal(batch.prompt, torch.arange(batch.prompt.shape[1]) < lengths[:, None])
        assert (lengths >= (0.2 * frames).floor()).all()
        assert (lengths <= 0.6 * frames).all()
        shares += (lengths / frames).tolist()
    assert min(shares) < 0.3
    assert max(shares) > 0.5


def test_prompt_of_nothing(clips):
    dataset, batches = build(clips, prompt_share=(0.0, 0.0))
    assert not load_batch(dataset, batches, 0, seed=0).prompt.any()


def test_crops_move_and_cut_their_tokens_in_proportion(tmp_path):
    # 100 frames and 50 tokens that count up: token k stands over frames 2 k and 2 k + 1.
    np.save(tmp_path / "t.npy", np.arange(50))
    clip = make_clip(tmp_path, 0, 99 * HOP, tokens=tmp_path / "t.npy")
    dataset = ClipDataset([clip], CONFIG, max_frames=31, vocabularies={"text": (64,)})
    starts = set()
    for seed in range(40):
        sample = dataset.item(0, torch.Generator().manual_seed(seed))
        start = (round(float(sample["audio"][0]) * 20000) - 1) // HOP
        starts.add(start)
        assert sample["mel"].shape == (31, 8)
        assert sample["tokens"].flatten().tolist() == list(range(start // 2, -(-(start + 31) // 2)))
    assert min(starts) < 15
    assert 54 < max(starts) <= 69
    assert len(starts) > 20


def test_a_crop_can_reach_both_ends(tmp_path):
    samples = 20 * HOP + 3  # 21 frames, one more than fits
    dataset = ClipDataset([make_clip(tmp_path, 0, samples)], CONFIG, max_frames=20)
    starts: Counter[int] = Counter()
    for seed in range(40):
        audio = dataset.item(0, torch.Generator().manual_seed(seed))["audio"]
        start = round(float(audio[0]) * 20000) - 1
        starts[start] += 1
        assert audio.shape[0] == min(20 * HOP - 1, samples - start)
    assert set(starts) == {0, HOP}
    assert min(starts.values()) > 8


def test_each_epoch_crops_and_prompts_anew(tmp_path):
    dataset, batches = build([make_clip(tmp_path, 0, 150 * HOP)])
    assert batches.steps_per_epoch == 1
    seen = [load_batch(dataset, batches, step, seed=0) for step in range(6)]
    assert len({float(batch.audio[0, 0]) for batch in seen}) >= 5
    assert len({int(batch.prompt[0].sum()) for batch in seen}) >= 3


def test_two_streams_two_vocabularies(tmp_path):
    np.save(tmp_path / "s.npy", np.array([[900, 1], [901, 2]]))
    np.save(tmp_path / "a.npy", np.array([3, 4, 5, 6, 7, 8]))
    clips = [
        make_clip(tmp_path, 0, 1000, tokens=tmp_path / "s.npy"),
        make_clip(tmp_path, 1, 1000, domain="audio", tokens=tmp_path / "a.npy"),
    ]
    dataset = ClipDataset(
        clips,
        CONFIG,
        max_frames=20,
        vocabularies={"s3": (1000, 10), "as": (10, 10)},
        vocabulary_of={"speech": "s3", "audio": "as"},
    )
    batch = collate([dataset.item(index, torch.Generator()) for index in (0, 1)], 20, dataset.domains, CONFIG)
    assert dataset.vocabulary_names == ("s3", "as")
    assert batch.vocabulary.tolist() == [0, 1]
    assert batch.tokens.shape == (2, 16, 2)
    assert batch.token_lengths.tolist() == [2, 3]
    assert batch.tokens[0, :2].tolist() == [[900, 1], [901, 2]]
    assert batch.tokens[1, :3].tolist() == [[3, 4], [5, 6], [7, 8]]


def test_token_padding_is_the_next_multiple_of_16(tmp_path):
    for text, wanted in (("", 16), ("x" * 16, 16), ("x" * 17, 32)):
        dataset = ClipDataset([make_clip(tmp_path, 0, 1000, text=text)], CONFIG, max_frames=20)
        batch = collate([dataset.item(0, torch.Generator())], 20, dataset.domains, CONFIG)
        assert batch.tokens.shape[1] == wanted
        assert batch.token_lengths.tolist() == [len(text)]


def test_the_same_step_is_the_same_batch_in_any_order_and_process(clips):
    dataset, batches = build(clips)
    stop = 2 * batches.steps_per_epoch
    straight = list(iterate(dataset, batches, start=0, stop=stop))
    for step in (stop - 1, 0, 3):
        fresh_dataset, fresh_batches = build(clips, cache=False)
        same(load_batch(fresh_dataset, fresh_batches, step, seed=5), straight[step])
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    for workers in (0, 2):
        resumed = list(iterate(dataset, batches, start=2, stop=stop, workers=workers))
        assert len(resumed) == stop - 2
        for one, two in zip(resumed, straight[2:]):
            same(one, two)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = load_batch(dataset, batches, 0, seed=6)
    assert not torch.equal(other.prompt, straight[0].prompt)


def test_a_clip_that_became_unreadable_is_stood_in_for_and_named(tmp_path):
    clips = [make_clip(tmp_path, number, 1000) for number in range(3)]
    dataset, batches = build(clips, cache=False)
    [whole] = iterate(dataset, batches, start=0, stop=1)
    clips[1].path.write_bytes(b"")
    for workers in (0, 1):
        [batch] = iterate(dataset, batches, start=0, stop=1, workers=workers)
        drawn = whole.indices.tolist()
        following = [drawn[place:] + drawn[:place] for place in range(len(drawn))]
        assert batch.indices.tolist() == [next(index for index in rest if index != 1) for rest in following]
        [skipped] = batch.skipped
        assert (skipped.path, skipped.reason) == (clips[1].path, "the file is empty (0 bytes)")
        kept = whole.indices != 1
        assert torch.equal(batch.mel[kept], whole.mel[kept])


def test_others_of_the_bucket_stand_in_for_a_batch_that_cannot_be_read(tmp_path):
    clips = [make_clip(tmp_path, number, 1000 + number) for number in range(9)]
    dataset = build(clips, cache=False)[0]
    single = BucketBatches(dataset.lengths, buckets=BUCKETS, frames_per_batch=20, seed=5)
    drawn = [single.batch(step)[1][0] for step in range(9)]
    assert sorted(drawn) == list(range(9))
    for number in (2, 3, 4):
        clips[number].path.write_bytes(b"")
    taken = []
    for step in range(9):
        batch = load_batch(dataset, single, step, seed=5)
        same(batch, load_batch(dataset, single, step, seed=5))
        [index] = batch.indices.tolist()
        if drawn[step] in (2, 3, 4):
            assert batch.skipped[0].path == clips[drawn[step]].path
            taken.append(index)
        else:
            assert index == drawn[step]
    assert len(taken) == 3
    assert not set(taken) & {2, 3, 4}
    # Clips of shorter buckets fit, longer ones do not.
    lengths = [15, 15, 35]
    plan = BucketBatches(lengths, buckets=BUCKETS, frames_per_batch=20, seed=0)
    for step in range(3):
        frames, [index] = plan.batch(step)
        assert set(plan.stand_ins(step)) == {other for other in range(3) if other != index and lengths[other] <= frames}


def test_a_batch_that_cannot_be_read_is_one_line_from_a_worker_too(tmp_path):
    clips = [make_clip(tmp_path, number, 1000) for number in range(3)]
    dataset, batches = build(clips, cache=False)
    for clip in clips:
        clip.path.write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            list(iterate(dataset, batches, start=0, stop=1, workers=workers))
        assert str(error.value) == "batch 0: none of its clips can be read; the first: the file is empty (0 bytes)"


class Deadly(ClipDataset):
    """Kills its worker process once: at the first item after the file `trap` was made."""

    trap: Path

    def item(self, index, generator):
        if torch.utils.data.get_worker_info() is not None and self.trap.exists():
            self.trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().item(index, generator)


def test_a_dead_worker_is_named_and_survived(clips, tmp_path):
    dataset, batches = build(clips)
    straight = list(iterate(dataset, batches, start=0, stop=6))
    deadly = build(clips)[0]
    deadly.__class__, deadly.trap = Deadly, tmp_path / "trap"
    notices: list[str] = []
    got = []
    for batch in iterate(deadly, batches, start=0, stop=6, workers=1, notice=notices.append):
        got.append(batch)
        if len(got) == 2:
            deadly.trap.touch()
    assert len(notices) == 1
    assert "worker" in notices[0]
    assert len(got) == 6
    for one, two in zip(got, straight):
        same(one, two)


def test_the_mel_of_a_whole_clip_is_computed_once(tmp_path, monkeypatch):
    clips = [make_clip(tmp_path, 0, 1000), make_clip(tmp_path, 1, 24_000)]  # the second one is cropped
    cached, plain = build(clips)[0], build(clips, cache=False)[0]
    calls = []
    original = cached._log_mel.forward
    monkeypatch.setattr(cached._log_mel, "forward", lambda wave: calls.append(len(wave)) or original(wave))
    for seed in range(4):
        for index in (0, 1):
            one, two = (d.item(index, torch.Generator().manual_seed(seed))["mel"] for d in (cached, plain))
            assert torch.equal(one, two)
    assert calls.count(1000) == 1
    assert len(calls) == 5
    batch = collate([cached.item(0, torch.Generator())], 40, ("speech",), CONFIG)
    batch.mel.zero_()  # a batch is the caller's: the cache stays what it was
    assert torch.equal(cached.item(0, torch.Generator())["mel"], plain.item(0, torch.Generator())["mel"])


def test_every_batch_of_a_bucket_has_the_shape_of_its_longest_text(tmp_path):
    texts = ["a" * 5, "a" * 40, "a" * 17]
    clips = [dataclasses.replace(make_clip(tmp_path, n, 1000), text=text) for n, text in enumerate(texts)]
    dataset, _ = build(clips)
    lengths = dataset.lengths
    assert dataset.token_lengths == [5, 40, 17]
    batches = BucketBatches(
        lengths, buckets=[max(lengths)], frames_per_batch=max(lengths), seed=0, tokens=dataset.token_lengths
    )
    shapes = {load_batch(dataset, batches, step, seed=0).tokens.shape for step in range(6)}
    assert shapes == {(1, 48, 1)}


def test_a_crop_has_no_more_tokens_than_token_lengths_says(tmp_path):
    clip = dataclasses.replace(make_clip(tmp_path, 0, 24_000), text="a" * 97)
    dataset, _ = build([clip], max_frames=20)
    [most] = dataset.token_lengths
    seen = [dataset.item(0, torch.Generator().manual_seed(seed))["tokens"].shape[0] for seed in range(200)]
    assert max(seen) <= most < 97
    assert most - max(seen) <= 1


def test_to_moves_every_tensor(clips):
    dataset, batches = build(clips)
    batch = load_batch(dataset, batches, 0, seed=0)
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta"
            assert value.shape == getattr(batch, field.name).shape
        else:
            assert value is getattr(batch, field.name)


def test_check_drops_what_cannot_be_read(tmp_path):
    clips = [make_clip(tmp_path, number, 1000) for number in range(6)]
    clips[1].path.write_bytes(b"")
    clips[3].path.unlink()
    clips[4] = dataclasses.replace(clips[4], tokens=tmp_path / "gone.npy")
    with pytest.raises(UserError, match=r"3 of 6 clips cannot be read, at most 40% may be: .*1\.wav") as error:
        ClipDataset(clips, CONFIG, max_frames=20).check(max_share=0.4)
    assert "\n" not in str(error.value)
    dataset = ClipDataset(clips, CONFIG, max_frames=20)
    skipped = dataset.check(max_share=0.5)
    assert [(item.path, item.source, item.reason) for item in skipped] == [
        (clips[1].path, "list.csv:1", "the file is empty (0 bytes)"),
        (clips[3].path, "list.csv:3", "no such audio file"),
        (clips[4].path, "list.csv:4", f"{tmp_path / 'gone.npy'}: no such token file"),
    ]
    assert dataset.clips == [clips[0], clips[2], clips[5]]
    assert dataset.lengths == [16, 16, 16]
    with pytest.raises(UserError, match="1 of 1"):
        ClipDataset([clips[1]], CONFIG, max_frames=20).check(max_share=1.0)
    with pytest.raises(ValueError, match="max_share"):
        dataset.check(max_share=5)


def test_a_text_that_is_no_unicode_makes_its_clip_unreadable(tmp_path):
    texts = ["fine", "hi \ud83d", "\udcff", "\U0001f600"]
    clips = [make_clip(tmp_path, number, 1000, text=text) for number, text in enumerate(texts)]
    dataset = ClipDataset(clips, CONFIG, max_frames=40)
    skipped = dataset.check(0.5)
    assert [clip.text for clip in dataset.clips] == ["fine", "\U0001f600"]
    assert [(item.source, item.reason.partition(" (")[0]) for item in skipped] == [
        ("list.csv:1", "the text is not valid: \\ud83d is half a character"),
        ("list.csv:2", "the text is not valid: the byte 0xff is not UTF-8"),
    ]
    with pytest.raises(UserError, match=r"2 of 4 clips cannot be read.*list\.csv:1"):
        ClipDataset(clips, CONFIG, max_frames=40).check(0.4)


def test_too_short_for_one_window_is_skipped(tmp_path):
    clips = [make_clip(tmp_path, 0, 128), make_clip(tmp_path, 1, 129)]
    (skipped,) = ClipDataset(clips, CONFIG, max_frames=20).check(max_share=0.5)
    assert skipped.path == clips[0].path
    assert "too short (128 samples at 8000 Hz, 129 needed)" in skipped.reason


def test_cache_stops_at_its_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("agrepa_fast.data.dataset.CACHE_BYTES", 9000)
    clips = [make_clip(tmp_path, number, 1000) for number in range(4)]
    dataset = ClipDataset(clips, CONFIG, max_frames=20)
    dataset.check(max_share=0.0)
    for clip in clips:
        clip.path.unlink()
    readable = []
    for index in range(4):
        try:
            dataset.item(index, torch.Generator())
        except UserError:
            continue
        readable.append(index)
    # 4000 bytes each.
    assert readable == [0, 1]


def test_settings_that_cannot_work(tmp_path):
    clip = make_clip(tmp_path, 0, 1000)
    with pytest.raises(UserError, match=r"list\.csv:0: 0\.wav has no token file, and the vocabulary 's3'"):
        ClipDataset([clip], CONFIG, max_frames=20, vocabularies={"s3": (4096,)}, vocabulary_of={"speech": "s3"})
    with pytest.raises(UserError, match=r"list\.csv:0: domain 'speech' needs the vocabulary 'text', known are s3"):
        ClipDataset([clip], CONFIG, max_frames=20, vocabularies={"s3": (4096,)})
    with pytest.raises(UserError, match=r"list\.csv:0: domain 'speech' is not one of this run's \(audio\)"):
        ClipDataset([clip], CONFIG, max_frames=20, domains=("audio",))
    with pytest.raises(ValueError, match="same number of streams"):
        ClipDataset([clip], CONFIG, max_frames=20, vocabularies={"text": (256,), "s3": (4096, 1024)})
    with pytest.raises(UserError, match="list of clips is empty"):
        ClipDataset([], CONFIG, max_frames=20)
    with pytest.raises(ValueError, match="prompt_share"):
        ClipDataset([clip], CONFIG, max_frames=20, prompt_share=(0.5, 1.0))
    with pytest.raises(ValueError, match="shorter than one window"):
        ClipDataset([clip], CONFIG, max_frames=2)
    dataset = ClipDataset([clip], CONFIG, max_frames=20)
    with pytest.raises(ValueError, match="has 16 frames, the bucket 10"):
        collate([dataset.item(0, torch.Generator())], 10, dataset.domains, CONFIG)


# BucketBatches alone.


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


def test_steps_must_make_sense(clips):
    dataset, batches = build(clips)
    with pytest.raises(ValueError, match="step must not be negative"):
        batches.batch(-1)
    with pytest.raises(ValueError, match="start <= stop"):
        next(iterate(dataset, batches, start=3, stop=2))
