"""Token streams: text as bytes and token files of one and two streams, good and bad."""

from __future__ import annotations

import functools
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
        (np.array([1, "a"], dtype=object), (8,), "must be integers, the file holds object"),
        (np.array([1, 2], dtype="m8[s]"), (8,), "must be integers, the file holds timedelta64"),
        (np.array([1, 2], dtype="M8[s]"), (8,), "must be integers, the file holds datetime64"),
        (np.array([(1, 2)], dtype=[("a", int), ("b", int)]), (8,), "must be integers, the file holds"),
        (np.array([1j]), (8,), "must be integers, the file holds complex128"),
        (np.array(["1"]), (8,), "must be integers, the file holds <U1"),
        (np.zeros((3, 0), int), (8,), "holds no tokens"),
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
        "huge.pt": "beyond 64 bits",
        "float.pt": "holds torch.strided torch.bfloat16",
        "gone.npy": "no such token file",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            read_tokens(tmp_path / name, (256,))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_layouts_in_memory_do_not_matter(tmp_path):
    wanted = [[1, 2], [3, 4], [5, 6]]
    np.save(tmp_path / "fortran.npy", np.asfortranarray(wanted))
    np.save(tmp_path / "big.npy", np.array(wanted, dtype=">u2"))
    torch.save(torch.tensor(wanted).t().contiguous().t(), tmp_path / "strided.pt")
    torch.save(torch.tensor([[0] * 9, *([9, *row] for row in wanted)][1:])[:, 1:], tmp_path / "view.pt")
    torch.save(torch._neg_view(-torch.tensor(wanted)), tmp_path / "negated.pt")
    torch.save(torch.tensor(wanted, dtype=torch.uint16), tmp_path / "uint16.pt")
    torch.save(torch.tensor(wanted), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("fortran.npy", "big.npy", "strided.pt", "view.pt", "negated.pt", "uint16.pt", "legacy.pt"):
        tokens = read_tokens(tmp_path / name, (8, 8))
        assert tokens.tolist() == wanted, name
        assert tokens.is_contiguous()
    # What is small is exact, however it is stored.
    torch.save(torch.tensor([3]).expand(1000), tmp_path / "expanded.pt")
    assert read_tokens(tmp_path / "expanded.pt", (8,)).tolist() == [[3]] * 1000


def _tensors():
    dense = torch.tensor([[0, 3], [4, 0]])
    return {
        "expanded": (torch.tensor([3]).expand(10**9), "claims 1e.09 tokens"),
        "coo": (dense.to_sparse(), "holds torch.sparse_coo"),
        "csr": (dense.to_sparse_csr(), "holds torch.sparse_csr"),
        "meta": (torch.zeros(3, dtype=torch.int64, device="meta"), "on meta"),
        "quantised": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "torch.quint8"),
        "complex": (torch.tensor([1j]), "torch.complex64"),
        "bool": (torch.tensor([True]), "torch.bool"),
        "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["expanded", "coo", "csr", "meta", "quantised", "complex", "bool", "nested"])
def test_tensors_that_are_no_dense_integers(tmp_path, kind):
    tensor, message = _tensors()[kind]
    torch.save(tensor, tmp_path / "t.pt")
    with pytest.raises(UserError, match=message) as error:
        read_tokens(tmp_path / "t.pt", (8,))
    assert "\n" not in str(error.value)


def _npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def _bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("t/data/0", "w") as record:
        for _ in range(257):
            record.write(bytes(1 << 20))


CLAIMS = {
    "a.npy": (
        _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000,)}", bytes(80)),
        "does not fit the 80 bytes",
    ),
    "b.npy": (_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (9,)}", bytes(80)), "does not fit the 80 bytes"),
    "c.npy": (_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, -10)}", bytes(80)), "does not fit the 80"),
    "d.npy": (_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10**9,)}"), "cannot be read as tokens"),
    "e.npy": (_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000,)}"), "claims 1e.09 tokens"),
    "f.npy": (_npy("{'descr': '<m8', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "holds timedelta64"),
    "g.npy": (_npy("(" * 9000), "cannot be read as tokens"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_header_that_does_not_fit_its_file(tmp_path, name):
    data, message = CLAIMS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_tokens(tmp_path / name, (8,))
    assert "\n" not in str(error.value)


def test_a_compressed_archive_is_measured_before_it_is_unpacked(tmp_path):
    _bomb(tmp_path / "t.pt")
    assert (tmp_path / "t.pt").stat().st_size < 1 << 20
    with pytest.raises(UserError, match="bytes are more than tokens of one clip take"):
        read_tokens(tmp_path / "t.pt", (8,))


@functools.cache
def _good_files() -> dict[str, bytes]:
    files = {}
    for name, legacy in (("t.pt", False), ("u.pt", True)):
        buffer = io.BytesIO()
        torch.save(torch.arange(5, dtype=torch.int32), buffer, _use_new_zipfile_serialization=not legacy)
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.arange(5, dtype=np.int16))
    files["t.npy"] = buffer.getvalue()
    return files


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150)
@given(st.data())
def test_damaged_files_are_tokens_or_one_line(tmp_path_factory, data):
    name = data.draw(st.sampled_from(["t.pt", "u.pt", "t.npy"]))
    content = bytearray(_good_files()[name])
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    refusal = ""
    try:
        tokens = read_tokens(path, (2**15,))
    except UserError as error:
        refusal = str(error)
    else:
        assert tokens.shape[1] == 1
        assert tokens.dtype == torch.int64
        assert tokens.numel() < 1 << 16
    assert len(refusal.splitlines()) <= 1


def test_misuse():
    for vocabularies in ((), (1, 2, 3), (0,)):
        with pytest.raises(ValueError, match="one or two positive sizes"):
            read_tokens("t.npy", vocabularies)
