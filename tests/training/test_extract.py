"""`agrepa extract`: a run's features in a store, whatever happens on the way; and the training that reads them."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast import cli
from agrepa_fast.data.audio import read_audio
from agrepa_fast.data.features import FeatureBatch
from agrepa_fast.errors import UserError
from agrepa_fast.teachers import shards
from agrepa_fast.teachers.registry import build_teacher
from agrepa_fast.teachers.store import Store
from agrepa_fast.training import extract as extract_module
from agrepa_fast.training.clips import load_data
from agrepa_fast.training.extract import Extraction
from agrepa_fast.training.identity import file_digest
from agrepa_fast.training.targets import teacher_targets
from agrepa_fast.training.teachers import build_teachers
from agrepa_fast.training.trainer import Trainer

SMALL = 4_000  # bytes of a shard: one clip, or two


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", SMALL)


def folder_of(root):
    [folder] = (root / "runs" / "features").iterdir()
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_store_has_what_the_live_teacher_says(tiny_config, tmp_path):
    config = tiny_config()
    extraction = Extraction(config, ["spectral"])
    told = []
    filled = extraction.run(told.append)["spectral"]
    assert filled.clips == 12
    assert sum(told) == pytest.approx(filled.seconds)
    store = Store(filled.folder)
    teacher = build_teacher("spectral")
    data = load_data(config, tmp_path)
    for dataset in (data.train, data.valid):
        for clip in dataset.clips:
            audio = read_audio(clip.path, 16000)
            alone, mask = teacher(audio[None], torch.tensor([len(audio)]), 16000)
            values, scale = store.read(file_digest(clip.path))
            assert scale is None
            torch.testing.assert_close(values, alone[0][mask[0]], rtol=1e-4, atol=1e-4)


def test_pooled_and_int8_stores(tiny_config):
    frames = Store(Extraction(tiny_config(), ["spectral"]).run()["spectral"].folder)
    pooled = Store(Extraction(tiny_config(), ["spectral"], pool=True).run()["spectral"].folder)
    config = tiny_config("data.features=" + str(frames.folder.parent.parent / "other"))
    small = Store(Extraction(config, ["spectral"], int8=True).run()["spectral"].folder)
    assert (frames.info.dtype, small.info.dtype, pooled.info.key.rate) == ("float32", "int8", 0.0)
    for sound in frames._digests.tolist():
        exact = frames.read(sound)[0]
        torch.testing.assert_close(pooled.read(sound)[0], exact.mean(0, keepdim=True))
        values, scale = small.read(sound)
        assert ((values * scale[:, None] - exact).abs() <= exact.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("parts", [1, 3])
def test_interrupted_anywhere_the_store_ends_with_the_same_bytes(
    tiny_config, tmp_path, monkeypatch, small_shards, parts
):
    class Killed(BaseException):
        pass

    config = tiny_config()
    Extraction(config, ["spectral"], int8=True).run()
    folder = folder_of(tmp_path)
    whole = content(folder)
    assert len(whole) > 8
    shutil.rmtree(folder)
    events = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal events
            events += 1
            if events % 4 == 0:
                raise Killed
            return function(*arguments, **options)

        return call

    # A kill before a batch, before a file gets its name, and after it has it.
    monkeypatch.setattr(extract_module, "encode_clips", counted(extract_module.encode_clips))
    monkeypatch.setattr(shards, "_sync_folder", counted(shards._sync_folder))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    kills = 0
    for part in range(parts):
        while True:
            try:
                Extraction(config, ["spectral"], int8=True, part=(part, parts)).run()
                break
            except Killed:
                kills += 1
                # What a process that is gone was building.
                (folder / f"x.safetensors.{shards._host()}.{2**22 + 1}.part").write_bytes(b"half")
    assert kills > 5
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_BYTES", SMALL)
    Extraction(config, ["spectral"], int8=True)  # sweeps
    assert content(folder) == whole


def test_what_other_machines_are_building_is_left_alone(tiny_config, tmp_path):
    Extraction(tiny_config(), ["spectral"]).run()
    other = folder_of(tmp_path) / "x.safetensors.elsewhere.17.part"
    own = folder_of(tmp_path) / f"x.safetensors.{shards._host()}.{os.getpid()}.part"
    for path in (other, own):
        path.write_bytes(b"half")
    assert len(Store(folder_of(tmp_path))) == 12
    Extraction(tiny_config(), ["spectral"]).run()
    assert other.exists()
    assert own.exists()


def test_more_clips_are_added_to_what_is_there(tiny_config, tmp_path, manifest):
    lines = manifest.read_text().splitlines()
    shutil.copytree(manifest.parent, tmp_path / "part")
    (tmp_path / "part" / "metadata.csv").write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    Extraction(tiny_config(f"data.train=[{tmp_path / 'part'}]"), ["spectral"]).run()
    before = content(folder_of(tmp_path))
    extraction = Extraction(tiny_config(), ["spectral"])
    assert sum(map(len, extraction.targets["spectral"].missing.values())) == 2
    assert extraction.run()["spectral"].clips == 12
    assert content(folder_of(tmp_path)).items() >= before.items()


def test_a_clip_that_cannot_be_decoded_is_skipped_and_named(tiny, tiny_config, clips, tmp_path, capsys):
    wav = sorted((clips.parent / "wav").iterdir())[0]
    # Headers alone are read of a large data set, so the silence shows when the clip is decoded.
    samples, rate = soundfile.read(wav)
    soundfile.write(wav, np.zeros(len(samples)), rate)
    changes = [f"data.train=[{clips}]", "data.unreadable_share=0.2"]
    options = tiny(*changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agrepa_fast.data.dataset.SMALL_BYTES", 0)
        assert cli.main(["extract", "demo", "--teacher", "spectral", *options]) == 0
        printed = capsys.readouterr()
        assert "spectral: 11 clips" in printed.out
        assert re.search(rf"skipped: {wav} \(metadata.csv:\d+\): silent", printed.err)
        # The second time nothing is extracted, and the clip is named again.
        assert cli.main(["extract", "demo", "--teacher", "spectral", *options]) == 0
        assert "silent" in capsys.readouterr().err
        assert cli.main(["extract", "demo", "--teacher", "spectral", *options, "data.unreadable_share=0"]) == 2
        assert "1 of 12 clips have no features, at most 0% may be" in capsys.readouterr().err
        # The run leaves the clip out too.
        config = tiny_config(*changes, "alignment.teachers.spectral.cached=true")
        data = load_data(config, tmp_path)
        _, skipped = build_teachers(config, [data.train, data.valid], torch.device("cpu"))
        assert [item.path for item in skipped] == [wav]
        assert "silent" in skipped[0].reason


def test_a_broken_shard_is_named_and_its_clips_are_skipped(tiny_config, tmp_path, small_shards):
    config = tiny_config("alignment.teachers.spectral.cached=true", "data.unreadable_share=0.5")
    Extraction(config, ["spectral"]).run()
    shard = sorted(folder_of(tmp_path).glob("*-0*.safetensors"))[0]
    whole = shard.read_bytes()
    lost = len(Store(folder_of(tmp_path)))
    shard.write_bytes(whole[: len(whole) // 2])
    lost -= len(Store(folder_of(tmp_path)))
    assert lost
    with pytest.warns(UserWarning, match=rf"{shard.name}: a broken shard"):
        trainer = Trainer(config, tmp_path)
    assert len(trainer.data.skipped) == lost
    assert all(shard.name in item.reason for item in trainer.data.skipped)
    # Extraction makes it again, the same.
    extraction = Extraction(config, ["spectral"])
    assert [shard.name in reason for reason in extraction.broken] == [True]
    extraction.run()
    assert shard.read_bytes() == whole
    # One bit that has turned: only --verify reads it.
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not Extraction(config, ["spectral"]).broken
    extraction = Extraction(config, ["spectral"], verify=True)
    assert "its checksum does not fit" in extraction.broken[0]
    extraction.run()
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("pool", ["mean", "null"])
@pytest.mark.parametrize("int8", [False, True])
def test_stored_and_live_features_give_the_same_targets(tiny_config, tmp_path, pool, int8):
    changes = ("data.max_seconds=30", "data.frames_per_batch=4000", f"alignment.pool={pool}")
    config = tiny_config(*changes)
    Extraction(config, ["spectral"], int8=int8).run()
    trainer = Trainer(tiny_config(*changes, "alignment.teachers.spectral.cached=true"), tmp_path)
    batch = next(trainer.feed.batches(0, print))
    features = batch.features["spectral"]
    assert features.values.dtype == (torch.int8 if int8 else torch.float32)
    live, mask = teacher_targets({"spectral": build_teacher("spectral")}, batch, config)
    stored, stored_mask = teacher_targets(trainer.teachers, batch, config)
    assert torch.equal(mask, stored_mask)
    tolerance = 0.05 if int8 else 1e-4
    torch.testing.assert_close(stored["spectral"], live["spectral"], rtol=0, atol=tolerance)
    cosine = torch.cosine_similarity(
        stored["spectral"][stored["spectral"].abs().sum(-1) > 0],
        live["spectral"][live["spectral"].abs().sum(-1) > 0],
        dim=-1,
    )
    assert cosine.min() > (0.9995 if int8 else 0.999999)


def test_features_of_a_crop_are_the_whole_clip_s_at_its_times(tiny_config, tmp_path):
    """The window that a worker reads gives what reading the whole clip gives."""
    changes = ("data.max_seconds=0.5", "alignment.pool=null", "alignment.teachers.spectral.cached=true")
    config = tiny_config(*changes)
    Extraction(config, ["spectral"]).run()
    trainer = Trainer(config, tmp_path)
    batch = next(trainer.feed.batches(0, print))
    assert batch.starts.any()
    store = trainer.teachers["spectral"].store
    rows = [store.read(trainer.data.train.sounds[clip.path])[0] for clip in batch.clips]
    counts = torch.tensor([len(row) for row in rows])
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    whole = FeatureBatch(values, None, counts, torch.zeros_like(counts), torch.ones(len(rows), dtype=torch.bool))
    cut, mask = teacher_targets(trainer.teachers, batch, config)
    all_of_it, whole_mask = teacher_targets(
        trainer.teachers, dataclasses.replace(batch, features={"spectral": whole}), config
    )
    assert torch.equal(mask, whole_mask)
    torch.testing.assert_close(cut["spectral"], all_of_it["spectral"], rtol=1e-4, atol=1e-4)
    assert batch.features["spectral"].values.shape[1] < 0.5 * 50 + 6


def test_a_teacher_needs_features_of_its_own_domains_alone(tiny_config, tmp_path):
    teachers = "alignment.teachers={speech: {source: spectral, domains: [speech], cached: %s}, all: {source: spectral}}"
    config = tiny_config(teachers % "false", "alignment.pool=null")
    assert Extraction(config, ["speech"]).run()["speech"].clips == 6
    trainer = Trainer(tiny_config(teachers % "true", "alignment.pool=null", "data.frames_per_batch=1000"), tmp_path)
    batch = next(trainer.feed.batches(0, print))
    speech = torch.tensor([clip.domain == "speech" for clip in batch.clips])
    assert speech.any()
    assert not speech.all()
    assert torch.equal(batch.features["speech"].covered, speech)
    targets, mask = teacher_targets(trainer.teachers, batch, config)
    assert targets["speech"][speech].any(-1).any(-1).all()
    assert not targets["speech"][~speech].any()
    assert mask.any(1).all()  # a sound without features of one teacher still has the other's


def test_workers_read_the_features(tiny_config, tmp_path):
    config = tiny_config("alignment.teachers.spectral.cached=true", "data.workers=1")
    Extraction(config, ["spectral"], int8=True).run()
    trainer = Trainer(config, tmp_path)
    batch = next(trainer.feed.batches(0, print))
    alone = next(Trainer(tiny_config("alignment.teachers.spectral.cached=true"), tmp_path).feed.batches(0, print))
    assert torch.equal(batch.features["spectral"].values, alone.features["spectral"].values)
    assert torch.equal(batch.features["spectral"].scale, alone.features["spectral"].scale)


def test_names_that_differ_in_the_suffix_alone_do_not_collide(tiny_config, clips, tmp_path):
    wavs = sorted((clips.parent / "wav").iterdir())
    flac = wavs[0].with_name(f"{wavs[1].stem}.flac")
    soundfile.write(flac, *soundfile.read(wavs[0]))
    text = clips.read_text().replace(f"wav/{wavs[0].name}", f"wav/{flac.name}")
    clips.write_text(text)
    store = Store(Extraction(tiny_config(f"data.train=[{clips}]"), ["spectral"]).run()["spectral"].folder)
    one, two = (store.read(file_digest(path))[0] for path in (flac, wavs[1]))
    assert one.shape != two.shape or not torch.equal(one, two)


def test_files_whose_digests_collide_are_skipped(tiny_config, clips, tmp_path):
    """The digest reads three blocks of a file: two that differ in between would share their features."""
    rate, noise = 16000, 0.1 * np.random.default_rng(0).standard_normal(80_000)
    other = noise.copy()
    other[15_000:17_000] *= 0.5
    for name, samples in (("a.wav", noise), ("b.wav", other)):
        soundfile.write(clips.parent / "wav" / name, samples, rate)
    assert file_digest(clips.parent / "wav" / "a.wav") == file_digest(clips.parent / "wav" / "b.wav")
    with open(clips, "a") as file:
        width = clips.read_text().splitlines()[0].count("|")
        for name in ("a.wav", "b.wav"):
            file.write("|".join([f"wav/{name}", name, "audio", *[""] * 9][: width + 1]) + "\n")
    config = tiny_config(
        f"data.train=[{clips}]", "data.unreadable_share=0.5", "alignment.teachers.spectral.cached=true"
    )
    extraction = Extraction(config, ["spectral"])
    extraction.run()
    assert [item.path.name for item in extraction.skipped] in (["a.wav"], ["b.wav"])
    assert "cannot be told apart" in extraction.skipped[0].reason
    trainer = Trainer(config, tmp_path)
    assert {item.path.name for item in trainer.data.skipped} <= {"a.wav", "b.wav"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tokens", "s3"], "--tokens s3: data.tokens has no s3:FILE for any domain"),
        (["--tokens", "s3", "--int8"], "--int8, --pool: tokens are stored as they are"),
        (["--tokens", "s3", "data.tokens={speech: x}"], "data.tokens.speech: expected s3:FILE or beats:FILE, got 'x'"),
        (["--tokens", "s3", "data.tokens={speech: 's3:v2.onnx'}"], "tokenizer 'v2.onnx': no such file"),
        (["--tokens", "s3", "data.tokens={speech: 's3:x.onnx'}"], "the file's name must hold v1, v2 or v3"),
        ([], "extract: give --teacher NAME or --tokens NAME"),
        (["--teacher", "other"], "--teacher other: the configuration has spectral (alignment.teachers)"),
        (["--teacher", "spectral", "--shard", "4/4"], "expected I/N with I from 0 to N - 1"),
        (
            ["--teacher", "spectral", "alignment.teachers.spectral.domains=[music]"],
            "no clip is of its domains (music)",
        ),
    ],
)
def test_mistakes_are_one_line(tiny, capsys, words, message):
    try:
        code = cli.main(["extract", "demo", *tiny(), *words])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_store_made_another_way_is_refused(tiny_config, tmp_path):
    Extraction(tiny_config(), ["spectral"]).run()
    with pytest.raises(
        UserError, match=r"store.json: the store was made with dtype 'float32', this extraction has 'int8'"
    ):
        Extraction(tiny_config(), ["spectral"], int8=True)
    path = folder_of(tmp_path) / "store.json"
    text = path.read_text()
    for damaged in (
        text[: len(text) // 2],
        text.replace("float32", "float16"),
        "[]",
        text.replace('"rate": 50.0', '"rate": "x"'),
    ):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"store.json: damaged"):
            Trainer(tiny_config("alignment.teachers.spectral.cached=true"), tmp_path)


def test_pooled_features_are_refused_where_frames_are_aligned(tiny_config, tmp_path):
    Extraction(tiny_config(), ["spectral"], pool=True).run()
    cached = "alignment.teachers.spectral.cached=true"
    assert Trainer(tiny_config(cached), tmp_path).teachers["spectral"].rate == 0
    with pytest.raises(UserError, match="cached features are pooled"):
        Trainer(tiny_config(cached, "alignment.pool=null"), tmp_path)
