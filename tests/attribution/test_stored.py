"""What layers store: the ridge head and CKA against numpy, and the dissociation worked out by hand."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.attribution.stored import dissociation, lasp, linear_cka, pooled_hidden

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 14, 6))
TEACHER = RNG.normal(size=(14, 4))
FITTED = np.arange(14) < 9


def cosine(a, b):
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def test_lasp_is_one_ridge_head_for_all_layers_on_held_out_clips():
    centred = HIDDEN - HIDDEN.mean(-1, keepdims=True)
    states = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    goal = TEACHER / np.linalg.norm(TEACHER, axis=1, keepdims=True)
    x, y = states[:, FITTED].reshape(-1, 6), np.tile(goal[FITTED], (3, 1))
    x0, y0 = x - x.mean(0), y - y.mean(0)
    penalty = 1e-2 * np.trace(x0.T @ x0) / 6
    # Ridge as least squares on rows that pull every weight to zero.
    stacked = np.vstack([x0, np.sqrt(penalty) * np.eye(6)])
    weight = np.linalg.lstsq(stacked, np.vstack([y0, np.zeros((6, 4))]), rcond=None)[0]
    expected = cosine((states[:, ~FITTED] - x.mean(0)) @ weight + y.mean(0), goal[~FITTED])
    got = lasp(torch.tensor(HIDDEN), torch.tensor(TEACHER), torch.tensor(FITTED))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_lasp_finds_the_layer_that_holds_the_teacher():
    rng = np.random.default_rng(4)
    hidden = rng.normal(size=(3, 60, 8))
    teacher = hidden[1] @ rng.normal(size=(8, 5))
    fitted = torch.arange(60) < 40
    stored = lasp(torch.tensor(hidden), torch.tensor(teacher), fitted).mean(1)
    assert stored.argmax() == 1
    assert stored[1] > 0.5 > stored[[0, 2]].max()


def test_cka_by_its_definition_and_its_invariances():
    expected = []
    for x in HIDDEN:
        a, b = x - x.mean(0), TEACHER - TEACHER.mean(0)
        expected.append(((a.T @ b) ** 2).sum() / np.sqrt(((a.T @ a) ** 2).sum() * ((b.T @ b) ** 2).sum()))
    teacher = torch.tensor(TEACHER)
    np.testing.assert_allclose(linear_cka(torch.tensor(HIDDEN), teacher), expected, rtol=1e-10)
    rotation = torch.linalg.qr(teacher[:4]).Q
    assert linear_cka((3 * teacher @ rotation + 1).unsqueeze(0), teacher).item() == pytest.approx(1)


def test_pooled_hidden_states_are_means_over_valid_frames(build, draw):
    model, inputs = build(dropout=0.5).train(), draw()
    pooled = pooled_hidden(model, inputs)
    assert model.training
    with torch.no_grad():
        _, hidden = model.eval()(**inputs, hidden_layers=[0, 1, 2])
    for layer in range(3):
        for n in range(3):
            mean = hidden[layer][n][inputs["mask"][n]].mean(0)
            torch.testing.assert_close(pooled[layer, n], mean, rtol=1e-5, atol=1e-6)


def test_dissociation_by_hand(tmp_path):
    used = LayerScores((0, 1, 2, 3), torch.tensor([[4.0, 4.2], [3.0, 3.1], [2.0, 2.1], [1.0, 1.1]]).double())
    stored = torch.tensor([[0.1, 0.1], [0.4, 0.4], [0.2, 0.2], [0.8, 0.8]])
    result = dissociation(used, stored, k=2)
    assert (result.most_used, result.most_stored, result.overlap) == ((0, 1), (3, 1), 0.5)
    # Ranks 4 3 2 1 against 1 3 2 4: rho = 1 - 6 (9 + 0 + 0 + 9) / 60; of six pairs one agrees (layers 1 and 2).
    assert result.spearman == pytest.approx(-0.8)
    assert result.kendall == pytest.approx(-4 / 6)
    assert (result.low, result.high) == (pytest.approx(-0.8), pytest.approx(-0.8))  # no resample changes a rank
    result.to_csv(tmp_path / "scd.csv")
    with open(tmp_path / "scd.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1", "2", "3"]
    assert [(row["most_used"], row["most_stored"]) for row in rows] == [("1", "0"), ("1", "1"), ("0", "0"), ("0", "1")]
    assert [float(row["foga"]) for row in rows] == pytest.approx([4.1, 3.05, 2.05, 1.05])
    assert [float(row["lasp"]) for row in rows] == pytest.approx([0.1, 0.4, 0.2, 0.8])


def test_the_interval_widens_with_the_noise():
    rng = np.random.default_rng(3)
    level = np.arange(6)[:, None]
    used = LayerScores(tuple(range(6)), torch.tensor(level + rng.normal(0, 2, (6, 8))))
    noisy = dissociation(used, torch.tensor(level + rng.normal(0, 2, (6, 8))), k=2)
    assert noisy.low < noisy.spearman - 0.05
    assert noisy.high > noisy.low + 0.2


def test_bad_input_is_named():
    hidden, teacher = torch.tensor(HIDDEN), torch.tensor(TEACHER)
    with pytest.raises(ValueError, match=r"hidden \[layers, clips, width\] .* got \[3, 14, 6\] and \[13, 4\]"):
        linear_cka(hidden, teacher[:13])
    with pytest.raises(ValueError, match="at least 2 clips to fit on and 1 held out, got 14"):
        lasp(hidden, teacher, torch.ones(14, dtype=torch.bool))
    with pytest.raises(ValueError, match="fitted: expected bool"):
        lasp(hidden, teacher, torch.ones(14))
    scores = LayerScores((0, 1), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"stored: expected \[2, clips\], got \[3, 3\]"):
        dissociation(scores, torch.ones(3, 3))
    with pytest.raises(ValueError, match="k: expected 1 to 2 layers, got 3"):
        dissociation(scores, torch.ones(2, 3))
    with pytest.raises(ValueError, match="got branches"):
        dissociation(LayerScores((0, 0), torch.ones(2, 3), branches=("attn", "ff")), torch.ones(2, 3), 1)
