"""Clips whose samples tell where they were cut, and batches of them, for the tests of this folder."""

from __future__ import annotations

import dataclasses

import numpy as np
import soundfile
import torch

from agrepa_fast.data.buckets import BucketBatches
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.manifest import Clip
from agrepa_fast.data.mel import MelConfig

CONFIG = MelConfig(sample_rate=8000, n_fft=256, win_length=256, hop_length=64, mels=8, f_max=4000.0)
HOP = CONFIG.hop_length
BUCKETS = (20, 40)


def make_clip(folder, number, samples, *, text=None, domain="speech", tokens=None):
    """A clip whose sample i has the value (i + 1) / 20000, so that a crop tells where it was cut."""
    path = folder / f"{number}.wav"
    soundfile.write(path, (np.arange(samples) + 1) / 20000, 8000, subtype="FLOAT")
    return Clip(path, f"clip {number}" if text is None else text, domain, None, tokens, f"list.csv:{number}")


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
