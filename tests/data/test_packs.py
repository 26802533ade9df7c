"""WebDataset archives and data sets of `datasets`: the same samples as the files they were made of, and bad ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.data import archives, hub
from agrepa_fast.data.audio import read_audio, read_header
from agrepa_fast.data.buckets import BucketBatches
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.loading import iterate
from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.data.mel import MelConfig
from agrepa_fast.data.packs import Member, PackFile
from agrepa_fast.errors import UserError
from agrepa_fast.training.identity import colliding, file_digest, identify

from .packed import built, datasets, tar

MEL = MelConfig(sample_rate=16000, n_fft=512, win_length=512, hop_length=256, mels=16, f_max=8000)


@pytest.fixture
def shards(waves, tmp_path):
    """wds:.../shard-{00..01}.tar with the files."""
    for shard in range(2):
        members = []
        for path, text in waves[3 * shard : 3 * shard + 3]:
            members += [(f"speech/{path.name}", path.read_bytes()), (f"speech/{path.stem}.txt", text.encode())]
        tar(tmp_path / f"shard-{shard:02d}.tar", members)
    return f"wds:{tmp_path}/shard-{{00..01}}.tar"


def table(waves, as_arrays=False):
    if as_arrays:
        sounds = [{"array": soundfile.read(path)[0].tolist(), "sampling_rate": 16000} for path, _ in waves]
        return datasets.Dataset.from_dict({"audio": sounds, "text": [text for _, text in waves]})
    sounds = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in waves]
    features = datasets.Features({"audio": datasets.Audio(decode=False), "text": datasets.Value("string")})
    return built({"audio": sounds, "text": [text for _, text in waves]}, features)


@pytest.fixture
def saved(waves, tmp_path):
    table(waves).save_to_disk(str(tmp_path / "saved"))
    return f"hf:{tmp_path / 'saved'}:train"


def dataset(clips):
    return ClipDataset(clips, MEL, max_frames=100)


def check_same(clips, waves):
    assert [clip.text for clip in clips] == [text for _, text in waves]
    packed = dataset(clips)
    assert packed.check(0.0) == []
    for number, (path, _) in enumerate(waves):
        clip = clips[number]
        assert torch.equal(read_audio(clip.path, 16000, pack=clip.pack), read_audio(path, 16000))
        assert packed.samples_of(clip) == read_header(path).frames
    return packed


def test_an_archive_s_clips_are_its_files(shards, waves):
    clips = read_manifest(shards)
    check_same(clips, waves)
    # The digest of a sound is that of the file it was packed from.
    assert [known.identity.sound for known in identify(clips)] == [file_digest(path) for path, _ in waves]
    assert not colliding(
        clips,
        {clip.path: 7 for clip in clips[:1]}
        | {clip.path: 8 for clip in clips[1:2]}
        | {clip.path: number for number, clip in enumerate(clips[2:], 9)},
    )
    same = {clip.path: 7 for clip in clips}
    assert set(colliding(clips, same)) == {clip.path for clip in clips[1:]}


@pytest.mark.parametrize("kind", ["npy", "tokens.npy", "pt"])
def test_token_files_of_an_archive_are_read(waves, tmp_path, kind):
    members = []
    for number, (path, text) in enumerate(waves):
        written = io.BytesIO()
        tokens = np.arange(number, number + 5)
        torch.save(torch.from_numpy(tokens), written) if kind == "pt" else np.save(written, tokens)
        members += [(path.name, path.read_bytes()), (f"{path.stem}.txt", text.encode())]
        members += [(f"{path.stem}.{kind}", written.getvalue())]
    spec = f"wds:{tar(tmp_path / 'shard.tar', members)}"
    for _ in range(2):  # the second time from the kept list
        clips = read_manifest(spec)
        packed = ClipDataset(clips, MEL, max_frames=100, vocabularies={"text": (20,)})
        assert packed.check(0.0) == []
        assert packed.item(3, None)["tokens"][:, 0].tolist() == [3, 4, 5, 6, 7]
        few = ClipDataset(clips, MEL, max_frames=100, vocabularies={"text": (9,)})
        [refused] = few.check(0.5)
        assert refused.reason == f"{tmp_path}/shard.tar/clip5.{kind}: token 9 in stream 0 is outside 0 to 8"
    # Other tokens are another clip.
    other = [
        (name, data.replace(b"\x07", b"\x08")) if name.startswith("clip3.") else (name, data) for name, data in members
    ]
    before, after = identify(clips), identify(read_manifest(f"wds:{tar(tmp_path / 'other.tar', other)}"))
    changed = [one.identity.whole != two.identity.whole for one, two in zip(before, after)]
    assert changed[:3] == [False] * 3
    assert changed[3]
    with pytest.raises(UserError, match=r"shard.tar: clip0.tokens.pt: a second token file of one key, after clip0"):
        read_manifest(f"wds:{tar(tmp_path / 'shard.tar', [*members, ('clip0.tokens.pt', b'')])}")


def test_a_saved_data_set_s_rows_are_its_files(saved, waves):
    clips = read_manifest(saved)
    check_same(clips, waves)
    assert [known.identity.sound for known in identify(clips)] == [file_digest(path) for path, _ in waves]


def test_arrays_are_sounds_too(waves, tmp_path):
    table(waves, as_arrays=True).save_to_disk(str(tmp_path / "arrays"))
    clips = read_manifest(f"hf:{tmp_path / 'arrays'}:train")
    packed = dataset(clips)
    assert packed.check(0.0) == []
    for clip, (path, _) in zip(clips, waves):
        torch.testing.assert_close(
            read_audio(clip.path, 16000, pack=clip.pack), read_audio(path, 16000), rtol=0, atol=1e-4
        )


def test_arrays_of_many_rows_and_channels_are_written_where_they_are_read(tmp_path):
    """More rows than are cached: soundfile reads them while they are made."""
    rng = np.random.default_rng(0)
    sounds = [(0.1 * rng.standard_normal((2, 4000))).astype(np.float32) for _ in range(12)]
    rows = [{"array": sound.tolist(), "sampling_rate": 22050} for sound in sounds]
    datasets.Dataset.from_dict({"audio": rows, "text": list("abcdefghijkl")}).save_to_disk(str(tmp_path / "many"))
    clips = read_manifest(f"hf:{tmp_path / 'many'}:train")
    for clip, sound in zip(clips, sounds, strict=True):
        np.testing.assert_allclose(read_audio(clip.path, 22050, pack=clip.pack), sound.mean(0), atol=1e-6)


def test_paths_in_a_table_and_splits_of_a_folder(waves, tmp_path, monkeypatch):
    features = datasets.Features(
        {"speech": datasets.Audio(decode=False), "caption": datasets.Value("string"), "file": datasets.Value("string")}
    )
    rows = {
        "speech": [{"bytes": None, "path": str(path)} for path, _ in waves],
        "caption": [text for _, text in waves],
        "file": ["x"] * 6,
    }
    both = datasets.DatasetDict({"train": built(rows, features).select([5, 0, 1])})
    both.save_to_disk(str(tmp_path / "dict"))
    clips = read_manifest(f"hf:{tmp_path / 'dict'}:train")
    check_same(clips, [waves[number] for number in (5, 0, 1)])  # saved with the sounds' bytes
    assert {clip.domain for clip in clips} == {"audio"}
    monkeypatch.setattr(hub, "_load", lambda *_: both["train"])
    kept = read_manifest("hf:somebody/paths:train")  # in the cache of a script, with paths
    assert [clip.path for clip in kept] == [waves[number][0] for number in (5, 0, 1)]
    assert all(clip.pack is None for clip in kept)
    monkeypatch.undo()
    with pytest.raises(UserError, match="the folder has the splits train"):
        read_manifest(f"hf:{tmp_path / 'dict'}:test")


def test_a_folder_of_parquet(waves, tmp_path):
    (tmp_path / "parquet").mkdir()
    table(waves).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    with pytest.raises(UserError, match=r"a Parquet file is no manifest: give its folder as hf:FOLDER:train"):
        read_manifest(tmp_path / "parquet" / "train.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        clips = read_manifest(f"hf:{tmp_path / 'parquet'}:train")
    check_same(clips, waves)


@pytest.mark.parametrize("kind", ["shards", "saved"])
def test_batches_are_the_same_for_any_number_of_workers(kind, request):
    clips = read_manifest(request.getfixturevalue(kind))
    packed = dataset(clips)
    batches = BucketBatches(packed.lengths, buckets=(50, 100), frames_per_batch=150, seed=0)
    here, there = (list(iterate(packed, batches, start=1, stop=4, workers=workers)) for workers in (0, 1))
    assert len(here) == 3
    for one, two in zip(here, there):
        assert torch.equal(one.mel, two.mel)
    assert pickle.loads(pickle.dumps(clips)) == clips


def test_the_second_start_reads_no_archive_again(shards, monkeypatch, tmp_path):
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))
    first = read_manifest(shards)
    monkeypatch.setattr(archives, "_scan", lambda archive: pytest.fail("scanned again"))
    assert read_manifest(shards) == first
    monkeypatch.undo()
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))
    changed = tmp_path / "shard-01.tar"
    tar(changed, [("x.wav", first[0].pack.read(0, first[0].pack.size)), ("x.txt", b"new")])
    assert [clip.text for clip in read_manifest(shards)] == ["text 0", "text 1", "text 2", "new"]


def test_json_beside_a_sound_says_what_it_is(waves, tmp_path):
    sound = waves[0][0].read_bytes()
    # The sound is the clip, wherever it was cut out.
    facts = {"caption": "rain", "speaker": 7, "start": 3.5, "duration": 2, "tokens": None, "path": "x"}
    tar(tmp_path / "a.tar", [("./1.x.y", b"?"), ("1.wav", sound), ("1.json", json.dumps(facts).encode())])
    [clip] = read_manifest(f"wds:{tmp_path}/*.tar")
    assert (clip.text, clip.domain, clip.speaker) == ("rain", "audio", "7")


SOUND = b"RIFF"


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.wav", SOUND)], "a has no text: add a.txt, or a.json"),
        ([("a.wav", SOUND), ("a.flac", SOUND), ("a.txt", b"x")], "a.flac: a second sound of one key, after a.wav"),
        ([("a.wav", SOUND), ("a.json", b"{")], "a.json: not JSON"),
        ([("a.wav", SOUND), ("a.json", b"[]")], "a.json: expected an object, got list"),
        ([("a.wav", SOUND), ("a.json", b'{"text": true}')], "a.json: text is bool, expected text"),
        ([("a.wav", SOUND), ("a.json", b'{"text": [1]}')], "a.json: text is list, expected text"),
        ([("a.wav", SOUND), ("a.json", b'{"text": "x", "domain": "A B"}')], "domain 'A B' must be one lower-case word"),
        ([("a.txt", b"x")], "the archives hold no sound files"),
        ([("a.wav", SOUND), ("a.json", b'{"text": "x", "tokens": [1]}')], "tokens are not read from here: write a.tok"),
        ([("a.wav", SOUND), ("a.json", b'{"text": "x", "latents": [[1]]}')], "latents are not read from here: write a"),
        ([("a.wav", SOUND), ("a.json", b'{"txt": "x"}')], r"a.json: unknown column 'txt' \(did you mean 'text'\?\)"),
        ([("a.wav", SOUND), ("a.txt", b""), ("a.json", b'{"speeker": "x"}')], "did you mean 'speaker'"),
        (
            [("a.wav", SOUND), ("a.latents.npy", b""), ("a.wav.latents.npy", b"")],
            "a.wav.latents.npy: a second file of latents of one key, after a.latents.npy",
        ),
    ],
)
def test_bad_archives_are_one_line(tmp_path, members, message):
    with pytest.raises(UserError, match=message):
        read_manifest(f"wds:{tar(tmp_path / 'a.tar', members)}")


def test_archives_that_are_none(tmp_path, waves):
    whole = tar(tmp_path / "a.tar", [("a.wav", waves[0][0].read_bytes()), ("a.txt", b"x")])
    with pytest.raises(UserError, match=r"a.tar: a tar archive is no manifest: give it as wds:FILE"):
        read_manifest(whole)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(UserError, match=r"b.tar.gz: compressed archives are not read: unpack it to .tar"):
        read_manifest(f"wds:{tmp_path / 'b.tar.gz'}")
    (tmp_path / "c.tar").write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"c.tar: not a whole tar archive"):
        read_manifest(f"wds:{tmp_path / 'c.tar'}")
    with pytest.raises(UserError, match=r"shard-02.tar: no such archive"):
        read_manifest(f"wds:{tmp_path}/shard-{{02..03}}.tar")
    with pytest.raises(UserError, match=r"no file fits"):
        read_manifest(f"wds:{tmp_path}/none-*.tar")
    with pytest.raises(UserError, match=r"does not count up"):
        read_manifest(f"wds:{tmp_path}/a-{{3..1}}.tar")


def test_an_archive_that_shrinks_later_skips_its_clips(shards, tmp_path):
    clips = read_manifest(shards)
    path = tmp_path / "shard-01.tar"
    os.truncate(path, clips[4].pack.offset + 100)
    skipped = dataset(clips).check(0.5)
    assert [item.path.name for item in skipped] == ["clip4.flac", "clip5.wav"]
    assert all("\n" not in item.reason for item in skipped)


def test_a_pack_reads_like_a_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with io.BufferedReader(PackFile(Member(tmp_path / "x", 10, 50))) as file:
        assert file.read(3) == bytes(range(10, 13))
        assert file.seek(-2, os.SEEK_END) == 48
        assert file.read() == bytes((58, 59))
        assert file.read() == b""
        assert file.seek(0) == 0
        assert file.read() == bytes(range(10, 60))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": ["x"]}, "expected one column of sounds .*, found none among text"),
        ({"a": [{"array": [0.1], "sampling_rate": 1}]}, "the column 'text' is missing"),
        ({"a": [{"array": [0.1], "sampling_rate": 1}], "text": [[1]]}, "the column 'text' holds list, expected text"),
        ({"a": [{"array": [0.1], "sampling_rate": 1}], "text": [True]}, "the column 'text' holds bool, expected text"),
        ({"a": [{"array": ["x"], "sampling_rate": 1}], "text": ["x"]}, "the column 'a' holds struct.*of numbers and"),
        ({"a": [{"array": [0.1], "sampling_rate": "x"}], "text": ["x"]}, "the column 'a' holds struct.*of numbers and"),
        ({"a": [{"array": [0.1], "sampling_rate": float("nan")}], "text": ["x"]}, "x:train:0: the sound is no array"),
        ({"a": [{"array": [[0.1], [0.1, 0.2]], "sampling_rate": 1}], "text": ["x"]}, "x:train:0: the sound is no arr"),
        ({"a": [{"array": [[[0.1]]], "sampling_rate": 1}], "text": ["x"]}, r"expected a sound .*got \[1, 1, 1\]"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, columns, message):
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(UserError, match=message):
        read_manifest(f"hf:{tmp_path / 'x'}:train")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("hf:x", "expected hf:NAME_OR_FOLDER:split"),
        ("hf::train", "expected hf:NAME_OR_FOLDER:split"),
        ("hf:x:train", "no such folder; for a data set of the hub give owner/name"),
    ],
)
def test_bad_names_of_data_sets(spec, message):
    with pytest.raises(UserError, match=message):
        read_manifest(spec)


def test_a_row_without_a_sound_is_skipped(waves, monkeypatch):
    features = datasets.Features({"audio": datasets.Audio(decode=False), "text": datasets.Value("string")})
    sounds = [
        {"bytes": waves[0][0].read_bytes(), "path": None},
        {"bytes": None, "path": None},
        {"bytes": b"junk", "path": None},
    ]
    data = built({"audio": sounds, "text": ["a", "b", "c"]}, features)
    monkeypatch.setattr(hub, "_load", lambda *_: data)
    clips = read_manifest("hf:somebody/holes:train")
    assert len({known.identity.sound for known in identify(clips)}) == 3
    skipped = dataset(clips).check(0.9)
    assert [item.reason.partition(" (")[0] for item in skipped] == ["the file is empty", "cannot be decoded"]
