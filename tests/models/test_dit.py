"""The DiT's promises: sizes, masks, hidden states, initialisation, dropout, compilation, precision, errors.

What it computes is checked against the formulas in test_released.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from agrepa_fast.alignment.interface import InterfaceLoss
from agrepa_fast.models.conditioning import TokenConditioner
from agrepa_fast.models.dit import PRESETS, Attention, DiT, DiTConfig, FeedForward, position_table, time_sinusoid

SMALL = DiTConfig(depth=3, width=32, heads=4, mels=6, cond=10, dropout=0.0, max_frames=64)


def lively(config=SMALL, seed=0):
    """A DiT in eval mode whose gates, branches and output are not zero."""
    torch.manual_seed(seed)
    model = DiT(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
        elif name != "output_norm.weight":
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_inputs(config=SMALL, batch=2, frames=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, frames, config.mels, generator=generator)
    cond = torch.randn(batch, frames, config.cond, generator=generator) if config.cond else None
    return x_t, torch.rand(batch, generator=generator), cond


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_paper_preset_has_the_papers_parameters():
    with torch.device("meta"):
        model = DiT(DiTConfig.preset("paper"))
        conditioner = TokenConditioner({"s3": 4096, "as": 4096}, width=1024)
        bridge = InterfaceLoss(1024, {"speech": 1280, "audio": 768}, {"speech": 0.5, "audio": 1.0})
    assert count(model, conditioner) == 473_591_908
    assert count(bridge) == 1024 * (1280 + 768)
    assert round(count(model, conditioner, bridge) / 1e6, 1) == 475.7


@pytest.mark.parametrize(
    "name, depth, width, heads, inputs, mels",
    [
        ("demo", 8, 128, 4, 64 + 96 + 64, 64),
        ("small", 12, 384, 6, 100 + 256 + 100, 100),
        ("base", 12, 768, 12, 100 + 512 + 100, 100),
        ("paper", 24, 1024, 16, 1224, 100),
    ],
)
def test_preset_sizes(name, depth, width, heads, inputs, mels):
    with torch.device("meta"):
        model = DiT(DiTConfig.preset(name))
    d = width
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + (6 * d * d + 6 * d)
    ends = (inputs * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * d + (d * mels + mels)
    assert count(model) == depth * block + ends
    assert model.depth == depth
    assert {branch.heads for branch in model.branches[::2]} == {heads}


def test_preset_fields_change_by_keyword():
    changed = DiTConfig.preset("demo", depth=2, cond=0)
    assert (changed.depth, changed.cond, changed.width) == (2, 0, PRESETS["demo"].width)
    with pytest.raises(ValueError, match="preset: expected one of demo, small, base, paper, got 'huge'"):
        DiTConfig.preset("huge")
    with pytest.raises(TypeError, match="layers"):
        DiTConfig.preset("demo", layers=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"max_frames": 0}, "max_frames: expected at least 1, got 0"),
        ({"mels": -1}, "mels: expected at least 1, got -1"),
        ({"heads": 3}, r"width: expected a multiple of heads \(3\), got 32"),
        ({"width": 33, "heads": 3}, "width: expected an even number .*, got 33"),
        ({"cond": -1}, "cond: expected 0 or more channels, got -1"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout: expected a number in \[0, 1\), got -0.1"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{**vars(SMALL), **change})


def test_sinusoids():
    table = position_table(2048, 10)
    for p, c in ((0, 0), (0, 1), (7, 4), (938, 2), (2047, 0), (2047, 9)):
        angle = p / 10000 ** ((c - c % 2) / 10)
        assert abs(table[p, c].item() - (math.cos if c % 2 else math.sin)(angle)) < 1e-7
    wave = time_sinusoid(torch.tensor([0.25, 1.0], dtype=torch.float64), 8)
    for b, t in enumerate((0.25, 1.0)):
        for i in range(4):
            assert abs(wave[b, i].item() - math.cos(t / 10000 ** (i / 4))) < 1e-12
            assert abs(wave[b, 4 + i].item() - math.sin(t / 10000 ** (i / 4))) < 1e-12


def test_velocity_is_zero_and_blocks_are_the_identity_at_init():
    torch.manual_seed(0)
    model = DiT(SMALL)
    inputs = make_inputs()
    velocity, hidden = model(*inputs, hidden_layers=[0, 1, 2])
    assert (velocity == 0).all()
    opened, modulation = model.open(*inputs)
    for layer in range(3):
        assert torch.equal(hidden[layer], opened)
    assert all((m.gate != 0).any() for m in modulation)  # the branches are zero, not the gates: both can learn
    assert abs(model.modulation.weight.std().item() - 0.02) < 1e-3


@pytest.mark.parametrize("junk", [0.0, 1e4])
def test_valid_frames_do_not_depend_on_padding(junk):
    """Neither on what it holds nor on how much of it there is."""
    model = lively()
    x_t, t, cond = make_inputs(frames=12)
    lengths = torch.tensor([12, 5])
    mask = torch.arange(12) < lengths.unsqueeze(1)
    with torch.no_grad():
        velocity, hidden = model(x_t, t, cond, mask, hidden_layers=[1])
        longer = [F.pad(value, (0, 0, 0, 7), value=junk) for value in (x_t, cond)]
        wide = F.pad(mask, (0, 7))
        longer = [torch.where(wide.unsqueeze(-1), value, junk) for value in longer]
        velocity_long, hidden_long = model(longer[0], t, longer[1], wide, hidden_layers=[1])
        unmasked = model(longer[0], t, longer[1])
        for b, n in enumerate(lengths):
            torch.testing.assert_close(velocity_long[b, :n], velocity[b, :n], rtol=0, atol=1e-5)
            torch.testing.assert_close(hidden_long[1][b, :n], hidden[1][b, :n], rtol=0, atol=1e-5)
            alone = model(x_t[b : b + 1, :n], t[b : b + 1], cond[b : b + 1, :n])
            torch.testing.assert_close(velocity[b : b + 1, :n], alone, rtol=0, atol=1e-5)
            assert (unmasked[b, :n] - velocity[b, :n]).abs().max() > 1e-3


def test_a_sample_without_valid_frames_stays_finite():
    model = lively()
    x_t, t, cond = make_inputs()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    velocity = model(x_t, t, cond, mask)
    velocity[0].sum().backward()
    torch.testing.assert_close(velocity[:1], model(x_t[:1], t[:1], cond[:1]), rtol=0, atol=1e-5)
    assert velocity.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_hidden_states_are_the_residual_stream_after_each_block():
    """Against the blocks run one after the other, and without changing the velocity."""
    model = lively()
    inputs = make_inputs()
    with torch.no_grad():
        x, modulation = model.open(*inputs)
        after = []
        for i, branch in enumerate(model.branches):
            m = modulation[i]
            h = F.layer_norm(x, (32,), eps=1e-6) * (1 + m.scale.unsqueeze(1)) + m.shift.unsqueeze(1)
            x = x + m.gate.unsqueeze(1) * branch(h)
            if i % 2:
                after.append(x)
        velocity, hidden = model(*inputs, hidden_layers=[2, 0])
        assert sorted(hidden) == [0, 2]
        for layer in (0, 2):
            torch.testing.assert_close(hidden[layer], after[layer], rtol=0, atol=1e-5)
        assert (after[0] - after[2]).abs().max() > 0.1
        assert torch.equal(velocity, model(*inputs))
        empty, nothing = model(*inputs, hidden_layers=[])
    assert torch.equal(empty, velocity)
    assert nothing == {}


def test_gradients_reach_every_parameter():
    model = lively()
    model(*make_inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_compiled_forward_equals_the_eager_one():
    """In one graph: chosen hidden states come back without hooks, which a full graph would refuse."""
    model = lively(DiTConfig(depth=2, width=16, heads=2, mels=4, cond=3, dropout=0.0, max_frames=16))
    inputs = make_inputs(model.config, frames=9)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    velocity, hidden = compiled(*inputs, mask, hidden_layers=(1, 0))
    expected, expected_hidden = model(*inputs, mask, hidden_layers=(1, 0))
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
    for layer in (0, 1):
        torch.testing.assert_close(hidden[layer], expected_hidden[layer], rtol=0, atol=1e-6)
    (velocity.square().sum() + hidden[0].sum()).backward()
    compiled_grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (expected.square().sum() + expected_hidden[0].sum()).backward()
    for got, parameter in zip(compiled_grads, model.parameters()):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


def test_dropout_only_while_training():
    model = lively(DiTConfig(**{**vars(SMALL), "dropout": 0.5}))
    without = lively()
    without.load_state_dict(model.state_dict())
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(model(*inputs), without(*inputs))
        model.train()
        assert (model(*inputs) - model(*inputs)).abs().max() > 1e-2
        without.train()
        assert torch.equal(without(*inputs), without(*inputs))


def test_dropout_of_the_feed_forward_is_of_its_inner_activations():
    """With an identity second Linear the output is GELU, dropped with p and scaled by 1 / (1 - p)."""
    torch.manual_seed(0)
    branch = FeedForward(16, 16, dropout=0.25).train()
    nn.init.eye_(branch.down.weight)
    nn.init.zeros_(branch.down.bias)
    h = torch.randn(4, 100, 16)
    with torch.no_grad():
        out, kept = branch(h), F.gelu(branch.up(h)) / 0.75
    dropped = out == 0
    torch.testing.assert_close(out[~dropped], kept[~dropped], rtol=1e-5, atol=1e-6)
    assert abs(dropped.float().mean().item() - 0.25) < 0.03


def test_dropout_of_the_attention_is_of_its_weights():
    """All values one and all logits equal: the output is the sum of the weights that were kept."""
    torch.manual_seed(0)
    branch = Attention(4, 1, dropout=0.25).train()
    for parameter in branch.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(branch.qkv.bias[8:])
    nn.init.eye_(branch.out.weight)
    with torch.no_grad():
        kept = branch(torch.randn(8, 16, 4))[..., 0] * 0.75 * 16  # the number of kept keys, of 16
        assert (branch.eval()(torch.randn(8, 16, 4)) - 1).abs().max() < 1e-6
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert abs(kept.mean().item() - 16 * 0.75) < 0.5
    assert abs(kept.std().item() - math.sqrt(16 * 0.75 * 0.25)) < 0.4  # binomial


def test_bfloat16_autocast_is_close():
    model = lively()
    inputs = make_inputs()
    with torch.no_grad():
        expected, hidden = model(*inputs, hidden_layers=[2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity, half = model(*inputs, hidden_layers=[2])
    assert velocity.dtype == torch.bfloat16
    for got, want in ((velocity, expected), (half[2], hidden[2])):
        error = (got.float() - want).norm() / want.norm()
        assert 1e-5 < error < 2e-2


def test_a_model_without_a_condition():
    model = lively(DiTConfig(**{**vars(SMALL), "cond": 0}))
    x_t, t, _ = make_inputs(model.config)
    with torch.no_grad():
        assert (model(x_t, t) - model(x_t, 1 - t)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"cond: expected None, got \[2, 12, 10\]"):
        model(x_t, t, torch.zeros(2, 12, 10))


def test_bad_input_is_named():
    model = lively()
    x_t, t, cond = make_inputs()
    with pytest.raises(ValueError, match=r"x_t: expected non-empty \[batch, frames, 6\], got \[2, 12, 5\]"):
        model(x_t[..., :5], t, cond)
    with pytest.raises(ValueError, match=r"x_t: expected non-empty .* got \[2, 0, 6\]"):
        model(x_t[:, :0], t, cond[:, :0])
    with pytest.raises(ValueError, match="x_t has 65 frames, more than max_frames=64 of the DiTConfig"):
        model(torch.zeros(2, 65, 6), t, torch.zeros(2, 65, 10))
    with pytest.raises(ValueError, match=r"t: expected \[2\], got \[2, 1\]"):
        model(x_t, t.unsqueeze(1), cond)
    with pytest.raises(ValueError, match=r"cond: expected \[2, 12, 10\], got None"):
        model(x_t, t)
    with pytest.raises(ValueError, match=r"cond: expected \[2, 12, 10\], got \[2, 11, 10\]"):
        model(x_t, t, cond[:, 1:])
    with pytest.raises(ValueError, match=r"mask: expected bool \[2, 12\], got torch.float32 \[2, 12\]"):
        model(x_t, t, cond, torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"mask: expected bool \[2, 12\], got torch.bool \[1, 12\]"):
        model(x_t, t, cond, torch.ones(1, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"hidden_layers: expected 0-based layers below 3, got \[-1, 3\]"):
        model(x_t, t, cond, hidden_layers=[3, -1])
