"""The FoG-A pictures show the numbers of the scores: means, errors, maps and marks worked out by hand."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from agrepa_fast.attribution.pictures import ACCENT, layer_t_map, plot_layer_t_map, plot_scores, unit_weight
from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.errors import UserError


@pytest.fixture
def scores() -> LayerScores:
    """Two layers, five samples; t out of order, and not every t in every domain."""
    return LayerScores(
        layers=(0, 1),
        by_sample=torch.tensor([[1.0, 2.0, 3.0, 4.0, 6.0], [0.0, 1.0, 0.0, 0.5, 0.5]], dtype=torch.float64),
        metric="squared",
        t=torch.tensor([0.5, 0.1, 0.5, 0.1, 0.9]),
        domains=("speech", "speech", "audio", "audio", "audio"),
    )


def test_layer_t_map_averages_the_samples_of_each_t(scores):
    values, t_values = layer_t_map(scores)
    assert t_values.tolist() == pytest.approx([0.1, 0.5, 0.9])
    # t=0.1: samples 1 and 3; t=0.5: samples 0 and 2; t=0.9: sample 4
    assert values.tolist() == [[3.0, 2.0, 6.0], [0.75, 0.0, 0.5]]
    assert values.dtype == torch.float64


def test_layer_t_map_of_a_domain_has_only_its_samples_and_times(scores):
    values, t_values = layer_t_map(scores, "speech")
    assert t_values.tolist() == pytest.approx([0.1, 0.5])
    assert values.tolist() == [[2.0, 1.0], [1.0, 0.0]]


def test_layer_t_map_needs_t_and_a_known_domain(scores):
    with pytest.raises(ValueError, match="'music'"):
        layer_t_map(scores, "music")
    without_t = LayerScores(scores.layers, scores.by_sample)
    with pytest.raises(ValueError, match="carry no t"):
        layer_t_map(without_t)
    with pytest.raises(ValueError, match="carry no t"):
        plot_layer_t_map(without_t)


def bars(figure):
    """{legend label: [(centre, height, half length of the error bar)]} of the first axes."""
    result = {}
    for container in figure.axes[0].containers:
        if not hasattr(container, "patches"):
            continue
        (whiskers,) = [c for c in container.errorbar.get_children() if isinstance(c, LineCollection)]
        halves = [(segment[1][1] - segment[0][1]) / 2 for segment in whiskers.get_segments()]
        result[container.get_label()] = [
            (bar.get_x() + bar.get_width() / 2, bar.get_height(), half)
            for bar, half in zip(container.patches, halves, strict=True)
        ]
    return result


def test_bars_are_the_domain_means_with_their_standard_errors(scores):
    drawn = bars(plot_scores(scores))
    assert set(drawn) == {"audio", "speech"}
    (_, first, first_error), (_, second, second_error) = drawn["speech"]
    # layer 0 of speech: 1 and 2, so mean 1.5, deviation sqrt(0.5), error sqrt(0.5 / 2)
    assert (first, first_error) == (pytest.approx(1.5), pytest.approx(0.5))
    assert (second, second_error) == (pytest.approx(0.5), pytest.approx(0.5))
    # layer 0 of audio: 3, 4, 6, so mean 13/3, variance 7/3, error sqrt(7/9)
    assert drawn["audio"][0][1:] == (pytest.approx(13 / 3), pytest.approx((7 / 9) ** 0.5))
    for domain in drawn.values():
        assert [round(centre) for centre, _, _ in domain] == [0, 1]
    assert drawn["audio"][0][0] < drawn["speech"][0][0]


def test_one_domain_draws_the_overall_mean(scores):
    alone = LayerScores(scores.layers, scores.by_sample, t=scores.t)
    (drawn,) = bars(plot_scores(alone)).values()
    assert [height for _, height, _ in drawn] == pytest.approx([3.2, 0.4])
    assert "rms" in plot_scores(alone).axes[0].get_ylabel()


def test_a_single_sample_has_a_bar_without_an_error(scores):
    single = LayerScores((0, 1), torch.tensor([[0.25], [0.75]], dtype=torch.float64))
    (drawn,) = bars(plot_scores(single)).values()
    assert [(height, error) for _, height, error in drawn] == [(0.25, 0.0), (0.75, 0.0)]


def accent_spans(axes):
    return [
        (patch.get_x(), patch.get_x() + patch.get_width())
        for patch in axes.patches
        if to_hex(patch.get_facecolor()) == ACCENT
    ]


def test_selected_layers_are_marked_with_their_weight():
    scores = LayerScores((0, 1, 2), torch.tensor([[3.0, 3.0], [2.0, 2.0], [9.0, 9.0]], dtype=torch.float64))
    axes = plot_scores(scores, SimpleNamespace(layers=(2, 0), weights=(0.75, 0.25))).axes[0]
    spans = accent_spans(axes)
    assert [round((low + high) / 2, 6) for low, high in spans] == [2.0, 0.0]
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {"0.75": 2.0, "0.25": 0.0, "weight": 0.0}
    assert accent_spans(plot_scores(scores).axes[0]) == []


def test_each_teacher_s_layers_are_marked_in_a_row_of_their_own():
    scores = LayerScores((0, 1, 2), torch.tensor([[3.0], [2.0], [9.0]], dtype=torch.float64))
    selection = {
        "$peech": SimpleNamespace(layers=(0, 2), weights=(0.75, 0.25)),
        "audio": SimpleNamespace(layers=(2,), weights=(0.5,)),
    }
    axes = plot_scores(scores, selection).axes[0]
    assert [round((low + high) / 2, 6) for low, high in accent_spans(axes)] == [2.0, 0.0]  # one band for a shared layer
    rows: dict[float, dict] = {}
    for text in axes.texts:
        rows.setdefault(text.xyann[1], {})[text.get_text()] = text.xy[0]
    assert [rows[height] for height in sorted(rows)] == [
        {"0.50": 2.0, "audio": 0.0},
        {"0.75": 0.0, "0.25": 2.0, "$peech": 0.0},
    ]


def test_a_selected_layer_marks_both_its_branches():
    scores = LayerScores((0, 0, 1, 1, 10, 10), torch.rand(6, 3, dtype=torch.float64), branches=("attn", "ff") * 3)
    selection = SimpleNamespace(layers=(1,), weights=(1.0,))
    axes = plot_scores(scores, selection).axes[0]
    ((low, high),) = accent_spans(axes)
    assert 1 < low < 2
    assert 3 < high < 4
    assert [label.get_text() for label in axes.get_xticklabels()][2:4] == ["1.attn", "1.ff"]
    assert [unit_weight(name, selection) for name in scores.names] == [None, None, 1.0, 1.0, None, None]


def test_heat_map_has_one_panel_per_domain_on_one_scale(scores):
    figure = plot_layer_t_map(scores)
    audio, speech, bar = figure.axes
    assert (audio.get_title(), speech.get_title()) == ("audio", "speech")
    assert audio.images[0].get_array().tolist() == [[4.0, 3.0, 6.0], [0.5, 0.0, 0.5]]
    assert speech.images[0].get_array().tolist() == [[2.0, 1.0], [1.0, 0.0]]
    assert audio.images[0].get_clim() == speech.images[0].get_clim() == (0.0, 6.0)
    assert [label.get_text() for label in audio.get_xticklabels()] == ["0.1", "0.5", "0.9"]
    assert "squared" in bar.get_ylabel()


def test_pictures_survive_odd_scores_and_names():
    values = torch.tensor([[1e30, 1.0], [0.0, 0.0]], dtype=torch.float64)
    scores = LayerScores((0, 1), values, t=torch.tensor([0.2, 0.2]), domains=("a$_{", "b<i>"))
    for figure in (plot_scores(scores), plot_layer_t_map(scores)):
        page = io.StringIO()
        figure.savefig(page, format="svg")
        assert "<i>" not in page.getvalue()
    zeros = LayerScores((0,), torch.zeros(1, 2, dtype=torch.float64), t=torch.tensor([0.2, 0.4]))
    low, high = plot_layer_t_map(zeros).axes[0].images[0].get_clim()
    assert low == 0.0 < high


def test_pictures_need_no_pyplot(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now raises ImportError
    plot_scores(scores).savefig(io.BytesIO(), format="png")


def test_without_matplotlib_the_error_names_the_extra(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"agrepa-fast\[train\]"):
        plot_scores(scores)
