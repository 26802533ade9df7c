"""Sound files: formats, rates, channels, and every way in which a file can be unusable."""

from __future__ import annotations

import builtins
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.data.audio import read_audio, read_header, resampled_length, write_audio
from agrepa_fast.data.mel import LogMel, MelConfig
from agrepa_fast.errors import UserError


def tone(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


# Largest error against the tone itself: exact but for rounding, or what a lossy codec leaves.
FORMATS = {"wav": 1e-4, "flac": 1e-4, "ogg": 0.05, "mp3": 0.05}


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(0.5, 16000), 16000)
    waveform = read_audio(path, 16000)
    assert waveform.dtype == torch.float32
    assert waveform.shape == (8000,)
    error = np.abs(waveform.numpy() - tone(0.5, 16000))[1000:-1000].max()
    assert error < FORMATS[suffix]


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000, 96000])
def test_other_rates_are_resampled(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(0.5, rate), rate, subtype="FLOAT")
    waveform = read_audio(path, 16000).numpy()
    assert abs(len(waveform) - 8000) <= 1
    middle = slice(500, 7500)
    assert np.abs(waveform[middle] - tone(0.5, 16000)[middle]).max() < 5e-3


def test_channels_are_averaged(tmp_path):
    left, right = tone(0.1, 16000), tone(0.1, 16000, 1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 16000), (left + right) / 2, atol=1e-6)


def test_write_clips_and_reads_back(tmp_path):
    waveform = torch.tensor([0.0, 0.25, -0.5, 1.5, -3.0])
    write_audio(tmp_path / "a.wav", waveform, 24000)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.samplerate, info.format, info.subtype, info.channels) == (24000, "WAV", "PCM_16", 1)
    read = read_audio(tmp_path / "a.wav", 24000)
    torch.testing.assert_close(read, torch.tensor([0.0, 0.25, -0.5, 1.0, -1.0]), atol=2**-15, rtol=0)


def test_write_refuses_what_is_not_a_waveform(tmp_path):
    with pytest.raises(ValueError, match=r"\[S\], got shape \(2, 8\)"):
        write_audio(tmp_path / "a.wav", torch.zeros(2, 8), 16000)
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_audio(tmp_path / "a.wav", torch.tensor([0.0, math.nan]), 16000)


def _wav(samples, rate=16000):
    return lambda path: soundfile.write(path, np.asarray(samples, dtype=np.float32), rate, subtype="FLOAT")


BAD = {
    "missing": (lambda path: None, "no such audio file"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "empty": (lambda path: path.write_bytes(b""), r"empty \(0 bytes\)"),
    "corrupt": (lambda path: path.write_bytes(b"RIFF" + bytes(range(256)) * 8), "cannot be decoded"),
    "text": (lambda path: path.write_text("hello " * 100), "cannot be decoded"),
    "no samples": (_wav([]), "holds no samples"),
    "short": (_wav(tone(0.01, 16000)), "too short .160 samples at 16000 Hz, 400 needed"),
    "short once resampled": (_wav(tone(0.02, 48000), 48000), "too short .320 samples at 16000 Hz"),
    "nan": (_wav([*tone(0.1, 16000), math.nan]), "NaN or infinite"),
    "inf": (_wav([*tone(0.1, 16000), math.inf]), "NaN or infinite"),
    "silent": (_wav(np.full(1600, 5e-5)), "silent"),
    "silent channels": (_wav(np.full((1600, 2), 5e-5)), "silent"),
    "nan in one channel": (_wav([[0.5, 0.5]] * 999 + [[0.5, math.nan]]), "NaN or infinite"),
    "scale of 16-bit": (_wav(9830 * tone(0.1, 16000)), "beyond full scale .a sample of 49"),
    "scale of 8-bit": (_wav(127 * tone(0.1, 16000)), "beyond full scale"),
    "scale of 16-bit in one channel": (_wav(np.stack([tone(0.1, 16000), 20000 * tone(0.1, 16000)], 1)), "beyond full"),
    "absurd rate": (_wav(tone(0.1, 16000), 1), "sample rate 1 Hz"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_name_the_file_and_the_reason(tmp_path, kind):
    make, message = BAD[kind]
    path = tmp_path / "clip.wav"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        read_audio(path, 16000, minimum_samples=400)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_loud_floats_below_the_limit_are_read_as_they_are(tmp_path):
    soundfile.write(tmp_path / "a.wav", 7 * tone(0.1, 16000), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 16000), 7 * tone(0.1, 16000), atol=1e-5)


@pytest.mark.parametrize("gains", [(1, -1), (1, -0.95), (-0.9, 1), (1, -0.5, -0.5)])
def test_channels_that_cancel_out_give_the_loudest(tmp_path, gains):
    channels = np.stack([gain * tone(0.1, 16000) for gain in gains], axis=1)
    soundfile.write(tmp_path / "a.wav", channels, 16000, subtype="FLOAT")
    loudest = channels[:, int(np.argmax(np.abs(gains)))]
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 16000), loudest, atol=1e-6)


# (suffix, format, subtype, rate) of the containers that hold a length; "cannot be decoded" where libsndfile sees it.
CONTAINERS = {
    "wav": ("WAV", "PCM_16", 16000),
    "float wav": ("WAV", "FLOAT", 16000),
    "extensible wav": ("WAVEX", "PCM_24", 16000),
    "adpcm wav": ("WAV", "IMA_ADPCM", 16000),
    "rf64": ("RF64", "PCM_16", 16000),
    "w64": ("W64", "PCM_16", 16000),
    "aiff": ("AIFF", "PCM_16", 16000),
    "au": ("AU", "PCM_16", 16000),
    "caf": ("CAF", "PCM_16", 16000),
    "nist": ("NIST", "PCM_16", 16000),
    "flac": ("FLAC", "PCM_16", 16000),
    "ogg": ("OGG", "VORBIS", 16000),
    "opus": ("OGG", "OPUS", 48000),
    "mp3": ("MP3", "MPEG_LAYER_III", 16000),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_cut_off_files_are_refused(tmp_path, kind):
    container, subtype, rate = CONTAINERS[kind]
    sound = tone(2.0, rate) * (1 + 0.3 * np.random.default_rng(0).standard_normal(2 * rate))
    soundfile.write(tmp_path / "whole", sound / 2, rate, format=container, subtype=subtype)
    header = read_header(tmp_path / "whole")
    assert abs(header.frames - 2 * rate) < 1200  # blocks of a codec
    if header.exact:
        assert read_audio(tmp_path / "whole", rate).shape[0] == header.frames
    data = (tmp_path / "whole").read_bytes()
    for share in (0.3, 0.5, 0.9):
        (tmp_path / "cut").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=r"truncated|cannot be decoded") as error:
            read_audio(tmp_path / "cut", rate)
        assert "\n" not in str(error.value)


def test_sizes_that_a_pipe_or_a_careless_writer_leaves_are_accepted(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5, 16000), 16000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    whole = read_audio(tmp_path / "a.wav", 16000)
    for claimed in (0xFFFFFFFF, 0x7FFFF024, 16002):
        data[40:44] = claimed.to_bytes(4, "little")
        (tmp_path / "a.wav").write_bytes(data)
        assert torch.equal(read_audio(tmp_path / "a.wav", 16000), whole)
    data[40:44] = (32000).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(UserError, match=r"truncated \(0\.50 s of the 1\.00 s in its header\)"):
        read_audio(tmp_path / "a.wav", 16000)


def test_names_that_are_not_utf8(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.1, 16000), 16000)
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xe9.wav"))
    (tmp_path / "a.wav").rename(path)
    assert read_audio(path, 16000).shape == (1600,)


def test_files_that_cannot_be_searched_are_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5, 16000), 16000, subtype="GSM610")
    assert abs(read_audio(tmp_path / "a.wav", 16000).shape[0] - 8000) <= 320


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000])
def test_the_length_after_resampling_is_known_from_the_header(tmp_path, rate):
    for frames in (997, 1000, 4321):
        soundfile.write(tmp_path / "a.wav", np.full(frames, 0.5), rate)
        for wanted in (16000, 24000):
            header = read_header(tmp_path / "a.wav")
            assert header == (frames, rate, True)
            assert resampled_length(*header[:2], wanted) == read_audio(tmp_path / "a.wav", wanted).shape[0]


def test_quiet_but_not_silent_is_accepted(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(1600, 2e-4), 16000, subtype="FLOAT")
    assert float(read_audio(tmp_path / "a.wav", 16000).max()) == pytest.approx(2e-4)


def test_cut_off_flac_is_refused(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(0.5, 16000), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be decoded"):
        read_audio(path, 16000)


def test_header_that_claims_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(0.5, 16000), 16000)
    data = bytearray(path.read_bytes())
    # STREAMINFO: the 36-bit sample count is the low nibble of byte 21 and bytes 22 to 25. 0: a pipe's, not known.
    for claimed, hours in ((2**36 - 1, "1.19e+03"), (0, "1.6e+11")):
        data[21] = data[21] & 0xF0 | claimed >> 32
        data[22:26] = (claimed & 0xFFFFFFFF).to_bytes(4, "big")
        path.write_bytes(data)
        for read in (read_header, lambda path: read_audio(path, 16000)):
            with pytest.raises(UserError, match=re.escape(f"claims {hours} hours of sound")):
                read(path)
    claimed = 2**31
    data[22:26] = claimed.to_bytes(4, "big")
    path.write_bytes(data)
    assert soundfile.info(path).frames == claimed
    real = np.empty

    def empty(shape, *args, **kwargs):
        # As on a machine with less than 256 GiB.
        if np.prod(shape) >= claimed:
            raise MemoryError
        return real(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(UserError, match="header claims more samples than memory holds"):
        read_audio(path, 16000)


def test_missing_extra_is_one_clear_line(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] in ("soundfile", "torchaudio"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    soundfile.write(tmp_path / "a.wav", tone(0.1, 16000), 16000)
    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in ("soundfile", "torchaudio"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"soundfile .*pip install 'agrepa-fast\[audio\]'"):
        read_audio(tmp_path / "a.wav", 16000)
    with pytest.raises(UserError, match=r"torchaudio .*pip install 'agrepa-fast\[audio\]'"):
        LogMel(MelConfig())
