"""Inputs at the edge of what can be scored: nothing in them, nothing valid, not finite, of another type."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from agrepa_fast import LayerScores, attribute_layers
from agrepa_fast.attribution.adaptive import adaptive_scores
from agrepa_fast.attribution.gradients import first_order_scores, gradient_norm_scores
from agrepa_fast.attribution.statistics import bootstrap_top_k, rank_stability
from agrepa_fast.attribution.stored import dissociation, lasp, linear_cka, pooled_hidden
from agrepa_fast.models.flow import probe_inputs

PROBES = {
    "attribute_layers": attribute_layers,
    "adaptive_scores": lambda model, inputs: adaptive_scores(model, [inputs]),
    "first_order_scores": first_order_scores,
    "gradient_norm_scores": lambda model, inputs: gradient_norm_scores(
        model, inputs, torch.zeros(inputs["x_t"].shape, dtype=torch.float32)
    ),
    "pooled_hidden": pooled_hidden,
}


def refused(message: str, call: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {name: value[:, :0] if value.dim() > 1 else value for name, value in x.items()}, "at least one fra"),
        (lambda x: {name: value[:0] for name, value in x.items()}, "at least one sample, got a batch of 0"),
        (lambda x: {**x, "mask": torch.zeros_like(x["mask"])}, "mask: sample 0 has no valid frame"),
        (lambda x: {**x, "x_t": x["x_t"].long()}, "x_t: expected a floating dtype, got torch.int64"),
        (lambda x: {**x, "x_t": x["x_t"] + 0j}, "x_t: expected a floating dtype, got torch.complex64"),
        (lambda x: {**x, "t": x["t"] + 0j}, "t: expected a floating dtype, got torch.complex64"),
        (lambda x: {**x, "cond": x["cond"].numpy()}, "cond: expected a tensor .* got ndarray"),
    ],
    ids=["no frames", "no samples", "no valid frame", "integers", "complex", "complex t", "an array"],
)
def test_a_probe_refuses_inputs_without_a_score(build, draw, probe, change, message):
    inputs = change(draw())
    refused(message, lambda: PROBES[probe](build(), inputs))


@pytest.mark.parametrize("probe", sorted(set(PROBES) - {"pooled_hidden"}))
def test_a_velocity_that_is_not_finite_has_no_score(build, draw, probe):
    inputs = draw()
    inputs["x_t"][0, 0] = torch.nan
    refused("sample 0 is not finite", lambda: PROBES[probe](build(), inputs))


class Scale(nn.Module):
    def forward(self, x):
        return x * 1.5


class Model(nn.Module):
    def __init__(self, finish, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Scale() for _ in range(depth))
        self.finish = finish

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return self.finish(x * t[:, None, None])


@pytest.mark.parametrize(
    "finish, message",
    [
        (lambda v: v.long(), "velocity of Model: expected a floating tensor, got torch.int64"),
        (lambda v: v > 0, "velocity of Model: expected a floating tensor, got torch.bool"),
        (lambda v: v + 0j, "velocity of Model: expected a floating tensor, got torch.complex64"),
        (lambda v: None, "Model returns NoneType: expected a tensor"),
        (lambda v: v.numpy(), "Model returns ndarray: expected a tensor"),
        (lambda v: (v, v), "Model returns tuple: expected a tensor"),
        (lambda v: v.sum(), r"at least one value for each sample, got \[\]"),
        (lambda v: v[:, 0, 0], r"at least one value for each sample, got \[1\]"),
        (lambda v: v[:, :0], r"at least one value for each sample, got \[1, 0, 3\]"),
        (lambda v: v * torch.nan, "baseline velocity of sample 0 is not finite"),
    ],
)
def test_an_output_that_is_no_velocity_is_named(finish, message):
    refused(message, lambda: attribute_layers(Model(finish), (torch.ones(2, 4, 3), torch.ones(2))))


@pytest.mark.parametrize(
    "depth, inputs, message",
    [
        (0, (torch.ones(2, 4, 3), torch.ones(2)), "no blocks found in Model"),
        (3, (torch.ones(2, 0, 3), torch.ones(2)), "at least one value for each sample"),
        (3, (torch.ones(0, 4, 3), torch.ones(0)), "at least one sample"),
        (3, (torch.ones(2, 4, 3).long(), torch.ones(2)), "blocks.0: expected a floating residual state, got torch.int"),
        (3, (), "at least one tensor"),
    ],
)
def test_another_model_without_layers_or_samples(depth, inputs, message):
    refused(message, lambda: attribute_layers(Model(lambda v: v, depth), inputs))


HIDDEN, TEACHER, FITTED = torch.randn(3, 8, 4), torch.randn(8, 5), torch.arange(8) % 2 == 0


@pytest.mark.parametrize(
    "hidden, teacher, message",
    [
        (HIDDEN[:0], TEACHER, "hidden: expected at least one of each"),
        (HIDDEN[:, :0], TEACHER[:0], "hidden: expected at least one of each"),
        (HIDDEN[..., :0], TEACHER, "hidden: expected at least one of each"),
        (HIDDEN, TEACHER[:, :0], "teacher: expected at least one of each"),
        (HIDDEN * torch.nan, TEACHER, "hidden: 96 of 96 values are not finite"),
        (HIDDEN, TEACHER / 0, "teacher: 40 of 40 values are not finite"),
        (HIDDEN.long(), TEACHER, "hidden: expected a floating tensor, got torch.int64"),
        (HIDDEN, TEACHER + 0j, "teacher: expected a floating tensor, got torch.complex64"),
        (HIDDEN.numpy(), TEACHER, "hidden: expected a floating tensor"),
    ],
)
def test_stored_features_without_a_similarity(hidden, teacher, message):
    refused(message, lambda: linear_cka(hidden, teacher))
    refused(message, lambda: lasp(hidden, teacher, FITTED))


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_penalty_that_is_none(ridge):
    refused("ridge: expected a finite number", lambda: lasp(HIDDEN, TEACHER, FITTED, ridge))


@pytest.mark.parametrize(
    "by_sample, message",
    [
        (torch.zeros(3, 0), "at least one of each"),
        (torch.zeros(0, 3), "at least one of each"),
        (torch.zeros(3), "at least one of each"),
        (torch.tensor([[1.0], [torch.nan], [1.0]]), "the score of unit 1 and sample 0 is not finite"),
        (torch.ones(3, 4).long(), "by_sample: expected a floating tensor, got torch.int64"),
        ([[1.0]] * 3, "by_sample: expected a floating tensor, got list"),
    ],
)
def test_scores_that_are_none(by_sample, message):
    refused(message, lambda: LayerScores((0, 1, 2), by_sample))


@pytest.mark.parametrize("k, message", [(0, "k: .* got 0"), (4, "k: .* 1 to 3"), (1.5, "k: .* integer"), (None, "k: ")])
def test_a_number_of_layers_that_does_not_fit(build, draw, k, message):
    scores = LayerScores((0, 1, 2), torch.rand(3, 4).double())
    refused(message, lambda: bootstrap_top_k(scores, k))
    refused(message, lambda: rank_stability(scores, scores, k))
    refused(message, lambda: dissociation(scores, torch.rand(3, 4), k))
    refused(message, lambda: adaptive_scores(build(), [draw()], k))


def test_what_is_no_scores_or_seed():
    scores = LayerScores((0, 1, 2), torch.rand(3, 4).double())
    refused("expected LayerScores, got NoneType", lambda: bootstrap_top_k(None))
    refused("expected LayerScores, got dict", lambda: rank_stability(scores, {}))
    refused("seed: ", lambda: bootstrap_top_k(scores, seed=10**30))
    refused("resamples: ", lambda: bootstrap_top_k(scores, resamples=0))


STATE = LayerScores((0, 1), torch.rand(2, 3).double(), t=torch.rand(3), domains=("a",) * 3, clips=(0, 1, 2)).state()
COMPUTED = ("floor", "noise_floor", "mean")  # written for readers of the file; not read back


@pytest.mark.parametrize("name", sorted(set(STATE) - {*COMPUTED}))
def test_a_damaged_state_names_its_entry(name):
    assert LayerScores.from_state(STATE).state() == STATE
    for wrong in ("x", [], {}, [[]], [None], object()):
        if not (name == "metric" and wrong == "x"):
            refused(name, partial(LayerScores.from_state, {**STATE, name: wrong}))
    if name != "noise_by_sample":
        refused(f"{name} is missing", lambda: LayerScores.from_state({k: v for k, v in STATE.items() if k != name}))


@pytest.mark.parametrize("grid", [[], [float("nan")], [-0.1], [1.5]])
def test_a_grid_without_times(grid):
    refused("t_grid: expected at least one value", lambda: probe_inputs(torch.randn(2, 4, 5), None, None, grid))
