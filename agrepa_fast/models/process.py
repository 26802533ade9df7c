"""Generative processes: the path from noise to data, and the quantity that the network predicts on it.

Every path is Gaussian: x_t = a(t) x + b(t) e with t = 0 noise and t = 1 data; x, e, x_t [B, T, M], t [B]. The noise e
is N(0, noise_std^2). The data are normalised, so paths other than the rectified one take their variance to be 1.

    path         a(t), b(t)                              noise_std   source
    rectified    t, 1 - t                                0.5         arXiv 2209.03003, 2603.01006
    vp-cosine    sin(pi t / 2), cos(pi t / 2)            1           arXiv 2102.09672, 2202.00512
    edm          1 / sqrt(1 + s^2), s / sqrt(1 + s^2)    1           arXiv 2206.00364

In `edm`, s is the noise level in units of the data's standard deviation. EDM's published constants are for data of
standard deviation 0.5; here they are twice as large, which is the same process. Its grid
s(t) = (s_max^(1/7) + t (s_min^(1/7) - s_max^(1/7)))^7 is uniform in t. x_t is what EDM's network sees: its input
scaling c_in is part of a and b.

    parametrisation   the network predicts     on the paths
    velocity          x - e                    rectified
    v                 a e - b x                vp-cosine, edm (there it is EDM's F with the other sign)
    eps               e                        all
    x0                x                        all
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA = 0.5  # standard deviation of the noise on the rectified path
NOISE_STD = {"rectified": SIGMA, "vp-cosine": 1.0, "edm": 1.0}
PARAMETRISATIONS = {
    "rectified": ("velocity", "eps", "x0"),
    "vp-cosine": ("v", "eps", "x0"),
    "edm": ("v", "eps", "x0"),
}
# {weighting: the (path, parametrisation) pairs for which its weights are bounded and published}; none fits all.
WEIGHTINGS = {
    "none": (),
    "logit-normal": (("rectified", "velocity"),),
    "sigmoid": (("rectified", "velocity"), ("vp-cosine", "v")),
    "edm": (("edm", "v"), ("edm", "eps"), ("edm", "x0")),
}
DATA_STD = 0.5  # of EDM's images
NOISE_RANGE = (80 / DATA_STD, 0.002 / DATA_STD)  # EDM's largest and smallest noise level
LOG_NOISE = (-1.2 - math.log(DATA_STD), 1.2)  # mean and standard deviation of ln(noise level) in EDM's training
RHO = 7.0  # curvature of EDM's grid
SHIFT = 2.0  # k of the sigmoid weighting
# At t = 0 the noise tells nothing about the data, and at t = 1 the data nothing about the noise. So sampling from eps
# begins at this t, and the velocity is scored no closer to the end.
CLOSEST_T = 0.02
# In standard deviations of the data. Near noise, data from eps are a difference divided by a small a: an error of eps
# would be magnified beyond what a vocoder can take.
MOST_DATA = 10.0


@dataclass(frozen=True)
class Process:
    """A path, the parametrisation of the network's output on it, and the weighting of the training loss.

    The loss of a sample is w(t) times the mean squared error of the network's own output:

        none           w = 1
        logit-normal   the density of t = sigmoid(n), n ~ N(0, 1): Stable Diffusion 3's (arXiv 2403.03206)
        edm            EDM's lambda(s) for every parametrisation: 1 for v, 1 / a^2 for eps, 1 / b^2 for x0
        sigmoid        sigmoid(k - lambda) (-d lambda / dt) on the error of eps (arXiv 2303.00848), k = 2, with the log
                       signal-to-noise ratio lambda; scaled to a mean of 1 over t

    Raises:
        ValueError: an unknown name, or a combination that does not fit; it names the field.
    """

    path: str = "rectified"
    parametrisation: str = "velocity"
    weighting: str = "none"

    def __post_init__(self) -> None:
        if self.path not in PARAMETRISATIONS:
            raise ValueError(f"path: expected one of {', '.join(PARAMETRISATIONS)}, got {self.path!r}")
        outputs = PARAMETRISATIONS[self.path]
        if self.parametrisation not in outputs:
            instead = {
                "v": "; v is called velocity on this path",
                "velocity": "; v is the velocity's form on this path",
            }
            raise ValueError(
                f"path, parametrisation: expected {self.path} with one of {', '.join(outputs)}, "
                f"got {self.parametrisation!r}{instead.get(self.parametrisation, '')}"
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}")
        if self.weighting != "none" and (self.path, self.parametrisation) not in WEIGHTINGS[self.weighting]:
            takers = " or ".join(f"{path} with {output}" for path, output in WEIGHTINGS[self.weighting])
            raise ValueError(
                f"path, parametrisation, weighting: expected {takers} with weighting {self.weighting}, "
                f"got {self.path} with {self.parametrisation}"
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise e."""
        return NOISE_STD[self.path]

    @property
    def first_t(self) -> float:
        """The t at which sampling begins."""
        return CLOSEST_T if self.parametrisation == "eps" and self.path != "edm" else 0.0

    @property
    def last_t(self) -> float:
        """The largest t at which `data_and_noise` is well conditioned; sampling evaluates the network below t = 1."""
        return 1 - CLOSEST_T if self.parametrisation == "x0" and self.path != "edm" else 1.0

    def times(self, uniform: Tensor) -> Tensor:
        """The t of training from uniform numbers [B] in [0, 1); in `edm` the ln of the noise level is normal."""
        if self.path != "edm":
            return uniform
        mean, std = LOG_NOISE
        level = torch.exp(mean + std * torch.special.ndtri(uniform))
        high, low = (end ** (1 / RHO) for end in NOISE_RANGE)
        return ((high - level ** (1 / RHO)) / (high - low)).clamp(0, 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a(t) and b(t) in the shape of t."""
        if self.path == "rectified":
            return t, 1 - t
        if self.path == "vp-cosine":
            # In float32 the cosine of pi / 2 is a little below zero.
            return torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t).clamp_min(0)
        high, low = (end ** (1 / RHO) for end in NOISE_RANGE)
        level = (high + t * (low - high)) ** RHO
        scale = torch.rsqrt(1 + level.square())
        return scale, level * scale

    def point(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The point on the path and the network's target there: x, noise [B, T, M], t [B] -> x_t, target."""
        if self.path == "rectified":
            x_t = torch.lerp(noise, x, _spread(t, x))
        else:
            a, b = (_spread(part, x) for part in self.coefficients(t))
            x_t = a * x + b * noise
        if self.parametrisation == "velocity":
            return x_t, x - noise
        if self.parametrisation == "v":
            return x_t, a * noise - b * x
        return x_t, noise if self.parametrisation == "eps" else x

    def data_and_noise(self, x_t: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The data x and the noise e that the network's output at (x_t, t) stands for; the inverse of `point`.

        eps has no answer at t = 0 except in `edm`, and x0 none at t = 1: there the result is not finite.
        """
        a, b = (_spread(part, x_t) for part in self.coefficients(t))
        if self.parametrisation == "velocity":
            return x_t + b * output, x_t - a * output
        if self.parametrisation == "v":
            return a * x_t - b * output, b * x_t + a * output
        if self.parametrisation == "eps":
            return (x_t - b * output) / a, output
        return output, (x_t - a * output) / b

    def velocity(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The network's output as the direction of motion from noise to data: x - e, on curved paths b x - a e.

        On curved paths this is dx_t/dt up to a factor that depends on t alone.
        """
        if self.parametrisation == "velocity":
            return output
        if self.parametrisation == "v":
            return -output
        x, noise = self.data_and_noise(x_t, output, t)
        if self.path == "rectified":
            return x - noise
        a, b = (_spread(part, x_t) for part in self.coefficients(t))
        return b * x - a * noise

    def step(self, x: Tensor, start: Tensor, step: Tensor, at: tuple[Tensor, Tensor, Tensor], last: bool) -> Tensor:
        """Move the state x from time `start` by `step`, with the data and the noise that the network sees elsewhere.

        x + (a' - a) data + (b' - b) noise, with a, b at `start` and a', b' at the end: Euler's step on the rectified
        path and in the noise level of `edm`; DDIM's (arXiv 2010.02502, eta = 0) on `vp-cosine`. Data that follow from
        eps are clipped to MOST_DATA (static thresholding, arXiv 2205.11487).

        Args:
            start, step: scalars.
            at: state [B, T, M], the network's output there, and its time [B]: the start itself (Euler) or the middle.
            last: whether the step ends at the data, where a = 1 and b = 0.
        """
        state, output, time = at
        if self.parametrisation == "velocity":
            return x + step * output
        data, noise = self.data_and_noise(state, output, time)
        if self.parametrisation == "eps":
            data = data.clamp(-MOST_DATA, MOST_DATA)
            a, b = (_spread(part, state) for part in self.coefficients(time))
            noise = (state - a * data) / b
        a, b = self.coefficients(start)
        later_a, later_b = (1.0, 0.0) if last else self.coefficients(start + step)
        return x + ((later_a - a) * data + (later_b - b) * noise).to(x.dtype)

    def weight(self, t: Tensor) -> Tensor | None:
        """The weight [B] of each sample's loss, float32 or wider; None where all weigh the same. See the class."""
        if self.weighting == "none" or (self.weighting == "edm" and self.parametrisation == "v"):
            return None
        if self.weighting == "edm":
            a, b = self.coefficients(t)
            return (a if self.parametrisation == "eps" else b).square().reciprocal()
        if self.weighting == "logit-normal":
            inner = t.clamp(1e-6, 1 - 1e-6)
            return torch.exp(-0.5 * torch.logit(inner).square()) / (math.sqrt(2 * math.pi) * inner * (1 - inner))
        a, b = self.coefficients(t)
        return _sigmoid(a, b, self.noise_std) / SIGMOID_MEAN[self.path]


def _sigmoid(a: Tensor, b: Tensor, std: float) -> Tensor:
    """The sigmoid weighting of velocity or v up to a constant, written so that nothing is divided by zero.

    With n = e / std: error of n = (a / std)^2 error of velocity or v, and the log signal-to-noise ratio changes as
    1 / (a b). sigmoid(k - lambda) = e^k (b std)^2 / (e^k (b std)^2 + a^2).
    """
    return a * b / (math.exp(SHIFT) * (b * std).square() + a.square())


def _mean_sigmoid(process: Process) -> float:
    """The mean of `_sigmoid` over t in [0, 1]."""
    a, b = process.coefficients((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    return float(_sigmoid(a, b, process.noise_std).mean())


# Computed once, so that a step that is compiled or captured finds numbers.
SIGMOID_MEAN = {path: _mean_sigmoid(Process(path, output, "sigmoid")) for path, output in WEIGHTINGS["sigmoid"]}


def _spread(part: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1] in the dtype of x."""
    return part.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
