"""Clips longer than the longest crop, as several windows: every frame once, with its tokens and features."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.data.buckets import BucketBatches
from agrepa_fast.data.clip import Clip
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.features import Frames, window
from agrepa_fast.data.loading import iterate
from agrepa_fast.data.mel import LogMel, MelConfig

MEL = MelConfig(sample_rate=16000, n_fft=512, win_length=512, hop_length=256, mels=16, f_max=8000)
MOST = 20  # frames of a window
FRAMES = (7, 20, 21, 40, 41, 95)
WINDOWS = (1, 1, 2, 2, 3, 5)


class Ramp:
    """Features at 50 Hz whose value is the number of the frame."""

    width, rate = 1, 50.0

    def read(self, clip, sound, start, seconds):
        first, stop = window(start, seconds, self.rate)
        return Frames(torch.arange(first, stop).float()[:, None], None, first)


@pytest.fixture
def recordings(tmp_path):
    rng = np.random.default_rng(0)
    clips = []
    for number, frames in enumerate(FRAMES):
        path, tokens = tmp_path / f"{number}.wav", tmp_path / f"{number}.npy"
        soundfile.write(path, 0.1 * rng.standard_normal(MEL.samples(frames)), 16000)
        np.save(tokens, np.arange(3 * frames))
        clips.append(Clip(path, "", "speech", None, tokens, f"list.csv:{number}"))
    dataset = ClipDataset(clips, MEL, max_frames=MOST, vocabularies={"text": (1000,)})
    assert dataset.check(0.0) == []
    return dataset


def test_every_frame_of_a_recording_is_in_one_window(recordings):
    windows = recordings.in_windows()
    assert [windows.clips.count(clip) for clip in recordings.clips] == list(WINDOWS)
    samples = [windows.item(index, torch.Generator().manual_seed(index)) for index in range(len(windows))]
    assert windows.lengths == [sample["mel"].shape[0] for sample in samples]
    for clip, frames in zip(recordings.clips, FRAMES):
        own = [sample for sample in samples if sample["clip"] == clip]
        lengths = [sample["mel"].shape[0] for sample in own]
        assert [sample["start"] for sample in own] == np.cumsum([0, *lengths[:-1]]).tolist()
        assert sum(lengths) == frames
        assert max(lengths) <= MOST
        assert max(lengths) - min(lengths) <= 1
        whole, _ = soundfile.read(clip.path, dtype="float32")
        for sample in own:
            first = sample["start"] * MEL.hop_length
            expected = torch.from_numpy(whole[first : first + MEL.samples(sample["mel"].shape[0])])
            assert torch.equal(sample["audio"], expected)
            torch.testing.assert_close(sample["mel"], LogMel(MEL)(expected))
            # There are three tokens for each frame.
            start, stop = 3 * sample["start"], 3 * (sample["start"] + sample["mel"].shape[0])
            assert sample["tokens"][:, 0].tolist() == list(range(start, stop))
    assert all(sample["tokens"].shape[0] <= most for sample, most in zip(samples, windows.token_lengths))


def test_features_of_a_window_are_those_of_its_part_of_the_recording(recordings):
    recordings.sources["ramp"] = Ramp()
    windows = recordings.in_windows()
    for index in range(len(windows)):
        sample = windows.item(index, None)
        begin = sample["start"] / MEL.frame_rate
        frames = sample["features"]["ramp"]
        assert frames.first == frames.values[0, 0]
        assert frames.values[0, 0] <= begin * 50
        assert frames.values[-1, 0] >= (begin + len(sample["audio"]) / 16000) * 50


def test_an_epoch_draws_every_window_and_crops_stay_as_they_were(recordings):
    before = [recordings.item(index, torch.Generator().manual_seed(3)) for index in range(len(FRAMES))]
    windows = recordings.in_windows()
    plan = BucketBatches(windows.lengths, buckets=(10, MOST), frames_per_batch=MOST, seed=0)
    seen = set()
    for batch in iterate(windows, plan, start=0, stop=plan.steps_per_epoch):
        assert batch.mel.shape[1] in (10, MOST)
        seen.update(zip((clip.path.stem for clip in batch.clips), batch.starts.tolist()))
    assert len(seen) == sum(WINDOWS)
    after = [recordings.item(index, torch.Generator().manual_seed(3)) for index in range(len(FRAMES))]
    assert [sample["start"] for sample in before] == [sample["start"] for sample in after]
    assert len(recordings) == len(FRAMES)
