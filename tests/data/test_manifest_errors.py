"""Lists of clips with mistakes: each is one line that names the place."""

from __future__ import annotations

import gzip
import os
import tarfile
import zipfile

import pytest

from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.errors import UserError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


TABLE_MISTAKES = {
    "empty": ("", r"list\.csv: the manifest is empty"),
    "header only": ("audio_file|text\n", "lists no clips"),
    "no header": ("a.wav|hello\nb.wav|you\n", r"list\.csv:1: .*'a\.wav\|hello' is not a header.*ljspeech:PATH"),
    "misspelt": ("audio_fil|text\n", r"list\.csv:1: .*did you mean 'audio_file'"),
    "misspelt speaker": ("audio_file|text|speeker\n", r"list\.csv:1: .*'speeker' \(did you mean 'speaker'\?\)"),
    "twice": ("audio_file|text|text\n", r"list\.csv:1: 'text' appears twice"),
    "two texts": ("audio_file|text|Sentence\n", r"list\.csv:1: 'text' and 'sentence' both give the text: keep one"),
    "two files": ("path,file_name,text\n", r"list\.csv:1: 'path' and 'file_name' both give the audio_file"),
    "no text": ("audio_file|speaker\n", r"list\.csv:1: the column 'text' is missing"),
    "few": ("audio_file|text\na.wav|x\n\nb.wav\n", r"list\.csv:4: 1 cells where 2 are expected"),
    "many": ("audio_file|text\na.wav|x|y\n", r"list\.csv:2: 3 cells.*contains '\|' in double quotes"),
    "few after a long row": ('audio_file|text\na.wav|"x\n\ny"\nb.wav\n', r"list\.csv:5: 1 cells"),
    "quotes of nothing": ('""\n', r"list\.csv:1: .*is not a header"),
    "endless line": ("x" * 200_000, r"list\.csv:1: a cell from here on has more than 131072 characters"),
    "lines in a name": ('audio_file|text\n"a.wav|x\nb.wav"|y\n', r"list\.csv:2: .*holds a line end: check the quotes"),
    "text after a quote": ('audio_file|text\na.wav|"x," he said\n', r"list\.csv:2: .*unquoted:PATH"),
    "quote never closed": ('audio_file|text\nb.wav|y\na.wav|"x\nc.wav|z\n', r"list\.csv:3: unexpected end"),
    "part of a file": ("audio_file,text,offset\na.wav,x,0.0\na.wav,y,1.5\n", r"list\.csv:3: .* begins at 1\.5"),
    "no file": ("audio_file|text\n|x\n", r"list\.csv:2: the name of the audio file is empty"),
    "domain": ("audio_file|text|domain\na.wav|x|Speech\n", r"list\.csv:2: domain 'Speech' must be one lower"),
    "absolute": ("audio_file|text\n/etc/a.wav|x\n", r"list\.csv:2: /etc/a\.wav leaves .*allow_outside"),
    "above": ("audio_file|text\nwav/../../a.wav|x\n", r"list\.csv:2: wav/\.\./\.\./a\.wav leaves"),
    "tokens above": ("audio_file|text|tokens\na.wav|x|../t.npy\n", r"list\.csv:2: \.\./t\.npy leaves"),
    "zero": ("audio_file|text\na\0.wav|x\n", r"list\.csv:2: the file name holds a zero"),
    "unknown commas": ("name,words\na,b\n", r"list\.csv:1: .*'name,words' is not a header"),
    "comment": ("# hello\na,b\n", r"list\.csv:1: the comment lines lack"),
    "short row": ("id,labels\nx\n", r"list\.csv:2: 1 cells where 2"),
    "unquoted": ("id,caption\nx,a dog, barking\n", r"list\.csv:2: 3 cells where 2.*double quotes"),
    "open quote": ('id,caption\nx,"a dog\n', r"list\.csv:2: unexpected end of data"),
    "no id": ("id,caption\n,a dog\n", r"list\.csv:2: the first column is empty"),
    "no match": ("id,caption\nx,a dog\ny,a cat\n", r"list\.csv: none of its 2 rows has a sound file"),
}


@pytest.mark.parametrize("kind", TABLE_MISTAKES)
def test_table_mistakes(tmp_path, kind):
    text, message = TABLE_MISTAKES[kind]
    path = write(tmp_path / "list.csv", text)
    with pytest.raises(UserError, match=message) as error:
        read_manifest(path)
    assert "\n" not in str(error.value)


JSON_MISTAKES = {
    "not json": ("{audio_file}", r"list\.jsonl:1: not a JSON object"),
    "list": ("[1]", r"list\.jsonl:1: not a JSON object .*one object per line"),
    "pretty list": ('[\n{"audio_file": "a",', r"list\.jsonl:1: not a JSON object .*one object per line"),
    "twice": ('{"audio_file": "a", "text": "b", "text": "c"}', r"list\.jsonl:1: 'text' appears twice"),
    "two texts": ('{"audio_file": "a", "text": "b", "caption": "c"}', "'text' and 'caption' both give the text"),
    "part": ('{"audio_file": "a", "text": "b", "offset": 3.5}', r"list\.jsonl:1: .*begins at 3\.5 of its file"),
    "half": ('{"audio_file": "a\\ud83d", "text": "b"}', r"list\.jsonl:1: the file name 'a\\ud83d' holds half"),
    "nested": ("[" * 100000, r"list\.jsonl:1: not a JSON object"),
    "key": ('{"audio_file": "a", "txt": "b"}', r"list\.jsonl:1: unknown column 'txt' \(did you mean 'text'\?\)"),
    "no text": ('{"audio_file": "a"}', r"list\.jsonl:1: the column 'text' is missing"),
    "no file": ('{"text": "a"}', r"list\.jsonl:1: the column 'audio_file' is missing"),
    "number": ('{"audio_file": "a", "text": 3}', r"list\.jsonl:1: text must be a string, not 3"),
    "null": ('{"audio_file": null, "text": ""}', r"list\.jsonl:1: audio_file must be a string, not null"),
    "above": ('{"audio_file": "../a", "text": ""}', r"list\.jsonl:1: \.\./a leaves"),
    "second": (
        '{"audio_file": "a", "text": ""}\n{"audio_file": "a", "text": "", "domain": "a b"}',
        r"list\.jsonl:2: domain 'a b'",
    ),
}


@pytest.mark.parametrize("kind", JSON_MISTAKES)
def test_json_mistakes(tmp_path, kind):
    text, message = JSON_MISTAKES[kind]
    path = write(tmp_path / "list.jsonl", text)
    with pytest.raises(UserError, match=message) as error:
        read_manifest(path)
    assert "\n" not in str(error.value)


def test_outside_paths_only_when_allowed(tmp_path):
    path = write(tmp_path / "in/list.csv", "audio_file|text\n../a.wav|x\n/data/b.wav|y\nc/../d.wav|z\n")
    clips = read_manifest(path, allow_outside=True)
    assert [str(clip.path) for clip in clips] == [
        f"{tmp_path}/in/../a.wav",
        "/data/b.wav",
        f"{tmp_path}/in/c/../d.wav",
    ]
    # A path that only passes through `..` stays inside.
    inside = write(tmp_path / "in/inside.csv", "audio_file|text\nc/../d.wav|z\n")
    assert len(read_manifest(inside)) == 1


def test_places_without_a_manifest(tmp_path):
    with pytest.raises(UserError, match="no such manifest"):
        read_manifest(tmp_path / "gone.csv")
    with pytest.raises(UserError, match=r"holds no metadata\.csv"):
        read_manifest(tmp_path)
    write(tmp_path / "a.csv", "id,labels\n")
    write(tmp_path / "b.csv", "id,labels\n")
    with pytest.raises(UserError, match=r"several lists \(a\.csv, b\.csv\)"):
        read_manifest(tmp_path)
    (tmp_path / "latin.csv").write_bytes("audio_file|text\na.wav|x\nb.wav|é\n".encode("latin-1"))
    # The clip is for the data set to refuse, by its line: other lines may be fine.
    assert [clip.text for clip in read_manifest(tmp_path / "latin.csv")] == ["x", "\udce9"]
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=r"fifo: a manifest must be a regular file"):
        read_manifest(tmp_path / "fifo")
    write(tmp_path / "84/1/84-1.trans.txt", "84-1-0000 YES\n84-1-0001\n")
    with pytest.raises(UserError, match=r"84-1\.trans\.txt:2: expected 'ID TEXT'"):
        read_manifest(tmp_path / "84")
    write(tmp_path / "85/1/85-1.trans.txt", "../../x YES\n")
    with pytest.raises(UserError, match=r"85-1\.trans\.txt:1: expected 'ID TEXT'"):
        read_manifest(tmp_path / "85")


def test_an_id_that_fits_two_files_is_refused(tmp_path):
    write(tmp_path / "list.csv", "id,labels\nx,dog\n")
    write(tmp_path / "x_10.wav", "")
    write(tmp_path / "x_20.wav", "")
    with pytest.raises(UserError, match=r"list\.csv:2: x fits several files \(x_10\.wav, x_20\.wav\)"):
        read_manifest(tmp_path)


def _tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a.wav"))


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.wav", "")


OTHER_FILES = {
    "train.parquet": (lambda path: path.write_bytes(b"PAR1" + bytes(99)), "a Parquet file .*extract its sound files"),
    "shard.tar": (_tar, "a tar archive .*extract its sound files"),
    "data.zip": (_zip, "a zip archive .*extract its sound files"),
    "list.xlsx": (_zip, "a spreadsheet .*save it as CSV"),
    "list.csv.gz": (lambda path: path.write_bytes(gzip.compress(b"audio_file|text")), "a gzip file .*unpack"),
    "a.wav": (lambda path: path.write_bytes(b"RIFF" + bytes(99)), "a sound file .*audio_file"),
    "wide.csv": (lambda path: path.write_text("audio_file|text", encoding="utf-16"), "UTF-16 .*UTF-8"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_what_is_no_list_says_what_to_give_instead(tmp_path, name):
    make, message = OTHER_FILES[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        read_manifest(tmp_path / name)
    assert "\n" not in str(error.value)


def test_folders_of_packed_files_and_of_splits_say_what_to_give(tmp_path):
    write(tmp_path / "packed/data/train-0.parquet", "")
    with pytest.raises(
        UserError,
        match=r"packed: holds data/train-0\.parquet, which is no manifest: give its folder as hf:FOLDER:train",
    ):
        read_manifest(tmp_path / "packed")
    write(tmp_path / "splits/train/metadata.csv", "file_name,text\n")
    write(tmp_path / "splits/test/metadata.csv", "file_name,text\n")
    with pytest.raises(UserError, match=r"its folders test, train hold one each"):
        read_manifest(tmp_path / "splits")
