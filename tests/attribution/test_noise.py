"""The measured noise floor is the rounding of the dtype, and bfloat16 scores are as exact as a bfloat16 loop."""

from __future__ import annotations

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import DiT, DiTConfig, attribute_layers
from agrepa_fast.attribution import native
from agrepa_fast.attribution.files import read_scores
from agrepa_fast.attribution.plan import AblationPlan
from agrepa_fast.attribution.scores import LayerScores, normalised_change

DEPTH, FRAMES, SAMPLES = 6, 32, 3
ENGINES = ["prefix", "stacked", "loop"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def model() -> DiT:
    """As after some training: weights of the size that keeps activations near 1."""
    network = DiT(DiTConfig(DEPTH, 48, 4, 12, 0, 4, 0.0, FRAMES))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02, generator=generator)
        network.output_norm.weight.add_(1)
    return network.eval()


def draw(dtype, masked=False):
    generator = torch.Generator().manual_seed(1)
    inputs = {"x_t": torch.randn(SAMPLES, FRAMES, 12, generator=generator), "t": torch.tensor([0.2, 0.5, 0.9])}
    inputs = {name: value.to(torch.bfloat16).to(dtype) for name, value in inputs.items()}
    if masked:
        inputs["mask"] = torch.arange(FRAMES) < torch.tensor([[32], [20], [9]])
    return inputs


def rounded(model, dtype):
    """The same bfloat16 numbers as weights, whatever the dtype."""
    return copy.deepcopy(model).to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-24)])
def test_the_control_measures_the_rounding_of_the_dtype(model, dtype, eps, engine):
    """Against the distance between the velocity in this dtype and in float64, for the same weights and inputs."""
    inputs = draw(dtype)
    with torch.no_grad():
        exact = rounded(model, torch.float64)(**draw(torch.float64))[0]
        real = (rounded(model, dtype)(**inputs)[0].double() - exact).norm() / exact.norm()
        measured = native.measure(rounded(model, dtype), AblationPlan.build(DEPTH), inputs, engine).double()
    assert (measured[-1] == measured[-1, 0]).all()
    control = (measured[-1, 0] / measured[-2, 0]).sqrt()
    assert 0.4 * real < control < 2.5 * real
    assert control > eps


@pytest.mark.parametrize("engine", ENGINES)
def test_the_noise_floor_of_each_dtype(model, engine):
    """What bfloat16 makes of it stands far above the formula's own floor; float32 and float64 stay at that floor."""
    floors = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        scores = attribute_layers(rounded(model, dtype), draw(dtype), engine=engine)
        floors[dtype] = scores.noise_floor / scores.floor
        assert scores.above_floor.all()
    assert floors[torch.bfloat16] > 10
    assert floors[torch.float32] == pytest.approx(1, abs=1e-3)
    assert floors[torch.float64] == pytest.approx(1, abs=1e-9)
    squared = attribute_layers(rounded(model, torch.float64), draw(torch.float64), metric="squared")
    assert 0 < squared.noise_floor < 1e-26
    squared = attribute_layers(rounded(model, torch.float32), draw(torch.float32), metric="squared")
    assert 1e-15 < squared.noise_floor < 1e-11


def test_the_first_sample_speaks_for_all(model):
    model, inputs = rounded(model, torch.bfloat16), draw(torch.bfloat16)
    with torch.no_grad():
        *_, energy, noise = native.measure(model, AblationPlan.build(DEPTH), inputs).double()
    expected = normalised_change(noise[0] / energy[0] * energy, energy, "rms")
    for at_once in (None, 2):
        scores = attribute_layers(model, inputs, max_samples=at_once)
        torch.testing.assert_close(scores.noise_by_sample, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("metric", ["rms", "squared"])
def test_a_layer_below_the_noise_is_not_above_the_floor_and_is_named(model, metric):
    """Layer 2 is made so weak that bfloat16 cannot see it; in float32 it is seen."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for last in (model.branches[4].out, model.branches[5].down):
            last.weight.mul_(2e-3), last.bias.mul_(2e-3)
    with pytest.warns(UserWarning, match=r"layers 2 change the velocity by less than [\d.e-]+, .*bfloat16"):
        scores = attribute_layers(rounded(model, torch.bfloat16), draw(torch.bfloat16), metric=metric)
    assert scores.above_floor.tolist() == [True, True, False, True, True, True]
    assert scores.mean[2] > 1.5 * scores.floor
    assert attribute_layers(rounded(model, torch.float32), draw(torch.float32), metric=metric).above_floor.all()


class Chain(nn.Module):
    def __init__(self, model: DiT):
        super().__init__()
        self.head, self.tail = nn.Linear(12, 48), nn.Linear(48, 12)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, norm_first=True) for _ in range(4)
        )

    def forward(self, x, t):
        h = self.head(x) + t[:, None, None]
        for block in self.blocks:
            h = block(h)
        return self.tail(h)


@pytest.mark.parametrize("dtype, low, high", [(torch.bfloat16, 1e-3, 5e-2), (torch.float32, 1e-8, 1e-5)])
def test_other_models_have_their_noise_measured_too(model, dtype, low, high):
    torch.manual_seed(0)
    network, inputs = Chain(model).to(dtype), draw(dtype)
    for engine in ("prefix", "stacked", "loop"):
        scores = attribute_layers(network, (inputs["x_t"], inputs["t"]), metric="squared", engine=engine)
        assert low < scores.noise_floor**0.5 < high


def test_the_noise_is_kept_by_files_and_parts(tmp_path):
    noise = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    floor = torch.full((3,), 0.2, dtype=torch.float64)
    values = torch.tensor([[0.25, 0.25, 0.25], [0.4, 0.4, 0.4]], dtype=torch.float64)
    scores = LayerScores((0, 1), values, floor_by_sample=floor, domains=("a", "a", "b"), noise_by_sample=noise)
    assert scores.noise_floor == pytest.approx(0.3)
    assert scores.above_floor.tolist() == [False, True]
    assert scores.domain("a").noise_floor == 0.2  # never below the floor of the formula
    assert scores.domain("a").above_floor.tolist() == [True, True]
    assert scores.domain("b").noise_by_sample.tolist() == [0.5]
    assert LayerScores.from_state(scores.state()).noise_by_sample.equal(noise)
    scores.to_csv(tmp_path / "foga.csv")
    assert read_scores(tmp_path / "foga.csv").noise_by_sample.equal(noise)
    with pytest.raises(ValueError, match=r"noise_by_sample: expected \[3\]"):
        LayerScores((0, 1), values, noise_by_sample=noise[:2])


def separated_order(scores: np.ndarray, slack: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (a, b) whose exact scores differ by more than rounding can make: a is above b."""
    return [
        (a, b) for a in range(len(scores)) for b in range(len(scores)) if scores[a] - scores[b] > slack[a] + slack[b]
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("branches", [None, ("attn", "ff")])
@pytest.mark.parametrize("max_samples, parts, masked", [(None, 1, False), (2, 1, True), (1, 3, True)])
def test_bfloat16_is_as_exact_as_a_bfloat16_loop(model, engine, branches, max_samples, parts, masked):
    """Root mean square over layers and samples of the error against float64: at most twice that of a loop which runs
    `model.forward` once for each ablation in bfloat16; and the same order of layers where rounding leaves one."""
    exact, loop = (loop_of_forwards(model, dtype, masked, branches) for dtype in (torch.float64, torch.bfloat16))
    units, per = len(exact), len(exact) // parts
    options = {"branches": branches, "engine": engine, "max_samples": max_samples}
    if parts == 1:
        got = attribute_layers(rounded(model, torch.bfloat16), draw(torch.bfloat16, masked), **options).by_sample
    else:  # the layers dealt out over several plans
        step = DEPTH * per // units
        got = torch.cat(
            [
                attribute_layers(
                    rounded(model, torch.bfloat16), draw(torch.bfloat16, masked), range(a, a + step), **options
                ).by_sample
                for a in range(0, DEPTH, step)
            ]
        )
    error, of_loop = (np.sqrt(np.mean((part - exact) ** 2)) for part in (got.numpy(), loop))
    assert error <= 2 * of_loop
    slack = 3 * np.abs(loop - exact).mean(1)
    pairs = separated_order(exact.mean(1), slack)
    assert len(pairs) > units  # most pairs are apart
    means = got.mean(1)
    assert all(means[a] > means[b] for a, b in pairs)


@functools.cache
@torch.no_grad()
def loop_of_forwards(model: DiT, dtype, masked, branches) -> np.ndarray:
    """[U, N] by the definition: the network's own forward, a switched-off branch gives back no rows."""
    model, inputs = rounded(model, dtype), draw(dtype, masked)

    class Off(nn.Module):
        def forward(self, h, key_mask=None):
            return h[:0]

    def scored(velocity):
        rows = []
        for n in range(SAMPLES):
            valid = inputs["mask"][n] if "mask" in inputs else slice(None)
            v, b = velocity[n][valid].double().numpy(), base[n][valid].double().numpy()
            rows.append(np.sqrt(np.mean((v - b) ** 2) + 1e-8) / (np.sqrt(np.mean(b**2) + 1e-8) + 1e-8))
        return rows

    base = model(**inputs)
    groups = [(2 * k, 2 * k + 1) for k in range(DEPTH)] if branches is None else [(i,) for i in range(2 * DEPTH)]
    scores = []
    for group in groups:
        own = [model.branches[i] for i in group]
        for i in group:
            model.branches[i] = Off()
        scores.append(scored(model(**inputs)))
        for i, branch in zip(group, own):
            model.branches[i] = branch
    return np.array(scores)
