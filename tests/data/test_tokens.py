"""Token streams: text as bytes and token files of one and two streams, good and bad."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from agrepa_fast.data.tokens import encode_text, read_tokens
from agrepa_fast.errors import UserError


def test_text_is_its_utf8_bytes():
    assert encode_text("né").tolist() == [[110], [195], [169]]
    assert encode_text("né").dtype == torch.int64
    assert encode_text("").shape == (0, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("hi \ud83d", r"\\ud83d is half a character .after 3 characters"),
        ("\udcff", "the byte 0xff is not UTF-8 .after 0"),
        ("\ude00\ud83d", r"\\ude00 is half"),
    ],
)
def test_half_a_character_is_refused(text, message):
    with pytest.raises(UserError, match=message) as error:
        encode_text(text)
    str(error.value).encode("utf-8")


def test_one_stream_from_each_kind_of_file(tmp_path):
    wanted = [[3], [0], [4095]]
    np.save(tmp_path / "flat.npy", np.array([3, 0, 4095], dtype=np.uint16))
    np.save(tmp_path / "column.npy", np.array(wanted))
    torch.save(torch.tensor([3, 0, 4095], dtype=torch.int32), tmp_path / "tensor.pt")
    torch.save([3, 0, 4095], tmp_path / "list.pt")
    for name in ("flat.npy", "column.npy", "tensor.pt", "list.pt"):
        tokens = read_tokens(tmp_path / name, (4096,))
        assert tokens.tolist() == wanted, name
        assert tokens.dtype == torch.int64


def test_two_streams_stacked_or_interleaved(tmp_path):
    np.save(tmp_path / "stacked.npy", np.array([[4000, 1], [7, 1023]]))
    np.save(tmp_path / "flat.npy", np.array([4000, 1, 7, 1023]))
    for name in ("stacked.npy", "flat.npy"):
        assert read_tokens(tmp_path / name, (4096, 1024)).tolist() == [[4000, 1], [7, 1023]]


@pytest.mark.parametrize(
    "values, vocabularies, message",
    [
        (np.array([1.0, 2.0]), (8,), "must be integers, the file holds float64"),
        (np.array([True]), (8,), "must be integers, the file holds bool"),
        (np.zeros((2, 2), int), (8,), r"must be \[S\], the file holds shape \[2, 2\]"),
        (np.zeros((2, 3), int), (8, 8), r"the file holds shape \[2, 3\]"),
        (np.zeros((), int), (8,), r"the file holds shape \[\]"),
        (np.zeros(0, int), (8,), "holds no tokens"),
        (np.array([1, 2, 3]), (8, 8), "3 tokens do not divide into two"),
        (np.array([1, 8]), (8,), "token 8 in stream 0 is outside 0 to 7"),
        (np.array([1, -2]), (8,), "token -2 in stream 0"),
        (np.array([2**63], dtype=np.uint64), (8,), "token 9223372036854775808 in stream 0"),
        (np.array([7, 3]), (8, 3), "token 3 in stream 1 is outside 0 to 2"),
        (np.array([1, "a"], dtype=object), (8,), "cannot be read as tokens"),
    ],
)
def test_bad_contents(tmp_path, values, vocabularies, message):
    np.save(tmp_path / "t.npy", values, allow_pickle=True)
    with pytest.raises(UserError, match=message) as error:
        read_tokens(tmp_path / "t.npy", vocabularies)
    assert str(error.value).startswith(str(tmp_path / "t.npy"))
    assert "\n" not in str(error.value)


class _Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.npy").write_bytes(b"not numpy")
    (tmp_path / "t.txt").write_text("1 2 3")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Evil(), protocol=2))
    torch.save({"tokens": [1]}, tmp_path / "dict.pt")
    torch.save([1, 2.5], tmp_path / "mixed.pt")
    torch.save([2**70], tmp_path / "huge.pt")
    torch.save(torch.tensor([0.5]).bfloat16(), tmp_path / "float.pt")
    for name, message in {
        "t.npy": "cannot be read as tokens",
        "t.txt": "from .npy or .pt",
        "evil.pt": "cannot be read as tokens",
        "dict.pt": "not dict",
        "mixed.pt": "list of integers",
        "huge.pt": "must be integers",
        "float.pt": "holds torch.bfloat16",
        "gone.npy": "no such token file",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            read_tokens(tmp_path / name, (256,))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_misuse():
    for vocabularies in ((), (1, 2, 3), (0,)):
        with pytest.raises(ValueError, match="one or two positive sizes"):
            read_tokens("t.npy", vocabularies)
