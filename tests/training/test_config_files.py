"""Configuration files: what YAML can do to a program ends in one line, quickly."""

from __future__ import annotations

import os

import pytest

from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.training.config import DataConfig, OptimizerConfig, TrainConfig, load_config

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh")
)


@pytest.mark.parametrize(
    "content, message",
    [
        ("train:\n  steps: 3\n  steps: 4\n", "run.yaml:3: the key 'steps' occurs twice"),
        ("train: {}\ndata: {}\ntrain: {}\n", "run.yaml:3: the key 'train' occurs twice"),
        (BOMB, "run.yaml:1: too many values"),
        ("train: &t\n  steps: *t\n", "run.yaml:2: nested too deeply"),
        ("[" * 100_000, "run.yaml:1: nested too deeply"),
        ("".join(" " * i + "a:\n" for i in range(300)), "run.yaml:21: nested too deeply"),
        ("train: {steps: " + "9" * 5000 + "}", r"run.yaml: train.steps: expected int, got 999.*\.\.\."),
        ("preset: [demo]", r"run.yaml: preset: unknown name \['demo'\]"),
        ("preset:\n", "run.yaml: preset: unknown name null"),
        ("train:\n", "run.yaml: train: expected fields of TrainConfig, got null"),
        ("- train\n", "run.yaml: expected sections"),
        ("hello", "run.yaml: expected sections"),
        ("", "run.yaml: expected sections"),
        ("? [a]\n: b\n", "run.yaml:1: a key must be a name"),
        ("1: 2\n", "run.yaml: 1: unknown name '1'"),
        ("train:\n\tsteps: 3\n", "run.yaml:2: not YAML"),
        ("train: {name: 'a\\0b'}".replace("'", '"'), "run.yaml: train.name: expected at most"),
        ("train: !!python/object/apply:os.system [x]", "run.yaml:1: the tag .* is not read"),
        (b"\n\xe9: 1", "run.yaml:2: not UTF-8"),
        (b"#" * 300_000, "run.yaml: larger than"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_files_that_are_refused(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_only_regular_files_are_read(capsys, tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in ("/dev/zero", "/dev/null", str(tmp_path), str(tmp_path / "fifo.yaml")):
        assert main(["train", path]) == 2
        assert capsys.readouterr().err == f"agrepa: error: {path}: not a regular file\n"
    assert main(["train", "a\0.yaml"]) == 2


@pytest.mark.parametrize(
    "text", ["2024-12-13", "2024-13-45", "no", "on", "007", "1e5", "0x1f", "12:30:45", "true", "日本"]
)
def test_text_stays_what_it_was(tmp_path, text):
    assert load_config("demo", [f"train.name={text}"]).train.name == text
    (tmp_path / "a.yaml").write_text(f"preset: demo\ntrain: {{name: {text}}}\n", encoding="utf-8")
    assert load_config(tmp_path / "a.yaml").train.name == text


def test_merge_keys_and_aliases_work(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "preset: demo\ndata: {train: &m [a.csv], valid: *m}\ntrain:\n  <<: {seed: 3, keep: 1}\n  keep: 4\n"
    )
    config = load_config(tmp_path / "a.yaml")
    assert config.data.train == config.data.valid == ("a.csv",)
    assert (config.train.seed, config.train.keep) == (3, 4)


def test_the_order_of_changes_does_not_matter():
    changes = ["model.width=48", "model.heads=6", "probe.start=4", "train.steps=20"]
    assert load_config("demo", changes) == load_config("demo", changes[::-1])


def test_one_teacher_is_changed_and_the_others_stay():
    config = load_config("demo", ["alignment.teachers={a: {}, b: {}}", "alignment.teachers.b.options.layer=3"])
    assert list(config.alignment.teachers) == ["a", "b"]
    assert config.alignment.teachers["b"].options == {"layer": 3}


def test_sections_made_in_python_are_converted_and_checked():
    assert DataConfig(train=["a.csv"]).train == ("a.csv",)
    assert type(OptimizerConfig(lr=1).lr) is float
    with pytest.raises(UserError, match=r"^train.steps: expected int, got '3'"):
        TrainConfig(steps="3")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["data.prompt_share=[0.9,0.1]"], r"data.prompt_share: expected \[low, high\]"),
        (["data.max_seconds=0.04"], "data.max_seconds: expected at least 0.048"),
        (["data.max_seconds=3600"], "data.max_seconds: expected at most 262.144"),
        (["data.vocabularies={a: [3], b: [3, 4]}"], "data.vocabularies: expected the same number of streams"),
        (["data.vocabularies={a: [5, 3], b: [5, 4]}"], "data.vocabularies: expected one size of the second stream"),
        (["data.vocabularies={type: [256]}"], "data.vocabularies: expected a name"),
        (["data.vocabulary_of={speech: nope}"], "data.vocabulary_of.speech: expected one of data.vocabularies"),
        (["model.heads=7"], r"model.width: expected a multiple of model.heads \(7\), got 128"),
        (["model.width=16384", "model.depth=512"], "model.depth, model.width, .* parameters"),
        (["alignment.teachers={../../x: {cached: true}}"], "alignment.teachers: expected a name"),
        (["alignment.teachers={x: {options: {source: 3}}}"], "alignment.teachers.x.options: expected names"),
        (["alignment.teachers={x: {options: {a: [1]}}}"], "alignment.teachers.x.options.a: expected str or int"),
        (["alignment.bitc_weights={nobody: 1}"], "alignment.bitc_weights: expected names of alignment.teachers"),
        (["alignment.head=conv"], "alignment.head: expected alignment.pool null"),
        (["alignment.weight=-3"], "alignment.weight: expected at least 0"),
        (["alignment.weight=.nan"], "alignment.weight: expected a finite number, got .nan"),
        (["optimizer.clip=0"], "optimizer.clip: expected more than 0"),
        (["train.device=mps"], "train.device: expected auto, cpu, cuda or cuda:N, got 'mps'"),
        (["train.name=../../x"], "train.name: expected the name of one folder"),
        (["train.name=' '"], "train.name: expected the name of one folder"),
        (["=x"], "'=x': expected section.field=value"),
        ([".=x"], "'.=x': expected section.field=value"),
    ],
)
def test_values_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        load_config("demo", changes)


@pytest.mark.parametrize(
    "change",
    [
        "data.frames_per_batch=1",
        "data.buckets=256",
        "data.max_seconds=0.05",
        "data.prompt_share=[0.999,0.999]",
        "mel.hop_length=512",
        "optimizer.weight_decay=1000",
        "train.device=cuda:99",
    ],
)
def test_edges_train_or_are_refused(tiny, change):
    fixed = ("alignment.layers=[0,1]", "train.steps=1", "train.samples=1")
    assert main(["train", "demo", *tiny(*fixed, change)]) == (2 if change == "train.device=cuda:99" else 0)
