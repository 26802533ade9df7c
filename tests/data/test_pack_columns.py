"""The columns of `hf:` data and the members of `wds:` data beside the sound: used like those of a list, or refused."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from agrepa_fast.data import hub
from agrepa_fast.data.dataset import ClipDataset
from agrepa_fast.data.latents import LatentFiles
from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.data.mel import MelConfig
from agrepa_fast.errors import UserError
from agrepa_fast.training.identity import identify
from agrepa_fast.training.latents import with_latents

from .packed import built, datasets, tar

MEL = MelConfig(sample_rate=16000, n_fft=512, win_length=512, hop_length=256, mels=16, f_max=8000)


def rows_of(waves, columns):
    """A split with the sounds of `waves` and other columns."""
    sounds = [{"bytes": path.read_bytes(), "path": None} for path, _ in waves[: len(columns["text"])]]
    data = datasets.Dataset.from_dict({"sound": [None] * len(sounds), **columns})
    return built(
        {"sound": sounds, **columns}, datasets.Features(data.features | {"sound": datasets.Audio(decode=False)})
    )


LISTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]


@pytest.mark.parametrize("form", ["lists", "two streams", "files", "some"])
def test_tokens_of_a_table_are_those_of_a_list(waves, tmp_path, form):
    values = LISTS if form != "two streams" else [[[token, token + 10] for token in row] for row in LISTS]
    column = values
    if form == "files":
        column = [f"made/{number}.npy" for number in range(3)]
        (tmp_path / "saved" / "made").mkdir(parents=True)
        for name, row in zip(column, values):
            np.save(tmp_path / "saved" / name, row)
    elif form == "some":
        column = [LISTS[0], None, LISTS[2]]
    rows_of(waves, {"text": ["a", "b", "c"], "tokens": column}).save_to_disk(str(tmp_path / "saved"))
    sizes = (20, 20) if form == "two streams" else (256,)
    clips = read_manifest(f"hf:{tmp_path / 'saved'}:train")
    packed = ClipDataset(clips, MEL, max_frames=100, vocabularies={"text": sizes})
    assert packed.check(0.0) == []
    for number, row in enumerate(values):
        expected = [[ord("b")]] if form == "some" and number == 1 else np.reshape(row, (-1, len(sizes))).tolist()
        assert packed.item(number, None)["tokens"].tolist() == expected
    few = ClipDataset(clips[:1], MEL, max_frames=100, vocabularies={"text": (5,) * len(sizes)})
    with pytest.raises(UserError, match=r"0(0000000.tokens)?.npy: token \d+ in stream \d is outside 0 to 4"):
        few.check(0.0)
    # Tokens are part of a clip's identity.
    plain = rows_of(waves, {"text": ["a", "b", "c"]})
    plain.save_to_disk(str(tmp_path / "plain"))
    pairs = zip(identify(clips), identify(read_manifest(f"hf:{tmp_path / 'plain'}:train")), strict=True)
    same = [one.identity.whole == other.identity.whole for one, other in pairs]
    assert same == [False, form == "some", False]


LATENTS = [np.random.default_rng(number).standard_normal((4 + number, 3)).astype(np.float32) for number in range(2)]


@pytest.mark.parametrize("form", ["hf lists", "hf files", "npy", "wav.latents.npy", "latents.safetensors"])
def test_latents_of_tables_and_archives_are_those_of_files(waves, tmp_path, form):
    spec = f"hf:{tmp_path / 'saved'}:train"
    if form == "hf lists":
        rows_of(waves, {"text": ["a", "b"], "latents": [row.tolist() for row in LATENTS]}).save_to_disk(
            str(tmp_path / "saved")
        )
    elif form == "hf files":
        rows_of(waves, {"text": ["a", "b"], "latents": ["0.npy", "1.npy"]}).save_to_disk(str(tmp_path / "saved"))
        for number, row in enumerate(LATENTS):
            np.save(tmp_path / "saved" / f"{number}.npy", row)
    else:
        members = []
        kind = "latents.npy" if form == "npy" else form
        for number, row in enumerate(LATENTS):
            written = io.BytesIO()
            np.save(written, row)
            data = written.getvalue()
            if form == "latents.safetensors":
                data = safetensors.torch.save({"latents": torch.from_numpy(row)})
            members += [
                (f"{number}.wav", waves[0][0].read_bytes()),
                (f"{number}.txt", b"a"),
                (f"{number}.{kind}", data),
            ]
        spec = f"wds:{tar(tmp_path / 'a.tar', members)}"
    clips = read_manifest(spec)
    files = LatentFiles(3)
    for clip, row in zip(clips, LATENTS, strict=True):
        assert files.count(clip, None) == len(row)
        np.testing.assert_array_equal(files.read(clip, None, 1, 4), row[1:4])
        with pytest.raises(UserError, match=r"expected latents \[frames, 4\] \(latents.channels\), got \["):
            LatentFiles(4).count(clip, None)
    assert len({known.identity.whole for known in identify(clips)}) == 2


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"tokens": [[1.5]]}, "the column 'tokens' holds list<.*double>, expected lists of integers, or the names of"),
        ({"tokens": [7]}, "the column 'tokens' holds int64, expected lists of integers"),
        ({"latents": [[1]]}, "the column 'latents' holds list<.*int64>, expected lists of floating numbers"),
        ({"tokens": [[[1], [2, 3]]]}, "train:0: the tokens are no array of integers"),
        ({"tokens": [[1, None]]}, "train:0: the tokens are no array of integers"),
        ({"tokens": ["../x.npy"]}, "train:0: ../x.npy leaves the manifest's folder"),
        ({"tokns": [[1]]}, "unknown column 'tokns'"),
    ],
)
def test_bad_columns_of_a_table_are_one_line(waves, tmp_path, columns, message):
    rows_of(waves, {"text": ["a"], **columns}).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(UserError, match=message) as raised:
        read_manifest(f"hf:{tmp_path / 'x'}:train")
    assert "\n" not in str(raised.value)


def test_labels_are_words_and_a_start_counts_where_a_row_names_a_file(waves, tmp_path, monkeypatch):
    features = datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "labels": datasets.Sequence(datasets.ClassLabel(names=["rain", "wind"])),
            "domain": datasets.ClassLabel(names=["outside", "inside"]),
            "start_time": datasets.Value("float32"),
        }
    )
    rows = {"labels": [[0, 1], [1]], "domain": [1, -1], "start_time": [0.0, 2.5]}
    sounds = [{"bytes": path.read_bytes(), "path": None} for path, _ in waves[:2]]
    monkeypatch.setattr(hub, "_load", lambda *_: built({"audio": sounds, **rows}, features))
    clips = read_manifest("hf:somebody/labels:train")
    assert [(clip.text, clip.domain) for clip in clips] == [("rain, wind", "inside"), ("wind", "audio")]
    paths = [{"bytes": None, "path": str(path)} for path, _ in waves[:2]]
    monkeypatch.setattr(hub, "_load", lambda *_: built({"audio": paths, **rows}, features))
    with pytest.raises(UserError, match=r"train:1: the clip begins at 2\.5 of its file, and only whole files are read"):
        read_manifest("hf:somebody/starts:train")
    monkeypatch.setattr(hub, "_load", lambda *_: rows_of(waves, {"text": ["a"], "tokens": ["x.npy"]}))
    with pytest.raises(
        UserError, match=r"train:0: x\.npy is the name of a file, and a data set of the hub has no folder"
    ):
        read_manifest("hf:somebody/names:train")


def test_a_run_reads_the_latents_of_an_archive_wherever_it_looks_for_them(waves, tmp_path):
    members = [("a.wav", waves[0][0].read_bytes()), ("a.txt", b""), ("a.latents.npy", b"?")]
    [packed] = read_manifest(f"wds:{tar(tmp_path / 'a.tar', members)}")
    for place, expected in (("column", packed.latents), ("beside", packed.latents), ("", None), ("a/store", None)):
        [clip] = with_latents([packed], SimpleNamespace(data=SimpleNamespace(latents=place)))
        assert (clip.latents, clip.latent_pack is None) == (expected, expected is None)
