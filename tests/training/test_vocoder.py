"""Waveforms from mels of any length."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.data.mel import MEL_PRESETS, LogMel
from agrepa_fast.training.vocoder import build_vocoder


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
def test_griffin_lim_takes_mels_shorter_than_a_window(frames):
    log_mel = LogMel(MEL_PRESETS["compact-16khz"])
    mel = torch.randn(frames, 64, generator=torch.Generator().manual_seed(0))
    waveform = build_vocoder("griffin-lim", log_mel)(mel)
    assert waveform.shape == ((frames - 1) * 256,)
    assert waveform.isfinite().all()
    if frames == 9:  # long enough: nothing is added
        torch.testing.assert_close(waveform, log_mel.inverse(mel), rtol=0, atol=0)
