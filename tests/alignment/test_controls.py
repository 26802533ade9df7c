"""choose_layers against choices by hand, layer_sensitivity against finite differences, and ranks that agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import agrepa_fast as ag
from agrepa_fast.alignment.policy import POLICIES
from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.errors import UserError

VALUES = [0.3, 0.9, 0.1, 0.9, 0.5, 0.2]
SCORES = LayerScores(tuple(range(6)), torch.tensor(VALUES, dtype=torch.float64).unsqueeze(1))


@pytest.mark.parametrize(
    "policy, given, layers",
    [
        ("fixed", {"layers": (5, 0)}, (0, 5)),
        ("even", {}, (1, 3, 5)),
        ("deepest", {}, (3, 4, 5)),
        ("shallowest", {}, (0, 1, 2)),
        ("stored", {"values": VALUES}, (1, 3, 4)),
        ("gradient-norm", {"values": torch.tensor(VALUES)}, (1, 3, 4)),
        ("first-order", {"values": [-value for value in VALUES]}, (0, 2, 5)),
    ],
)
def test_controls_by_hand(policy, given, layers):
    selection = ag.choose_layers(policy, 6, 3, **given)
    assert selection == ag.LayerSelection(layers, (1 / len(layers),) * len(layers), policy)


def test_even_layers_of_a_deep_model():
    assert ag.choose_layers("even", 24, 3).layers == (4, 12, 20)
    assert ag.choose_layers("even", 5, 5).layers == (0, 1, 2, 3, 4)


def test_random_is_the_seed_s():
    chosen = {ag.choose_layers("random", 24, 3, seed=seed).layers for seed in range(20)}
    assert len(chosen) > 10
    assert ag.choose_layers("random", 24, 3, seed=4) == ag.choose_layers("random", 24, 3, seed=4)
    counts = (
        torch.tensor([ag.choose_layers("random", 6, 3, seed=seed).layers for seed in range(600)]).flatten().bincount()
    )
    assert counts.min() > 240  # 300 expected


def test_foga():
    assert ag.choose_layers("foga", 6, 3, scores=SCORES) == ag.select_layers(SCORES, 3)
    soft = ag.choose_layers("foga-soft", 6, 3, scores=SCORES)
    assert soft.layers == tuple(range(6))
    assert soft.weights == pytest.approx([value / sum(VALUES) for value in VALUES])
    assert soft.method == "foga-soft"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("fog", 6), "policy: expected one of fixed, .*, got 'fog'"),
        (("deepest", 6, 7), "k: expected 1 to 6 layers, got 7"),
        (("stored", 6), "policy 'stored' needs values"),
        (("foga-soft", 6), "policy 'foga-soft' needs scores"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ag.choose_layers(*arguments)


def test_values_and_layers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="values: expected 6 numbers"):
        ag.choose_layers("stored", 6, values=[1.0, 2.0])
    with pytest.raises(UserError, match="values: expected 2 numbers"):
        ag.choose_layers("stored", 2, 1, values=[1.0, float("nan")])
    with pytest.raises(UserError, match=r"layers: expected distinct layers from 0 to 5, got \[6\]"):
        ag.choose_layers("fixed", 6, layers=[6])


def test_sensitivity_against_finite_differences():
    """A residual network with a scale on every block: the first-order score is the loss's slope in that scale."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64) / 3
    x = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)

    def run(scales, nudge=None):
        h, hidden = x.clone().requires_grad_(), []
        start = h
        for layer, (matrix, scale) in enumerate(zip(matrices, scales)):
            h = h + scale * torch.tanh(h @ matrix)
            if nudge is not None and nudge[0] == layer:
                h = h + nudge[1]
            hidden.append(h)
        return h.square().mean(), hidden, start

    norms, first_order = ag.layer_sensitivity(*run([1.0] * 3))
    step = 1e-5
    for layer in range(3):
        high, low = ([1 + sign * step * (other == layer) for other in range(3)] for sign in (1, -1))
        slope = (run(high)[0] - run(low)[0]) / (2 * step)
        assert first_order[layer].item() == pytest.approx(abs(slope.item()), rel=1e-6)
        squares = 0.0
        for index in range(x.numel()):
            unit = torch.zeros(x.numel(), dtype=x.dtype)
            unit[index] = step
            there, back = (run([1.0] * 3, (layer, sign * unit.view_as(x)))[0] for sign in (1, -1))
            squares += ((there - back) / (2 * step)).item() ** 2
        assert norms[layer].item() == pytest.approx(squares**0.5, rel=1e-6)


RANK = """
import sys
import torch
import torch.distributed as distributed
import agrepa_fast as ag
rank, file = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
print(ag.choose_layers("deepest" if rank else "shallowest", 12, 3).synchronised().state())
stop = ag.SimilarityStop(0.5, momentum=0.0)
cosines = [[0.2, float("nan"), 0.9, 0.0], [0.6, 0.3, 0.2, 0.0]][rank]
print([(stop(torch.tensor(cosine)).item(), round(stop.mean.item(), 4)) for cosine in cosines])
distributed.destroy_process_group()
"""


def test_two_ranks_end_with_one_selection_and_stop_together(tmp_path: Path):
    """They choose differently, and rank 0's choice holds; a rank without a sample takes the other's cosine."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, stdout=-1, stderr=-2, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    expected = str(ag.LayerSelection.uniform((0, 1, 2), "shallowest").state())
    for process, output in zip(ranks, outputs):
        assert process.returncode == 0, output
        assert expected in output
        assert "[(1.0, 0.4), (1.0, 0.3), (0.0, 0.55), (0.0, 0.0)]" in output


def test_one_process_keeps_its_own():
    selection = ag.choose_layers("even", 6, 2)
    assert selection.synchronised() is selection
    assert set(POLICIES) >= {
        "fixed",
        "even",
        "random",
        "deepest",
        "shallowest",
        "stored",
        "gradient-norm",
        "first-order",
    }
