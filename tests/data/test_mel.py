"""The mel against the formula written out here, its counts, its inverse, and its independence of autocast."""

from __future__ import annotations

import math

import pytest
import torch

from agrepa_fast.data.mel import MEL_PRESETS, LogMel, MelConfig
from agrepa_fast.errors import UserError


def signal(samples: int, rate: int) -> torch.Tensor:
    time = torch.arange(samples, dtype=torch.float64) / rate
    chirp = torch.sin(2 * math.pi * (200 * time + 1500 * time**2))
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 0.3 * chirp + 0.01 * noise


def expected(waveform: torch.Tensor, config: MelConfig) -> torch.Tensor:
    """log(max(mel(|STFT|), 1e-5)) normalised, in float64, with the HTK triangles written out."""
    spectrum = torch.stft(
        waveform,
        config.n_fft,
        config.hop_length,
        config.win_length,
        window=torch.hann_window(config.win_length, dtype=torch.float64),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    ).abs()
    to_mel = lambda hertz: 2595 * math.log10(1 + hertz / 700)  # noqa: E731
    low, high = to_mel(config.f_min), to_mel(config.f_max)
    edges = [700 * (10 ** ((low + (high - low) * i / (config.mels + 1)) / 2595) - 1) for i in range(config.mels + 2)]
    frequency = torch.arange(config.n_fft // 2 + 1, dtype=torch.float64) * config.sample_rate / config.n_fft
    rows = []
    for left, centre, right in zip(edges, edges[1:], edges[2:]):
        up = (frequency - left) / (centre - left)
        down = (right - frequency) / (right - centre)
        rows.append(torch.minimum(up, down).clamp_min(0))
    log_mel = torch.log((torch.stack(rows) @ spectrum).clamp_min(1e-5))
    return ((log_mel - config.mean) / config.std).T


@pytest.mark.parametrize("name", sorted(MEL_PRESETS))
def test_equals_the_formula(name):
    config = MEL_PRESETS[name]
    waveform = signal(config.sample_rate // 2 + 77, config.sample_rate)
    mel = LogMel(config)(waveform.float())
    assert mel.dtype == torch.float32
    wanted = expected(waveform, config)
    assert mel.shape == wanted.shape
    torch.testing.assert_close(mel.double(), wanted, atol=2e-3, rtol=0)


def test_published_settings():
    config = MEL_PRESETS["vocos-24khz"]
    assert (config.sample_rate, config.n_fft, config.win_length, config.hop_length) == (
        24000,
        1024,
        1024,
        256,
    )
    assert (config.mels, config.f_min, config.f_max) == (100, 0.0, 12000.0)
    assert (config.mean, config.std) == (-5.8843, 2.2615)
    assert config.frame_rate == 93.75
    assert config.frames(240000) == 938  # 10 s


def test_silence_is_the_floor():
    config = MelConfig()
    mel = LogMel(config)(torch.zeros(4000))
    torch.testing.assert_close(mel, torch.full_like(mel, (math.log(1e-5) + 5.8843) / 2.2615))


@pytest.mark.parametrize("samples", [513, 767, 768, 769, 5000])
def test_frames_and_samples_agree_with_the_transform(samples):
    config = MelConfig()
    frames = LogMel(config)(torch.ones(samples)).shape[0]
    assert frames == config.frames(samples)
    assert config.frames(config.samples(frames)) == frames
    assert config.frames(config.samples(frames) + 1) == frames + 1


def test_batch_equals_single_clips_also_under_autocast():
    config = MEL_PRESETS["compact-16khz"]
    log_mel = LogMel(config)
    batch = torch.stack([signal(6000, 16000), signal(6000, 24000)]).float()
    together = log_mel(batch)
    for row in range(2):
        torch.testing.assert_close(together[row], log_mel(batch[row]), atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(batch), together)


@pytest.mark.parametrize("name", sorted(MEL_PRESETS))
def test_inverse_sounds_like_the_mel_it_came_from(name):
    config = MEL_PRESETS[name]
    log_mel = LogMel(config)
    mel = log_mel(signal(config.sample_rate // 2, config.sample_rate).float())
    waveform = log_mel.inverse(mel)
    assert waveform.shape == ((mel.shape[0] - 1) * config.hop_length,)
    again = log_mel(waveform)
    # In normalised units, where the data's standard deviation is 1.
    assert float((again - mel).abs().mean()) < 0.15
    assert torch.equal(waveform, log_mel.inverse(mel))


def test_misuse_is_refused():
    log_mel = LogMel(MelConfig())
    with pytest.raises(ValueError, match=r"\[S\] or \[B, S\], got shape \(1, 1, 4000\)"):
        log_mel(torch.zeros(1, 1, 4000))
    with pytest.raises(ValueError, match="512 samples, the mel needs 513"):
        log_mel(torch.zeros(512))
    with pytest.raises(ValueError, match=r"\[T, 100\], got shape \(9, 80\)"):
        log_mel.inverse(torch.zeros(9, 80))
    with pytest.raises(ValueError, match="2 frames, too few"):
        log_mel.inverse(torch.zeros(2, 100))
    for field, value, message in (
        ("f_max", 13000, "mel.f_min, mel.f_max: expected .* f_max 13000"),
        ("mels", 0, "mel.mels: expected at least 1"),
        ("mels", 600, "mel.mels: expected at most the 513 frequencies"),
        ("win_length", 2048, r"mel.win_length: expected at most mel.n_fft \(1024\), got 2048"),
        ("win_length", 1, "mel.win_length: expected at least 32"),
        ("hop_length", 513, "mel.hop_length: expected at most half of mel.win_length"),
        ("std", 0.0, "mel.std: expected at least 0.01"),
        ("std", math.nan, "mel.std: expected a finite number"),
        ("mean", math.inf, "mel.mean: expected a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            MelConfig(**{field: value})
