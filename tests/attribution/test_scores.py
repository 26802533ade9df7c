"""LayerScores: statistics against numpy, subsets, the floor, and what its files keep and refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from agrepa_fast.attribution.files import read_scores
from agrepa_fast.attribution.scores import LayerScores, normalised_change
from agrepa_fast.errors import UserError

VALUES = np.random.default_rng(0).uniform(0.1, 2, (3, 6))
T = [0.1, 0.1, 0.1, 0.7, 0.7, 0.7]
DOMAINS = ("speech", "audio", "speech") * 2


def scores(branches=None, layers=(0, 4, 7), floor=None) -> LayerScores:
    """Three clips at two t, t-major."""
    values = torch.tensor(VALUES)
    return LayerScores(layers, values, "rms", branches, floor, torch.tensor(T), DOMAINS, 42.0)


def test_normalised_change_as_the_formulas_say():
    change, energy = VALUES[:, :4], np.array([1e-9, 0.5, 3.0, 40.0])
    rms = normalised_change(torch.tensor(change), torch.tensor(energy), "rms")
    np.testing.assert_allclose(rms, np.sqrt(change + 1e-8) / (np.sqrt(energy + 1e-8) + 1e-8), rtol=1e-14)
    squared = normalised_change(torch.tensor(change), torch.tensor(energy), "squared")
    np.testing.assert_allclose(squared, change / (energy + 1e-8), rtol=1e-14)


@pytest.mark.parametrize("metric", ["rms", "squared"])
def test_normalised_change_of_no_velocity_is_zero(metric):
    score = normalised_change(torch.tensor([[0.0, 1.0]]), torch.tensor([0.0, 1.0]), metric)
    assert score[0, 0] == 0
    assert score[0, 1] == pytest.approx(1, rel=1e-6)


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"metric: expected one of .* got 'l1'"):
        normalised_change(torch.ones(1, 1), torch.ones(1), "l1")


def test_mean_and_standard_error():
    np.testing.assert_allclose(scores().mean, VALUES.mean(1), rtol=1e-14)
    np.testing.assert_allclose(scores().stderr, VALUES.std(1, ddof=1) / np.sqrt(6), rtol=1e-14)
    # At one t the samples are the clips alone.
    np.testing.assert_allclose(scores().at(0.7).stderr, VALUES[:, 3:].std(1, ddof=1) / np.sqrt(3), rtol=1e-14)


def test_standard_error_of_a_clip_seen_at_several_t_counts_its_samples_as_independent():
    """As documented: a clip repeated over a grid without any influence of t shrinks the error by its copies."""
    clips = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    alone = LayerScores((0,), clips)
    over_grid = LayerScores((0,), clips.repeat(1, 4), t=torch.tensor([0.2, 0.4, 0.6, 0.8]).repeat_interleave(3))
    assert alone.stderr.item() == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert over_grid.stderr.item() == pytest.approx(np.std([1, 2, 4] * 4, ddof=1) / np.sqrt(12))


def test_standard_error_over_clips():
    """A clip's samples are averaged first: a clip repeated over a grid is still one clip."""
    clips = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    over_grid = LayerScores((0,), clips.repeat(1, 4), clips=(7, 3, 5) * 4)
    assert over_grid.stderr.item() == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    by_clip = VALUES.reshape(3, 2, 3).mean(1)  # t-major: clip c is at columns c and c + 3
    expected = by_clip.std(1, ddof=1) / np.sqrt(3)
    whole = LayerScores((0, 4, 7), torch.tensor(VALUES), clips=(0, 1, 2) * 2, domains=DOMAINS)
    np.testing.assert_allclose(whole.stderr, expected, rtol=1e-14)
    assert whole.domain("speech").clips == (0, 2, 0, 2)


def test_clips_survive_files(tmp_path):
    whole = LayerScores((0, 4, 7), torch.tensor(VALUES), clips=(0, 1, 2) * 2)
    whole.to_csv(tmp_path / "foga.csv")
    assert read_scores(tmp_path / "foga.csv").clips == whole.clips
    assert LayerScores.from_state(whole.state()).clips == whole.clips
    with pytest.raises(ValueError, match="clips: expected 6 ids, got 5"):
        LayerScores((0, 4, 7), torch.tensor(VALUES), clips=(0,) * 5)


def test_standard_error_of_one_sample_is_unknown():
    alone = LayerScores((0, 1), torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    assert alone.stderr.isnan().all()
    assert "nan" in alone.table()


def test_subsets_by_domain_and_t():
    speech = scores().domain("speech")
    np.testing.assert_array_equal(speech.by_sample, VALUES[:, [0, 2, 3, 5]])
    assert speech.t.tolist() == pytest.approx([0.1, 0.1, 0.7, 0.7])
    assert speech.domains == ("speech",) * 4
    both = scores().at(0.7).by_domain()
    assert list(both) == ["audio", "speech"]
    np.testing.assert_array_equal(both["audio"].by_sample, VALUES[:, [4]])
    assert LayerScores((0,), torch.ones(1, 2)).by_domain() == {}


def test_subsets_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"expected one of \['audio', 'speech'\], got 'music'"):
        scores().domain("music")
    with pytest.raises(ValueError, match=r"no sample at 0\.5, only at 0\.1, 0\.7"):
        scores().at(0.5)
    with pytest.raises(ValueError, match="t is not known"):
        LayerScores((0,), torch.ones(1, 2)).at(0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": (0, 1)}, "3 rows for 2 layers"),
        ({"branches": ("attn",)}, "3 rows"),
        ({"t": torch.zeros(5)}, r"t: expected \[6\], got \[5\]"),
        ({"floor_by_sample": torch.zeros(1)}, r"floor_by_sample: expected \[6\]"),
        ({"domains": ("a",)}, "domains: expected 6 names, got 1"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LayerScores(**{"layers": (0, 4, 7), "by_sample": torch.tensor(VALUES), **change})


def test_the_floor_follows_the_samples():
    """A unit without effect gets 1e-4 / |v|: quiet samples have a higher floor, and a domain its own."""
    energy = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    change = torch.tensor([[0.0, 0.0], [1e-6, 1e-6]], dtype=torch.float64)
    dead_and_alive = LayerScores(
        (0, 1),
        normalised_change(change, energy, "rms"),
        floor_by_sample=normalised_change(torch.zeros(2), energy, "rms"),
        domains=("loud", "quiet"),
    )
    assert dead_and_alive.floor == pytest.approx((1e-4 + 1e-2) / 2, rel=1e-3)
    assert dead_and_alive.domain("loud").floor == pytest.approx(1e-4, rel=1e-3)
    assert dead_and_alive.domain("quiet").floor == pytest.approx(1e-2, rel=1e-3)
    for part in (dead_and_alive, *dead_and_alive.by_domain().values()):
        assert part.above_floor.tolist() == [False, True]


def test_table_is_sorted_and_aligned():
    values = torch.tensor([[1.0, 3.0], [5.0, 5.0], [5.0, 5.0], [0.5, 0.5]], dtype=torch.float64)
    domains = ("speech", "environmental sound")
    table = LayerScores((0, 1, 2, 3), values, domains=domains).table().splitlines()
    assert [line.split()[0] for line in table] == ["layer", "1", "2", "0", "3"]  # ties in order of layer
    assert table[3].split() == ["0", "2.0000", "1.0000", "3.0000", "1.0000"]
    assert len({len(line) for line in table}) == 1
    assert table[0].endswith("stderr environmental sound    speech")
    assert table[0].index("mean") + 4 == table[1].index("5.0000") + 6


@pytest.mark.parametrize("branches", [None, ("attn", "attn", "ff")])
@pytest.mark.parametrize("known", [True, False])
def test_csv_round_trip(tmp_path, branches, known):
    written = scores(branches)
    if not known:
        written = LayerScores(written.layers, written.by_sample, branches=branches)
    written.to_csv(tmp_path / "foga.csv")
    read = read_scores(tmp_path / "foga.csv")
    assert read.by_sample.equal(written.by_sample)  # to the last bit
    assert read.names == written.names
    assert read.domains == written.domains
    assert (read.t is None) == (not known)
    assert read.t is None or read.t.equal(written.t)


def test_csv_keeps_names_with_commas_and_accents(tmp_path):
    written = LayerScores((0,), torch.ones(1, 2, dtype=torch.float64), domains=('rain, "wind"', "parole française"))
    written.to_csv(tmp_path / "foga.csv")
    assert read_scores(tmp_path / "foga.csv").domains == written.domains


@pytest.mark.parametrize("branches", [None, ("attn", "attn", "ff")])
def test_state_round_trip_through_json(tmp_path, branches):
    written = scores(branches, floor=torch.tensor(VALUES[0] * 1e-4))
    written.to_json(tmp_path / "foga.json")
    state = json.loads((tmp_path / "foga.json").read_text(encoding="utf-8"))
    assert state["mean"] == pytest.approx(VALUES.mean(1).tolist())
    assert state["floor"] == pytest.approx(VALUES[0].mean() * 1e-4)
    read = LayerScores.from_state(state)
    assert read.by_sample.equal(written.by_sample)
    assert read.t.equal(written.t)
    assert read.floor_by_sample.equal(written.floor_by_sample)
    for name in ("layers", "branches", "metric", "floor", "domains", "block_evaluations"):
        assert getattr(read, name) == getattr(written, name), name


def test_state_of_bare_scores(tmp_path):
    bare = LayerScores.from_state(LayerScores((3,), torch.ones(1, 2, dtype=torch.float64), "squared").state())
    assert (bare.t, bare.domains, bare.branches, bare.floor, bare.metric) == (None, None, None, 0.0, "squared")


HEADER = "layer,branch,sample,t,domain,score\n"


@pytest.mark.parametrize(
    "text, where",
    [
        ("layer,score\n0,1\n", ":1: expected the columns layer,branch,sample,t,domain,score"),
        ("", ":1: expected the columns"),
        (HEADER, ": expected a score"),
        (HEADER + "0,,0,0.5,a,1\n0,,1,0.5,a,high\n", ":3: could not convert string to float: 'high'"),
        (HEADER + "first,,0,0.5,a,1\n", ":2: invalid literal for int.*'first'"),
        (HEADER + "0,,0,early,a,1\n", ":2: could not convert .*'early'"),
        (HEADER + "0,,0,0.5,a\n", ":2: expected 6 fields"),
        (HEADER + "0,,0,0.5,a,1,9\n", ":2: expected 6 fields"),
        (HEADER + "-1,,0,0.5,a,1\n", ":2: expected a 0-based layer, got -1"),
        (HEADER + "0,,0,0.5,a,nan\n", ":2: the score is not finite: nan"),
        (HEADER + "0,,0,0.5,a,1\n0,,0,0.5,a,2\n", ":3: a second score of sample 0 for layer 0"),
        (HEADER + "0,,0,0.5,a,1\n1,,0,0.6,a,2\n", ":3: sample 0 has another t, domain, clip or noise"),
        (HEADER + "0,,0,0.5,a,1\n1,,0,0.5,b,2\n", ":3: sample 0 has another t, domain, clip or noise"),
        (HEADER + "0,,0,0.5,a,1\n0,,1,0.5,a,1\n1,,0,0.5,a,1\n", ": expected a score for each of the 2 samples"),
        (HEADER + "0,,0,0.5,a,1\n1,ff,0,0.5,a,1\n", ": expected a branch in every row or in none"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(tmp_path, text, where):
    path = tmp_path / "foga.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"foga.csv{where}") as caught:
        read_scores(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_csv_are_named(tmp_path):
    (tmp_path / "foga.csv").write_bytes(HEADER.encode() + b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"foga\.csv: not a CSV file in UTF-8"):
        read_scores(tmp_path / "foga.csv")
    with pytest.raises(UserError, match=r"nothing\.csv: No such file"):
        read_scores(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="Is a directory"):
        read_scores(tmp_path)
