"""Clips that cannot be read: what stands in for them, who is named, and workers that die."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from agrepa_fast.data.batches import load_batch
from agrepa_fast.data.buckets import BucketBatches
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.loading import iterate
from agrepa_fast.errors import UserError

from .clips import BUCKETS, CONFIG, build, make_clip, same


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
