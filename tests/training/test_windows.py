"""`data.long=windows` in a run: exact resume, and the same recordings on both sides of the hold-out as with crops."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import checkpoints
from agrepa_fast.training.start import resume_run, start_run

LONG = ("data.long=windows", "data.max_seconds=0.5", "alignment.enabled=false", "train.samples=0")


def test_a_run_in_windows_resumes_exactly_and_holds_out_whole_recordings(tiny_config, state_bits, assert_same_bits):
    trainer = start_run(tiny_config(*LONG))
    assert len(trainer.feed.clips) > len(trainer.data.train)  # the corpus has clips of up to 2 s
    assert sum(trainer.feed.clips.lengths) > sum(trainer.data.train.lengths)
    folder = trainer.run()
    bits = state_bits(folder)
    resume_run(checkpoints(folder / "checkpoints")[0]).run()
    assert_same_bits(bits, state_bits(folder))

    cropped = start_run(tiny_config(*LONG, "data.long=crop", "train.name=cropped"))
    for side in ("train", "valid"):
        assert torch.equal(trainer.data.split.record[side], cropped.data.split.record[side])
    # Validation is on the same crops, so that the losses of both compare.
    first = [read_log(run / "log.jsonl") for run in (folder, cropped.run())]
    losses = [[e["flow_loss"] for e in log if e["event"] == "valid"] for log in first]
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]


def test_unreadable_recordings_count_once_however_many_windows_they_have(tiny_config, clips):
    trainer = start_run(tiny_config(*LONG, f"data.train=[{clips}]", "data.unreadable_share=0.2"))
    recordings = trainer.data.train.clips
    trainer.feed.unreadable = {clip.path for clip in recordings[: len(recordings) // 4 + 1]}
    batch = next(trainer.feed.batches(0, print))
    with pytest.raises(UserError, match=f"{len(trainer.feed.unreadable)} of {len(recordings)} clips cannot be read"):
        trainer.feed.inputs(batch, False)


def test_windows_need_room_for_the_mel(tiny_config):
    with pytest.raises(UserError, match=r"data\.long: windows may be half as long as data\.max_seconds \(0\.05\)"):
        tiny_config("data.max_seconds=0.05", "data.long=windows")
