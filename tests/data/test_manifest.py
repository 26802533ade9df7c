"""Manifests: every accepted form, and every mistake with its file, line and what to do."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_lines_may_end_in_a_carriage_return(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b"audio_file|text\ra.wav|x\r\rb.wav|y\r")
    assert [(clip.text, clip.source) for clip in read_manifest(tmp_path)] == [
        ("x", "metadata.csv:2"),
        ("y", "metadata.csv:4"),
    ]


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


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    st.lists(CELLS, min_size=1, max_size=4),
    st.sampled_from("|\t,;"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, texts, delimiter, quoting, end, mark):
    if quoting == csv.QUOTE_MINIMAL and end == "\n":
        # The module leaves a lone carriage return unquoted there, and cannot read it back itself.
        texts = [text.replace("\r", "") for text in texts]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(["audio_file", "text", "duration"])
    writer.writerows([f"{number}.wav", text, 1.5] for number, text in enumerate(texts))
    path = tmp_path_factory.mktemp("csv") / "list.csv"
    path.write_bytes(buffer.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    clips = read_manifest(path)
    assert [clip.text for clip in clips] == [text.strip() for text in texts]
    assert [clip.path.name for clip in clips] == [f"{number}.wav" for number in range(len(texts))]


def test_quoted_cells_keep_delimiters_quotes_and_lines(tmp_path):
    text = 'audio_file|text|speaker\na.wav|"""Well"", he | she\nsaid"|ann\n"b.wav"|plain|"bob"\n'
    first, second = read_manifest(write(tmp_path / "list.csv", text))
    assert (first.text, first.speaker, first.source) == ('"Well", he | she\nsaid', "ann", "list.csv:2")
    assert (second.path.name, second.text, second.speaker, second.source) == ("b.wav", "plain", "bob", "list.csv:4")


# What toolkits write, and what it means: (file, content, [(path, text, domain, speaker)]).
FORMS = {
    "f5-tts": ("m.csv", "audio_file|text\n{folder}/wavs/a.wav|hi\n", [("wavs/a.wav", "hi", "speech", None)]),
    "audiofolder csv": ("metadata.csv", "file_name,transcription\na.wav,hi\n", [("a.wav", "hi", "speech", None)]),
    "audiofolder jsonl": (
        "metadata.jsonl",
        '{{"file_name": "data/a.wav", "transcription": "hi", "duration": 2.0}}',
        [("data/a.wav", "hi", "speech", None)],
    ),
    "nemo": (
        "train_manifest.json",
        '{{"audio_filepath": "a.wav", "text": "hi", "duration": 2.0, "offset": 0, "speaker": 7, "lang": null}}',
        [("a.wav", "hi", "speech", "7")],
    ),
    "common voice": (
        "train.tsv",
        "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tage\nab\tx.mp3\t5\thi, you\t\t2\t\n",
        [("clips/x.mp3", "hi, you", "speech", "ab")],
    ),
    "pandas": ("m.csv", ",path,sentence\n0,x.wav,hi\n", [("clips/x.wav", "hi", "speech", None)]),
    "captions": ("m.csv", "Path;Caption\nx.wav;a dog, barking\n", [("x.wav", "a dog, barking", "audio", None)]),
    "caption jsonl": ("m.jsonl", '{{"path": "x.wav", "caption": "a dog"}}', [("x.wav", "a dog", "audio", None)]),
    "deepspeech": (
        "m.csv",
        "wav_filename,wav_filesize,transcript\nx.wav,99,hi\n",
        [("x.wav", "hi", "speech", None)],
    ),
    "domain": ("m.csv", "path|caption|domain\nx.wav|a dog|music\n", [("x.wav", "a dog", "music", None)]),
}


@pytest.mark.parametrize("name", FORMS)
def test_lists_of_other_toolkits(tmp_path, name):
    file, text, wanted = FORMS[name]
    (tmp_path / "clips").mkdir()
    write(tmp_path / file, text.format(folder=tmp_path))
    for spec in (tmp_path, tmp_path / file):
        clips = read_manifest(spec)
        found = [(clip.path.relative_to(tmp_path).as_posix(), clip.text, clip.domain, clip.speaker) for clip in clips]
        assert found == wanted


def test_a_caption_table_takes_paths_where_stems_repeat(tmp_path):
    write(tmp_path / "captions.csv", "file_name,caption,split\none/x.wav,a dog,a\ntwo/x.wav,a cat,b\n")
    write(tmp_path / "one/x.wav", "")
    write(tmp_path / "two/x.wav", "")
    clips = read_manifest(tmp_path)
    assert [(clip.path.parent.name, clip.text) for clip in clips] == [("one", "a dog"), ("two", "a cat")]


def test_ljspeech_lists_where_the_user_says_so(tmp_path):
    write(tmp_path / "metadata.csv", 'LJ001-0001|"Dr. X," he said|"Doctor X," he said\nsub/b.flac|1|one\nc.wav|2|two\n')
    for spec in (f"ljspeech:{tmp_path}", f"ljspeech:{tmp_path}/metadata.csv"):
        clips = read_manifest(spec)
        assert [clip.path.relative_to(tmp_path).as_posix() for clip in clips] == [
            "wavs/LJ001-0001.wav",
            "sub/b.flac",
            "c.wav",
        ]
        assert [clip.text for clip in clips] == ['"Doctor X," he said', "one", "two"]
        assert clips[1].source == "metadata.csv:2"
    write(tmp_path / "two.csv", "a|hello\n\nb|x|y\n")
    with pytest.raises(UserError, match=r"two\.csv:3: expected 2 cells .*got 3"):
        read_manifest(f"ljspeech:{tmp_path}/two.csv")
    write(tmp_path / "one.csv", "hello\n")
    with pytest.raises(UserError, match=r"one\.csv:1: expected 2 or 3 cells"):
        read_manifest(f"ljspeech:{tmp_path}/one.csv")
    write(tmp_path / "up.csv", "../a.wav|hello\n")
    with pytest.raises(UserError, match=r"up\.csv:1: \.\./a\.wav leaves"):
        read_manifest(f"ljspeech:{tmp_path}/up.csv")


def test_tables_without_quoting_where_the_user_says_so(tmp_path):
    path = write(tmp_path / "train.tsv", 'path\tsentence\nx.mp3\t"Well," he said\n')
    [clip] = read_manifest(f"unquoted:{path}")
    assert clip.text == '"Well," he said'
    with pytest.raises(UserError, match=r"train\.tsv:2: .*unquoted:PATH"):
        read_manifest(path)


def test_absolute_paths_inside_the_folder_by_any_name_of_it(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for name in ("real", "link"):
        write(
            tmp_path / "real/list.csv", f"audio_file|text|tokens\n{tmp_path}/{name}/a.wav|x|{tmp_path}/{name}/a.npy\n"
        )
        for spec in ("real/list.csv", "link/list.csv", tmp_path / "link/list.csv"):
            [clip] = read_manifest(spec)
            assert str(clip.path) == f"{tmp_path}/{name}/a.wav"
    for outside in (f"{tmp_path}/a.wav", f"{tmp_path}/real/../a.wav", f"{tmp_path}/reals/a.wav"):
        write(tmp_path / "real/list.csv", f"audio_file|text\n{outside}|x\n")
        with pytest.raises(UserError, match=r"list\.csv:2: .* leaves the manifest's folder"):
            read_manifest("real/list.csv")


@given(st.binary(max_size=60), st.sampled_from(["a.csv", "a.jsonl", "a.trans.txt"]), st.booleans())
def test_any_bytes_are_clips_or_one_line(tmp_path_factory, data, name, header):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(b"audio_file|text\n" * header + data)
    for prefix in ("", "ljspeech:", "unquoted:"):
        refusal = ""
        try:
            assert read_manifest(f"{prefix}{path}")
        except UserError as error:
            refusal = str(error)
        assert len(refusal.splitlines()) <= 1
