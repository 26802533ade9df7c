"""The pictures of a run's page: curves of the log, and what is drawn of an incomplete one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agrepa_fast.report import write_report
from agrepa_fast.report.curves import TRAIN, moving_mean, plot_cosines, plot_losses
from agrepa_fast.report.log import current_timeline, keys_under, series

from .pages import Page, entries


def curves(figure):
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


def test_loss_curves_hold_the_logged_points():
    drawn = curves(plot_losses(entries()))
    assert drawn["train"].get_xdata().tolist() == [0, 10, 20, 30]
    assert drawn["train"].get_ydata().tolist() == pytest.approx([2.0, 1.9, 1.8, 1.7])
    assert drawn["valid"].get_ydata().tolist() == [1.7654, 0.4321]
    assert drawn["valid, speech"].get_ydata().tolist() == [1.5, 0.3]
    assert drawn["probes"].get_xdata().tolist() == [20, 30]


def test_first_probe_and_alignment_are_marked_where_they_happen():
    log = [{"event": "train", "step": s, "flow_loss": 1.0, "align_weight": float(20 <= s < 40)} for s in range(60)]
    log += [{"event": "probe", "step": 20}, {"event": "probe", "step": 30}]
    axes = plot_losses(log).axes[0]
    marks = {text.get_text(): text.xy[0] for text in axes.texts}
    assert marks == {"first probe / alignment starts": 20, "alignment stops": 40}
    vertical = [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 1]]
    assert [list(x) for x in vertical] == [[20, 20], [40, 40]]


def test_a_long_curve_is_smoothed_over_its_raw_points():
    values = np.random.default_rng(0).normal(1.0, 0.1, 200)
    log = [{"event": "train", "step": i, "flow_loss": v} for i, v in enumerate(values.tolist())]
    raw, smooth = (line for line in plot_losses(log).axes[0].lines if line.get_color() == TRAIN)
    assert raw.get_ydata().tolist() == values.tolist()
    assert smooth.get_label() == "train, mean over 11 entries"
    assert smooth.get_ydata()[100] == pytest.approx(values[95:106].mean())


def test_an_early_spike_does_not_flatten_the_curve():
    log = [{"event": "train", "step": i, "flow_loss": 900.0 if i == 1 else 1.0} for i in range(400)]
    bottom, top = plot_losses(log).axes[0].get_ylim()
    assert bottom < 1.0 < top < 100.0


def test_moving_mean_is_the_centred_mean():
    values = np.random.default_rng(1).normal(size=23)
    expected = [values[max(0, i - 3) : i + 4].mean() for i in range(23)]
    np.testing.assert_allclose(moving_mean(values, 7), expected, rtol=0, atol=1e-13)
    assert moving_mean(values, 1) == pytest.approx(values)


def test_cosine_curves_one_colour_per_teacher_and_layer():
    log = [
        {"event": "train", "step": 1, "cosine/whisper/large/2": 0.25, "cosine/whisper/large/10": 0.5},
        {"event": "valid", "step": 1, "cosine/whisper/large/2": 0.2, "cosine/beats/2": 0.75},
    ]
    figure = plot_cosines(log)
    drawn = curves(figure)
    values = {label: line.get_ydata().tolist() for label, line in drawn.items()}
    assert values == {
        "beats · layer 2": [0.75],
        "whisper/large · layer 2": [0.25],
        "whisper/large · layer 10": [0.5],
    }
    assert len({line.get_color() for line in drawn.values()}) == 3
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sorted(line.get_ydata()[0] for line in points) == [0.2, 0.75]
    (valid,) = (line for line in points if line.get_ydata()[0] == 0.2)
    assert valid.get_color() == drawn["whisper/large · layer 2"].get_color()


def test_another_objective_is_called_by_its_name(tmp_path):
    """BiT-C's cosine stands beside it."""
    log = [
        {"event": "valid", "step": 1, "relation/voice/3": 0.25, "cosine/voice/tokens": 0.125},
        {"event": "valid", "step": 2, "relation/voice/3": 0.5, "cosine/voice/tokens": 0.375},
    ]
    figure = plot_cosines(log)
    assert {name: line.get_ydata().tolist() for name, line in curves(figure).items()} == {
        "relation/voice · layer 3": [0.25, 0.5],
        "voice · layer tokens": [0.125, 0.375],
    }
    assert figure.axes[0].get_ylabel().startswith("similarity (relation)")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    found = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert found.rows["cosine"] == [
        ["teacher", "layer", "measured in", "first", "last"],
        ["voice", "tokens", "valid", "0.1250", "0.3750"],
        ["relation/voice", "3", "valid", "0.2500", "0.5000"],
    ]
    assert "0.1875 → 0.4375" in found.sections["summary"]


def test_series_leaves_out_what_is_no_finite_number():
    log = [
        {"event": "train", "step": 1, "x": 1.0},
        {"event": "train", "step": 2, "x": float("inf")},
        {"event": "train", "step": 3, "x": None},
        {"event": "train", "step": 4, "x": True},
        {"event": "train", "x": 5.0},
        {"event": "valid", "step": 6, "x": 6.0},
        {"event": "train", "step": 7, "x": 7},
    ]
    steps, values = series(log, "train", "x")
    assert (steps.tolist(), values.tolist()) == ([1.0, 7.0], [1.0, 7.0])


def test_timeline_keeps_what_a_resume_does_not_replace():
    log = [{"step": 1}, {"step": 5}, {"path": "x"}, {"step": 9}, {"event": "resume", "step": 5}, {"step": 6}]
    assert current_timeline(log) == [log[0], log[1], log[2], log[4], log[5]]


def test_keys_sort_by_layer_number():
    log = [{"event": "train", "cosine/s/10": 1, "cosine/s/9": 1, "cosine/a/11": 1, "cosine/": 1, "other": 1}]
    assert keys_under(log, "cosine/") == ["cosine/a/11", "cosine/s/9", "cosine/s/10"]


def test_pictures_of_an_empty_log_are_empty_not_broken():
    assert curves(plot_losses([])) == {}
    assert curves(plot_cosines([])) == {}
