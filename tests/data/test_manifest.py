"""Manifests: every accepted form, and every mistake with its file, line and what to do."""

from __future__ import annotations

import json

import pytest

from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.errors import UserError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_table_with_all_columns_in_another_order(tmp_path):
    path = write(
        tmp_path / "list.csv",
        'text|audio_file|tokens|domain|speaker\noh, "you"|wav/a.wav|tok/a.npy|speech|ann\n\n|b.wav||audio|\n',
    )
    first, second = read_manifest(path)
    assert first.path == tmp_path / "wav/a.wav"
    assert first.tokens == tmp_path / "tok/a.npy"
    assert (first.text, first.domain, first.speaker) == ('oh, "you"', "speech", "ann")
    assert first.source == "list.csv:2"
    assert (second.text, second.domain, second.speaker, second.tokens) == ("", "audio", None, None)
    assert second.source == "list.csv:4"


def test_f5_form_with_byte_order_mark_and_windows_lines_in_a_folder(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("\ufeffaudio_file|text\r\na.wav|é\r\n".encode())
    (clip,) = read_manifest(tmp_path)
    assert (clip.path, clip.text, clip.domain) == (tmp_path / "a.wav", "é", "speech")


def test_jsonl(tmp_path):
    rows = [
        {"audio_file": "a.wav", "text": "one | two", "domain": "music", "speaker": "x", "tokens": "a.npy"},
        {"audio_file": "b.wav", "text": "", "speaker": None},
    ]
    path = write(tmp_path / "list.jsonl", "\n".join(json.dumps(row) for row in rows))
    first, second = read_manifest(str(path))
    assert (first.text, first.domain, first.speaker) == ("one | two", "music", "x")
    assert first.tokens == tmp_path / "a.npy"
    assert (second.text, second.domain, second.speaker, second.tokens) == ("", "speech", None, None)
    assert second.source == "list.jsonl:2"


def test_librispeech_tree(tmp_path):
    write(tmp_path / "84/121/84-121.trans.txt", "84-121-0000 GO ON\n84-121-0001 WELL\n")
    write(tmp_path / "1272/5/1272-5.trans.txt", "1272-5-0000 MISTER\n")
    clips = read_manifest(tmp_path)
    assert [clip.path for clip in clips] == [
        tmp_path / "1272/5/1272-5-0000.flac",
        tmp_path / "84/121/84-121-0000.flac",
        tmp_path / "84/121/84-121-0001.flac",
    ]
    assert [clip.text for clip in clips] == ["MISTER", "GO ON", "WELL"]
    assert [clip.speaker for clip in clips] == ["1272", "84", "84"]
    assert {clip.domain for clip in clips} == {"speech"}
    assert clips[2].source == "84-121.trans.txt:2"
    # One chapter's folder, or its transcript alone, still knows the speaker.
    for part in (tmp_path / "84/121", tmp_path / "84/121/84-121.trans.txt"):
        assert [clip.speaker for clip in read_manifest(part)] == ["84", "84"]


SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=5, num_segs=5
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
a_1b, 10.000, 20.000, "/m/07yv9"
a_1b, 50.000, 60.000, "/m/09x0r"
plain, 0.000, 10.000, "/m/07yv9"
gone, 0.000, 10.000, "/m/07yv9"
"""


def test_audioset_segments(tmp_path, caplog):
    write(tmp_path / "eval.csv", SEGMENTS)
    for name in (
        "Y--PJHxphWEs.wav",
        "a_1b_10000.flac",
        "sub/a_1b_50.000_60.000.wav",
        "plain.WAV",
        "other.wav",
    ):
        write(tmp_path / name, "")
    clips = read_manifest(tmp_path)
    assert [(clip.path.relative_to(tmp_path).as_posix(), clip.text) for clip in clips] == [
        ("Y--PJHxphWEs.wav", "/m/09x0r, /t/dd00088"),
        ("a_1b_10000.flac", "/m/07yv9"),
        ("sub/a_1b_50.000_60.000.wav", "/m/09x0r"),
        ("plain.WAV", "/m/07yv9"),
    ]
    assert {clip.domain for clip in clips} == {"audio"}
    assert clips[0].source == "eval.csv:4"
    assert "1 of 5 rows have no sound file" in caplog.text


def test_audioset_names_its_labels_when_their_table_is_there(tmp_path):
    write(tmp_path / "eval.csv", SEGMENTS)
    write(
        tmp_path / "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gush, flow"\n',
    )
    write(tmp_path / "--PJHxphWEs.wav", "")
    (clip,) = read_manifest(tmp_path)
    assert clip.text == "Speech, Gush, flow"


@pytest.mark.parametrize("text", ['file_name,caption\nx.wav,"a dog, barking"\n', 'id,labels\nx,"a dog, barking"\n'])
def test_simple_caption_tables(tmp_path, text):
    write(tmp_path / "captions.csv", text)
    write(tmp_path / "x.wav", "")
    (clip,) = read_manifest(tmp_path)
    assert (clip.path, clip.text, clip.domain) == (tmp_path / "x.wav", "a dog, barking", "audio")


TABLE_MISTAKES = {
    "empty": ("", r"list\.csv: the manifest is empty"),
    "header only": ("audio_file|text\n", "lists no clips"),
    "no header": ("a.wav|hello\nb.wav|you\n", r"list\.csv:1: unknown column 'a\.wav'.*first line must be"),
    "misspelt": ("audio_fil|text\n", r"list\.csv:1: .*did you mean 'audio_file'"),
    "twice": ("audio_file|text|text\n", r"list\.csv:1: column 'text' appears twice"),
    "no text": ("audio_file|speaker\n", r"list\.csv:1: the header lacks the column 'text'"),
    "few": ("audio_file|text\na.wav|x\n\nb.wav\n", r"list\.csv:4: 1 columns where the header has 2"),
    "many": ("audio_file|text\na.wav|x|y\n", r"list\.csv:2: 3 columns.*cannot contain '\|'"),
    "no file": ("audio_file|text\n|x\n", r"list\.csv:2: audio_file is empty"),
    "domain": ("audio_file|text|domain\na.wav|x|Speech\n", r"list\.csv:2: domain 'Speech' must be one lower"),
    "absolute": ("audio_file|text\n/etc/a.wav|x\n", r"list\.csv:2: /etc/a\.wav leaves .*allow_outside"),
    "above": ("audio_file|text\nwav/../../a.wav|x\n", r"list\.csv:2: wav/\.\./\.\./a\.wav leaves"),
    "tokens above": ("audio_file|text|tokens\na.wav|x|../t.npy\n", r"list\.csv:2: \.\./t\.npy leaves"),
    "zero": ("audio_file|text\na\0.wav|x\n", r"list\.csv:2: the file name holds a zero"),
    "unknown commas": ("name,words\na,b\n", r"list\.csv:1: header 'name,words' is not known"),
    "comment": ("# hello\na,b\n", r"list\.csv:1: the comment lines lack"),
    "short row": ("id,labels\nx\n", r"list\.csv:2: 1 columns where 2"),
    "unquoted": ("id,caption\nx,a dog, barking\n", r"list\.csv:2: 3 columns where 2.*double quotes"),
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
    "list": ("[1]", r"list\.jsonl:1: not a JSON object but list"),
    "nested": ("[" * 100000, r"list\.jsonl:1: not a JSON object"),
    "key": ('{"audio_file": "a", "txt": "b"}', r"list\.jsonl:1: unknown key 'txt' \(did you mean 'text'\?\)"),
    "no text": ('{"audio_file": "a"}', r"list\.jsonl:1: the key 'text' is missing"),
    "no file": ('{"text": "a"}', r"list\.jsonl:1: the key 'audio_file' is missing"),
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
    with pytest.raises(UserError, match=message):
        read_manifest(path)


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
    with pytest.raises(UserError, match=r"latin\.csv:3: not UTF-8"):
        read_manifest(tmp_path / "latin.csv")
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
