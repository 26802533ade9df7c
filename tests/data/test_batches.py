"""Batches: fixed shapes, determinism from (seed, step), crops, prompts, tokens, the cache of mels."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.data.batches import collate, load_batch
from agrepa_fast.data.buckets import BucketBatches
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.loading import iterate
from agrepa_fast.data.mel import LogMel
from agrepa_fast.errors import UserError

from .clips import CONFIG, HOP, build, make_clip, same


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
            assert value == getattr(batch, field.name)


def test_cache_stops_at_its_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("agrepa_fast.data.sounds.CACHE_BYTES", 9000)
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


def test_steps_must_make_sense(clips):
    dataset, batches = build(clips)
    with pytest.raises(ValueError, match="step must not be negative"):
        batches.batch(-1)
    with pytest.raises(ValueError, match="start <= stop"):
        next(iterate(dataset, batches, start=3, stop=2))
