"""The arithmetic that a probe really does, by PyTorch's own counter, against what its plan says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agrepa_fast import AblationPlan, DiT, DiTConfig, attribute_layers
from agrepa_fast.attribution.plan import Sizes

DEPTH, WIDTH, FRAMES, SAMPLES = 12, 32, 128, 2
CONTROL = DEPTH / SAMPLES  # block evaluations of the noise floor: one sample more, from block 0 on


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    network = DiT(DiTConfig(DEPTH, WIDTH, heads=2, mels=8, cond=0, dropout=0.0, max_frames=FRAMES))
    nn.init.normal_(network.output.weight)  # a velocity that is not zero
    return network.eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x_t": torch.randn(SAMPLES, FRAMES, 8, generator=generator), "t": torch.tensor([0.3, 0.6])}


def flops(run, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*arguments, **options)
    return counter.get_total_flops()


class SwitchedOff(nn.Module):
    """A branch that costs nothing: the residual op takes the missing rows as not moved."""

    def forward(self, h, key_mask=None):
        return h[:0]


def loop_of_forwards(model: DiT, inputs) -> None:
    """One forward of the model, and one for each layer with both of its branches taken out."""
    model(**inputs)
    for layer in range(DEPTH):
        kept = [model.branches[2 * layer], model.branches[2 * layer + 1]]
        model.branches[2 * layer], model.branches[2 * layer + 1] = SwitchedOff(), SwitchedOff()
        model(**inputs)
        model.branches[2 * layer], model.branches[2 * layer + 1] = kept


def test_the_staircase_saves_what_the_plan_says(model, inputs):
    plan = AblationPlan.build(DEPTH)
    ratio = flops(attribute_layers, model, inputs, engine="prefix") / flops(loop_of_forwards, model, inputs)
    assert ratio == pytest.approx((plan.block_evaluations + CONTROL) / plan.loop_block_evaluations, rel=0.02)
    assert ratio == pytest.approx((78 + 6) / 144, rel=0.02)


@pytest.mark.parametrize("branches", [None, ("attn", "ff"), ("ff",)])
@pytest.mark.parametrize("blocks", [None, [0, 3, 11]])
def test_a_probe_costs_the_branches_of_its_plan(model, inputs, blocks, branches):
    h = torch.randn(SAMPLES, FRAMES, WIDTH)
    of_branch = [flops(model.branches[i], h) for i in (0, 1)]
    linear = 2 * SAMPLES * FRAMES * WIDTH**2
    assert of_branch[0] - 4 * linear in (0, 4 * SAMPLES * FRAMES**2 * WIDTH)  # with or without the attention kernel
    assert of_branch[1] == 8 * linear
    plan = AblationPlan.build(DEPTH, blocks, branches)
    expected = sum((plan.active(i) + 1 / SAMPLES) * of_branch[i % 2] for i in range(2 * DEPTH))
    assert flops(attribute_layers, model, inputs, blocks, branches=branches) == pytest.approx(expected, rel=0.02)
    sizes = Sizes(FRAMES, WIDTH, 4, 8, 2, 4)
    uncounted = sum(plan.active(i) * SAMPLES + 1 for i in range(0, 2 * DEPTH, 2)) * 4 * FRAMES**2 * WIDTH
    # With or without the attention kernel, which the counter may not know.
    assert round(plan.flops(sizes, SAMPLES) - expected) in (0, uncounted)


def test_the_checking_engines_cost_what_they_say(model, inputs):
    """Stacked: all streams from the start. Loop: full forwards without the branches that are switched off."""
    block = sum(flops(model.branches[i], torch.randn(SAMPLES, FRAMES, WIDTH)) for i in (0, 1))
    stacked = flops(attribute_layers, model, inputs, engine="stacked")
    assert stacked == pytest.approx(((DEPTH + 1) * DEPTH + CONTROL) * block, rel=0.02)
    loop = flops(attribute_layers, model, inputs, engine="loop")
    assert loop == pytest.approx((DEPTH**2 + CONTROL) * block, rel=0.02)
