"""Configuration: presets, YAML, dotted changes."""

from __future__ import annotations

import re
import sys

import pytest

from agrepa_fast.errors import UserError
from agrepa_fast.fields import Plain
from agrepa_fast.models.dit import DiTConfig
from agrepa_fast.training.config import RUN_PRESETS, dump_config, load_config, parse


@pytest.mark.parametrize("name", sorted(RUN_PRESETS))
def test_what_is_dumped_is_read_back(name, tmp_path):
    config = load_config(name)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize("name", sorted(RUN_PRESETS))
def test_presets_hold_the_network_of_their_name(name):
    assert load_config(name).dit == DiTConfig.preset(name, max_frames=load_config(name).dit.max_frames)


def test_one_word_is_read_as_yaml_reads_it(monkeypatch):
    """Most changes on the command line; they need no PyYAML, which a machine for measuring may lack."""
    words = ["3", "-0.5", ".5", "+1e-3", "null", "yes", "2020-01-01", "a.b-c+d", "0x1F", "1_000", "sha256", "007"]
    short = [parse.parse(word, "key", is_file=False) for word in words]
    monkeypatch.setattr(parse, "_WORD", re.compile("(?!)"))  # fits nothing
    assert [parse.parse(word, "key", is_file=False) for word in words] == short
    assert {type(value) for value in short} == {Plain}
    monkeypatch.undo()
    for text in ("- 1", "-", "[a,b]", "{a: b}", "'a'", "a b", "a#b", "a: b", "...", "~", "*a", "é", "a\n", ""):
        assert parse._WORD.fullmatch(text) is None
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert load_config("demo", ["model.width=16", "optimizer.lr=1e-3"]).model.width == 16
    with pytest.raises(UserError, match="PyYAML is not installed"):
        load_config("demo", ["data.train=[a]"])


def test_changes_by_dots_and_by_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: small\ntrain: {steps: 7000}\noptimizer: {lr: 1e-3}\n")
    config = load_config(tmp_path / "mine.yaml", ["data.train=[a.csv,b]", "alignment.pool=null", "flow.sway=-0.5"])
    assert (config.train.steps, config.optimizer.lr, config.train.name) == (7000, 1e-3, "mine")
    assert config.data.train == ("a.csv", "b")
    assert config.alignment.pool is None
    assert config.flow.sway == -0.5
    assert config.model == RUN_PRESETS["small"].model


def test_teachers_are_replaced_as_a_whole():
    config = load_config("demo", ["alignment.teachers={speech: {source: some/model, options: {layer: 12}}}"])
    assert list(config.alignment.teachers) == ["speech"]
    assert config.alignment.teachers["speech"].options == {"layer": 12}


def test_buckets_cover_the_longest_crop():
    config = load_config("demo", ["data.max_seconds=2.0", "data.buckets=4"])
    assert config.bucket_frames == (32, 63, 94, 125)
    assert config.bucket_frames[-1] == int(2.0 * 16000 / 256)


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.depth=true", "model.depth: expected int, got true"),
        ("train.tensorboard=1", "train.tensorboard: expected bool, got 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected 2 values"),
        ("optimizer.lr=fast", "optimizer.lr: expected float, got 'fast'"),
        ("mel.f_max=9000", "mel.f_min, mel.f_max: .*9000"),
        ("train=3", "train: expected fields of TrainConfig, got 3"),
        ("train.steps=[", "train.steps: '\\[' is not a YAML value"),
    ],
)
def test_values_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        load_config("demo", [change])
