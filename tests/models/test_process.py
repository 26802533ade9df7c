"""Paths, parametrisations and weightings against published formulas, and against a model whose answers are exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from agrepa_fast.models.flow import FLOW_MATCHING, SIGMA, flow_matching_loss, probe_inputs, sample
from agrepa_fast.models.process import CLOSEST_T, PARAMETRISATIONS, WEIGHTINGS, Process

EVERY = [(path, output) for path, outputs in PARAMETRISATIONS.items() for output in outputs]
PUBLISHED_RHO = 7


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(t):
    return t[:, None, None]


@pytest.mark.parametrize("path, output", EVERY)
def test_conversions_are_exact_inverses(path, output):
    """Data and noise come back from the point and its target, at random times over the whole range."""
    process = Process(path, output)
    t = torch.rand(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = t * (process.last_t - process.first_t) + process.first_t
    x, noise = randn(500, 3, 2), process.noise_std * randn(500, 3, 2, seed=1)
    x_t, target = process.point(x, noise, t)
    data, back = process.data_and_noise(x_t, target, t)
    # One division by a or b, at worst 1 / 250, where EDM's noise ends.
    torch.testing.assert_close(data, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-11)
    a, b = process.coefficients(t)
    torch.testing.assert_close(x_t, column(a) * x + column(b) * noise, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path, output", EVERY)
def test_a_velocity_follows_from_every_parametrisation(path, output):
    """It is dx_t/dt, by central differences, up to a factor of t; on the rectified path exactly."""
    process = Process(path, output)
    x, noise = randn(4, 3, 2), process.noise_std * randn(4, 3, 2, seed=1)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    x_t, target = process.point(x, noise, t)
    velocity = process.velocity(x_t, target, t)
    slope = (process.point(x, noise, t + 1e-6)[0] - process.point(x, noise, t - 1e-6)[0]) / 2e-6
    if path == "rectified":
        torch.testing.assert_close(velocity, x - noise, rtol=0, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(velocity.flatten(1), slope.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-8)
    factors = slope / velocity
    torch.testing.assert_close(factors, factors[:, :1, :1].expand_as(factors), rtol=1e-5, atol=0)


def test_vp_cosine_is_the_published_schedule():
    """Nichol and Dhariwal's cosine without offset, and Salimans and Ho's v = alpha eps - sigma x."""
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x, noise = randn(7, 2, 2), randn(7, 2, 2, seed=1)
    alpha, sigma = torch.cos(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * (1 - t))
    x_t, v = Process("vp-cosine", "v").point(x, noise, t)
    torch.testing.assert_close(x_t, column(alpha) * x + column(sigma) * noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(v, column(alpha) * noise - column(sigma) * x, rtol=0, atol=1e-12)


def test_edm_is_the_published_process():
    """Karras et al.'s preconditioning, grid, loss and distribution of noise levels, for images of std 0.5."""
    data_std, highest, lowest, mean, std = 0.5, 80.0, 0.002, -1.2, 1.2
    process = Process("edm", "v")
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    ends = [end ** (1 / PUBLISHED_RHO) for end in (highest, lowest)]
    level = (ends[0] + t * (ends[1] - ends[0])) ** PUBLISHED_RHO
    x, noise = randn(9, 2, 2), randn(9, 2, 2, seed=1)
    noisy = data_std * x + column(level) * noise  # an image and its noisy version
    c_in, c_out = (level**2 + data_std**2).rsqrt(), level * data_std * (level**2 + data_std**2).rsqrt()
    c_skip = data_std**2 / (level**2 + data_std**2)
    x_t, v = process.point(x, noise, t)
    torch.testing.assert_close(x_t, column(c_in) * noisy, rtol=0, atol=1e-12)
    # The target of EDM's raw network F, whose loss has the weight lambda c_out^2 = 1.
    torch.testing.assert_close(-v, (data_std * x - column(c_skip) * noisy) / column(c_out), rtol=0, atol=1e-9)
    assert process.weight(t) is None
    # lambda on the error of the denoised image, in units of the data's std.
    published = (level**2 + data_std**2) / (level * data_std) ** 2 * data_std**2
    torch.testing.assert_close(Process("edm", "x0", "edm").weight(t), published, rtol=1e-10, atol=0)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = process.times(uniform)
    logs = PUBLISHED_RHO * (ends[0] + drawn * (ends[1] - ends[0])).log()
    quantiles = mean + std * math.sqrt(2) * torch.erfinv(2 * uniform - 1)
    torch.testing.assert_close(logs, quantiles.clamp(math.log(lowest), math.log(highest)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path, output", EVERY)
def test_edge_times_stay_finite(path, output):
    """What a uniform draw may give: 0 and the float before 1."""
    process = Process(path, output)
    uniform = torch.tensor([0.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))])
    t = process.times(uniform)
    assert ((t >= 0) & (t <= 1)).all()
    x_t, target = process.point(torch.ones(2, 1, 1), torch.ones(2, 1, 1), t)
    assert x_t.isfinite().all()
    assert target.isfinite().all()
    for weighting, pairs in WEIGHTINGS.items():
        weight = Process(path, output, weighting).weight(t) if (path, output) in pairs else None
        assert weight is None or (weight.isfinite().all() and (weight >= 0).all())


def test_the_edm_weight_makes_every_parametrisation_train_on_one_loss():
    """One error of the data is one weighted loss, whichever of eps, x0 and v the network predicts."""
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    x, noise, error = randn(9, 2, 2), randn(9, 2, 2, seed=1), randn(9, 2, 2, seed=2)
    a, b = Process("edm", "v").coefficients(t)
    losses = []
    for output in ("v", "eps", "x0"):
        process = Process("edm", output, "edm")
        x_t, target = process.point(x, noise, t)
        wrong = x + 1e-3 * column(b) * error  # the noise that belongs to these data, at the same x_t
        implied = (x_t - column(a) * wrong) / column(b)
        predicted = {"v": column(a) * implied - column(b) * wrong, "eps": implied, "x0": wrong}[output]
        weight = process.weight(t)
        losses.append(flow_matching_loss(predicted, target) * (1 if weight is None else weight))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("path, output", WEIGHTINGS["sigmoid"])
def test_the_sigmoid_weight_is_the_published_one(path, output):
    """sigmoid(2 - lambda) (-d lambda / dt) on the error of eps, with lambda differentiated numerically; mean 1."""
    process = Process(path, output, "sigmoid")
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)

    def log_snr(t):
        a, b = process.coefficients(t)
        return (a / (b * process.noise_std)).square().log()

    slope = (log_snr(t + 1e-6) - log_snr(t - 1e-6)) / 2e-6  # t runs towards the data, so lambda grows
    x_t, wrong = randn(19, 1, 1), torch.ones(19, 1, 1, dtype=torch.float64)
    _, noise = process.data_and_noise(x_t, 0 * wrong, t)
    _, other = process.data_and_noise(x_t, wrong, t)
    eps_error = ((other - noise) / process.noise_std).square().flatten()  # for an error of the output of 1
    published = torch.sigmoid(2 - log_snr(t)) * slope * eps_error
    ratio = process.weight(t) / published
    torch.testing.assert_close(ratio, ratio[:1].expand(19), rtol=1e-6, atol=0)
    everywhere = process.weight(torch.linspace(0, 1, 5001, dtype=torch.float64))
    assert everywhere.mean().item() == pytest.approx(1, rel=1e-3)


def test_the_logit_normal_weight_is_a_density():
    weight = Process(weighting="logit-normal").weight(torch.linspace(0, 1, 20_001, dtype=torch.float64))
    assert weight.mean().item() == pytest.approx(1, rel=1e-3)
    t = torch.tensor([0.3], dtype=torch.float64)
    density = math.exp(-0.5 * math.log(0.3 / 0.7) ** 2) / math.sqrt(2 * math.pi) / (0.3 * 0.7)
    assert Process(weighting="logit-normal").weight(t).item() == pytest.approx(density)


class Oracle:
    """The exact answer, in any parametrisation, for data N(mean, spread^2) in every coordinate."""

    def __init__(self, process, mean, spread):
        self.process, self.mean, self.spread = process, mean, spread
        self.times = []

    def moments(self, t):
        a, b = self.process.coefficients(t)
        return a, b, (a * self.spread) ** 2 + (b * self.process.noise_std) ** 2

    def __call__(self, x_t, t, cond, mask):
        t = t.double()
        self.times.append(t[0].item())
        a, b, variance = map(column, self.moments(t))
        excess = (x_t - a * self.mean) / variance
        data = self.mean + a * self.spread**2 * excess
        noise = b * self.process.noise_std**2 * excess
        return {"velocity": data - noise, "v": a * noise - b * data, "eps": noise, "x0": data}[
            self.process.parametrisation
        ]

    def destination(self, noise):
        """Where the flow takes the noise: quantiles go to quantiles."""
        first = torch.tensor([self.process.first_t], dtype=torch.float64)
        a, b, variance = self.moments(first)
        return self.mean + (b * noise - a * self.mean) * self.spread / variance.sqrt()


@pytest.mark.parametrize("path, output", EVERY)
@pytest.mark.parametrize("method, tolerance", [("euler", 0.15), ("midpoint", 0.01)])
def test_the_sampler_reaches_the_data(path, output, method, tolerance):
    """Every parametrisation carries noise to the exact quantile of the data; half the step, half the error or less."""
    process = Process(path, output)
    oracle = Oracle(process, randn(4, seed=1), 1.3)
    noise = process.noise_std * randn(2, 3, 4)
    errors = []
    for points in (65, 129):
        got = sample(oracle, noise, points=points, method=method, sway_coefficient=None, process=process)
        errors.append((got - oracle.destination(noise)).abs().max().item())
    assert errors[0] < tolerance
    # On vp-cosine the midpoint's errors cancel for a Gaussian, down to the rounding of the float32 grid.
    assert errors[1] < max((0.65 if method == "euler" else 0.4) * errors[0], 1e-6)
    assert max(oracle.times) < 1  # where x0 tells nothing about the noise


@pytest.mark.parametrize("path", PARAMETRISATIONS)
def test_all_parametrisations_of_a_path_sample_alike(path):
    """They describe one model, so guidance and every step agree; eps starts later, so it is left out where it does."""
    noise, cond, null = randn(2, 3, 4), randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    results = []
    for output in PARAMETRISATIONS[path]:
        process = Process(path, output)
        if process.first_t:
            continue

        def guided(x_t, t, cond, mask, process=process):
            return Oracle(process, cond, 1.3)(x_t, t, cond, mask)

        results.append(sample(guided, process.noise_std * noise, cond, null, points=9, guidance=2.0, process=process))
    assert len(results) >= 2
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["rectified", "vp-cosine", "edm"])
def test_data_from_eps_are_clipped(path):
    """A network that has learned nothing, and answers 0, does not send the samples off to a / first a."""
    process = Process(path, "eps")
    got = sample(lambda x, *_: 0 * x, process.noise_std * randn(2, 30, 4), points=9, process=process)
    assert got.abs().max() <= 10
    assert got.std() > 0.5


def test_euler_is_ddim_on_vp_cosine_and_karras_in_edm():
    noise, mean = randn(2, 3, 4), randn(4, seed=1)
    process = Process("vp-cosine", "eps")
    got = sample(Oracle(process, mean, 1.3), noise, points=6, sway_coefficient=None, process=process)
    t = torch.linspace(CLOSEST_T, 1, 6, dtype=torch.float64)
    alpha_bar = torch.cos(math.pi / 2 * (1 - t)) ** 2
    x = (1 - alpha_bar[0]).sqrt() * noise
    model = Oracle(process, mean, 1.3)
    for i in range(5):  # Song et al., equation 12 with eta = 0
        eps = model(x, t[i].expand(2), None, None)
        data = (x - (1 - alpha_bar[i]).sqrt() * eps) / alpha_bar[i].sqrt()
        x = alpha_bar[i + 1].sqrt() * data + (1 - alpha_bar[i + 1]).clamp_min(0).sqrt() * eps
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)

    process = Process("edm", "x0")
    got = sample(Oracle(process, mean, 1.3), noise, points=6, sway_coefficient=None, process=process)
    model = Oracle(process, mean, 1.3)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    high, low = 160 ** (1 / 7), 0.004 ** (1 / 7)
    level = [*((high + t[:5] * (low - high)) ** 7).tolist(), 0.0]
    x = level[0] * noise
    for i in range(5):  # Karras et al., algorithm 1 without the correction
        denoised = model(x / math.sqrt(1 + level[i] ** 2), t[i].expand(2), None, None)
        x = x + (level[i + 1] - level[i]) * (x - denoised) / level[i]
    torch.testing.assert_close(got, x, rtol=0, atol=1e-4)


def old_sample(model, noise, method):
    """The sampler as it was before there were other parametrisations."""
    grid = torch.linspace(0, 1, 9)
    grid = grid - (torch.cos(math.pi / 2 * grid) - 1 + grid)
    x = noise
    for start, end in itertools.pairwise(grid):
        step = end - start
        v = model(x, start.expand(2), None, None)
        if method == "midpoint":
            v = model(x + 0.5 * step * v, (start + 0.5 * step).expand(2), None, None)
        x = x + step * v
    return x


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_default_has_the_bits_that_it_always_had(method):
    def model(x, t, cond, mask):
        return torch.sin(3 * x + t[:, None, None])

    x, noise = randn(2, 50, 7, seed=1).float(), SIGMA * randn(2, 50, 7).float()
    assert torch.equal(sample(model, noise, points=9, method=method), old_sample(model, noise, method))
    t = torch.rand(2, generator=torch.Generator().manual_seed(0))
    x_t, target = FLOW_MATCHING.point(x, noise, FLOW_MATCHING.times(t))
    assert torch.equal(x_t, torch.lerp(noise, x, t[:, None, None]))
    assert torch.equal(target, x - noise)
    assert FLOW_MATCHING.weight(t) is None
    assert FLOW_MATCHING.noise_std == SIGMA


@pytest.mark.parametrize("path", PARAMETRISATIONS)
def test_probe_inputs_lie_on_the_path(path):
    process = Process(path, "x0")
    x = randn(3, 40, 20)
    got = probe_inputs(x, None, None, [0.0, 0.4], torch.Generator().manual_seed(5), process=process)
    a, b = (part.view(-1, 1, 1) for part in process.coefficients(got["t"].double()))
    noise = (got["x_t"] - a * x.repeat(2, 1, 1)) / b
    torch.testing.assert_close(noise[:3], noise[3:], rtol=0, atol=1e-5)
    assert noise.std().item() == pytest.approx(process.noise_std, rel=0.05)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("vp", "v"), "path: expected one of rectified, vp-cosine, edm, got 'vp'"),
        (
            ("rectified", "v"),
            "path, parametrisation: expected rectified with one of velocity, eps, x0, got 'v'; v is called",
        ),
        (("edm", "velocity"), "path, parametrisation: expected edm with one of v, eps, x0, got 'velocity'; v is"),
        (("edm", "score"), "path, parametrisation: expected edm with one of v, eps, x0, got 'score'"),
        (("rectified", "velocity", "snr"), "weighting: expected one of none, logit-normal, sigmoid, edm, got 'snr'"),
        (
            ("rectified", "eps", "sigmoid"),
            "path, parametrisation, weighting: expected rectified with velocity or vp-cosine with v with weighting",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError) as raised:
        Process(*arguments)
    assert str(raised.value).startswith(message)
