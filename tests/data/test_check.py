"""`ClipDataset.check`: headers instead of decoding, and what is remembered for the next start."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.data import dataset as module
from agrepa_fast.data import sounds
from agrepa_fast.data.batches import load_batch
from agrepa_fast.data.buckets import BucketBatches
from agrepa_fast.data.clip import Clip
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.mel import MelConfig
from agrepa_fast.data.verdicts import Verdicts, verdict_file
from agrepa_fast.errors import UserError
from agrepa_fast.training.clips import spread

CONFIG = MelConfig(sample_rate=8000, n_fft=256, win_length=256, hop_length=64, mels=8, f_max=4000.0)
LONG_AGO = 1_000_000_000


def make_clips(folder, count=12):
    """Noise in several formats and at several rates, all long unchanged."""
    rng = np.random.default_rng(0)
    clips = []
    for number in range(count):
        suffix, rate = ("wav", "flac", "ogg", "mp3")[number % 4], (8000, 16000, 44100)[number % 3]
        path = folder / f"{number:02d}.{suffix}"
        soundfile.write(path, 0.1 * rng.standard_normal(int(rate * rng.uniform(0.1, 0.6))), rate)
        os.utime(path, (LONG_AGO, LONG_AGO))
        clips.append(Clip(path, f"clip {number}", "speech", None, None, f"list.csv:{number}"))
    return clips


@pytest.fixture
def clips(tmp_path):
    return make_clips(tmp_path)


@pytest.fixture
def large(monkeypatch):
    """Every data set is a large one: what the header tells is not decoded."""
    monkeypatch.setattr(module, "SMALL_BYTES", 0)


def make_dataset(clips):
    return ClipDataset(clips, CONFIG, max_frames=40)


def refuse(*arguments, **options):
    raise AssertionError("the file is read")


def planned(dataset):
    plan = BucketBatches(dataset.lengths, buckets=(20, 40), frames_per_batch=160, seed=5)
    return [load_batch(dataset, plan, step, 0) for step in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("most", [11, 12])
def test_sets_of_many_clips_are_not_decoded_before_they_are_used(clips, monkeypatch, most):
    """However short the clips are: a start would open every file once more."""
    assert len(clips) == 12
    monkeypatch.setattr(module, "SMALL_CLIPS", most)
    dataset = make_dataset(clips)
    assert dataset.check(0.0) == []
    assert len(dataset._sounds._cache) == (12 if most == 12 else 0)


def test_headers_give_the_lengths_and_batches_of_decoding(clips, monkeypatch):
    decoded = make_dataset(clips)
    assert decoded.check(0.0) == []
    assert set(decoded._sounds._cache) == {clip.path for clip in clips}
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    by_header = make_dataset(clips)
    assert by_header.check(0.0) == []
    assert not by_header._sounds._cache
    samples = [decoded._sounds._cache[clip.path].shape[0] for clip in clips]
    assert [by_header._sounds.lengths[clip.path] for clip in clips] == samples
    assert by_header.lengths == [min(40, 1 + count // CONFIG.hop_length) for count in samples]
    assert by_header.token_lengths == decoded.token_lengths
    for one, two in zip(planned(by_header), planned(decoded)):
        assert torch.equal(one.mel, two.mel)
        assert torch.equal(one.audio, two.audio)
        assert torch.equal(one.tokens, two.tokens)
        assert one.clips == two.clips


def test_only_files_without_an_exact_header_are_decoded(clips, large, monkeypatch):
    read = []
    original = sounds.read_audio
    monkeypatch.setattr(sounds, "read_audio", lambda path, *a, **o: read.append(path.suffix) or original(path, *a, **o))
    make_dataset(clips).check(0.0)
    assert read == [".mp3"] * 3


def test_a_silent_file_of_a_large_set_is_stood_in_for_where_it_is_used(clips, large, caplog):
    soundfile.write(clips[1].path, np.zeros(2000), 8000)
    dataset = make_dataset(clips)
    assert dataset.check(0.0) == []
    batches = planned(dataset)
    assert {item.reason for batch in batches for item in batch.skipped} == {"silent (no sample reaches 0.0001)"}
    assert all(clips[1] not in batch.clips for batch in batches)
    for _ in range(2):
        assert spread(dataset, 4) == [0, 2, 3, 4]
    assert caplog.text.count("list.csv:1: ") == 1
    for clip in clips:
        soundfile.write(clip.path, np.zeros(2000), 8000, format="WAV")
    silent = make_dataset(clips)
    silent.check(0.0)
    with pytest.raises(UserError, match="none of 12 clips can be decoded"):
        spread(silent, 4)


def test_the_second_start_reads_nothing(clips, large, tmp_path, monkeypatch):
    np.save(tmp_path / "t.npy", [3, 4, 5])
    os.utime(tmp_path / "t.npy", (LONG_AGO, LONG_AGO))
    clips.append(Clip(clips[0].path, "", "speech", None, tmp_path / "t.npy", "list.csv:99"))
    memory = tmp_path / "cache" / "memory.json"
    first = make_dataset(clips)
    first.check(0.0, memory=memory)
    monkeypatch.setattr(sounds, "read_header", refuse)
    monkeypatch.setattr(sounds, "read_audio", refuse)
    monkeypatch.setattr(module, "read_tokens", refuse)
    second = make_dataset(clips)
    second.check(0.0, memory=memory)
    assert second.lengths == first.lengths
    assert second.token_lengths == first.token_lengths
    assert second.token_lengths[-1] == 3
    # Another vocabulary may not hold those tokens.
    third = ClipDataset(clips[-1:], CONFIG, max_frames=40, vocabularies={"text": (5,)})
    with pytest.raises(AssertionError, match="the file is read"):
        third.check(0.0, memory=memory)


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_a_file_that_changed_is_read_again(clips, large, tmp_path, change):
    memory = tmp_path / "memory.json"
    make_dataset(clips).check(0.0, memory=memory)
    path = clips[1].path
    if change == "size":
        soundfile.write(path, np.full(1000, 0.5), 8000)
        os.utime(path, (LONG_AGO, LONG_AGO))
    elif change == "time":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.unlink()
    dataset = make_dataset(clips)
    skipped = dataset.check(0.5, memory=memory)
    if change == "size":
        assert dataset.lengths[1] == 1 + 1000 // 64
    else:
        assert [item.source for item in skipped] == ["list.csv:1"]


def test_bad_and_fresh_files_are_not_remembered(clips, large, tmp_path):
    memory = tmp_path / "memory.json"
    clips[0].path.write_bytes(b"RIFF nothing")
    os.utime(clips[0].path, (LONG_AGO, LONG_AGO))
    os.utime(clips[1].path)
    make_dataset(clips).check(0.5, memory=memory)
    verdicts = Verdicts(memory)
    found = [verdicts.find(clip.path, "sound", 2) is not None for clip in clips]
    assert found == [False, False] + [True] * 10


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one number": lambda data: data.replace(b"8000]", b"8001]", 1),
    "not json": lambda data: b"\xff" * 100,
    "other version": lambda data: data.replace(b'"version": ', b'"version": 9', 1),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_memory_is_ignored_and_written_anew(clips, large, tmp_path, kind):
    memory = tmp_path / "memory.json"
    lengths = make_dataset(clips).lengths
    make_dataset(clips).check(0.0, memory=memory)
    good = memory.read_bytes()
    damaged = DAMAGES[kind](good)
    assert damaged != good
    memory.write_bytes(damaged)
    dataset = make_dataset(clips)
    dataset.check(0.0, memory=memory)
    assert dataset.lengths == lengths
    assert Verdicts(memory).find(clips[0].path, "sound", 2) is not None


def test_a_memory_that_cannot_be_written_costs_nothing(clips, large, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for memory in (tmp_path / "file" / "memory.json", tmp_path / "folder", tmp_path / ("x" * 300)):
        assert make_dataset(clips).check(0.0, memory=memory) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_several_ranks_write_one_memory(clips, tmp_path):
    """Whoever reads meanwhile finds a whole file."""
    memory = tmp_path / "memory.json"

    def write(part):
        for _ in range(20):
            verdicts = Verdicts(memory)
            for clip in part:
                verdicts.remember(clip.path, "sound", 1, 2)
            verdicts.save()

    threads = [threading.Thread(target=write, args=(clips[start::3],)) for start in range(3)]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads):
        if memory.exists():
            assert Verdicts(memory)._known
            seen += 1
    assert seen
    write(clips)
    assert all(Verdicts(memory).find(clip.path, "sound", 2) == (1, 2) for clip in clips)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_where_verdicts_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path))
    one = verdict_file([tmp_path / "a/x.wav", tmp_path / "a/b/y.wav"])
    assert one.parent == tmp_path
    assert one == verdict_file([tmp_path / "a/z.wav"])
    assert one != verdict_file([tmp_path / "b/z.wav"])
    monkeypatch.delenv("AGREPA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert verdict_file([tmp_path / "a.wav"]).parent == tmp_path / "xdg" / "agrepa-fast"


def test_a_file_that_grew_since_the_check_is_named_and_stood_in_for(clips, large):
    dataset = make_dataset(clips)
    dataset.check(0.0)
    soundfile.write(clips[0].path, np.full(9000, 0.5), 8000)
    with pytest.raises(UserError, match=r"00\.wav: has 9000 samples, and had \d+ when the run began"):
        dataset.item(0, torch.Generator())
    assert clips[0].path in {item.path for batch in planned(dataset) for item in batch.skipped}


def test_a_bar_shows_the_clips(clips, capsys, monkeypatch):
    make_dataset(clips).check(0.0)
    assert capsys.readouterr().err == ""
    original = sounds.read_header
    monkeypatch.setattr(sounds, "read_header", lambda *file: time.sleep(0.25) or original(*file))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    make_dataset(clips).check(0.0, progress=True)
    error = capsys.readouterr().err
    assert "checking clips" in error
    assert "/12" in error
