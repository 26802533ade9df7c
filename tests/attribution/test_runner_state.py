"""What a probe leaves behind (nothing), and what it says about networks and inputs that it cannot score."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import DiT, DiTConfig, attribute_layers, select_layers
from agrepa_fast.models.dit import Attention

ENGINES = ["auto", "prefix", "stacked", "loop"]
DEPTH, WIDTH, HEADS, MELS, COND, BATCH, FRAMES = 3, 16, 2, 5, 3, 3, 9


def mixed_flags(model: DiT) -> dict[str, bool]:
    """Flags that no call of train() or eval() could have made."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 1
    return {name: module.training for name, module in model.named_modules()}


def snapshot(model: DiT):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (value.detach().clone(), value.requires_grad, value.grad) for name, value in tensors.items()}


def assert_untouched(model: DiT, before, flags, random_state):
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.get_rng_state().equal(random_state)
    assert torch.is_grad_enabled()
    for name, (value, requires_grad, grad) in snapshot(model).items():
        assert value.equal(before[name][0]), name
        assert (requires_grad, grad) == before[name][1:], name


class Draws(Attention):
    """An attention that draws a random number on the way, and may fail."""

    fail = False

    def forward(self, h, key_mask=None):
        torch.rand(1)
        if self.fail:
            raise RuntimeError("out of memory")
        return super().forward(h, key_mask)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fail", [False, True])
def test_leaves_everything_as_it_was(build, draw, engine, fail):
    model, inputs = build(dropout=0.5), draw()
    model.branches[2].__class__ = Draws
    model.branches[2].fail = fail
    model.input.weight.requires_grad_(False)
    flags, before = mixed_flags(model), snapshot(model)
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    if fail:
        with pytest.raises(RuntimeError, match="out of memory"):
            attribute_layers(model, inputs, engine=engine)
    else:
        inputs["x_t"].requires_grad_(True)
        scores = attribute_layers(model, inputs, engine=engine)
        assert not scores.by_sample.requires_grad
        assert inputs["x_t"].grad is None
    assert_untouched(model, before, flags, random_state)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_of_a_model_in_training_stays_off(build, draw, engine):
    model, inputs = build(dropout=0.5), draw()
    expected = attribute_layers(model.eval(), inputs, engine=engine).by_sample
    assert attribute_layers(model.train(), inputs, engine=engine).by_sample.equal(expected)
    assert not model(**inputs).equal(model(**inputs))  # while training, two forwards do differ


def test_weights_that_are_not_finite_are_named_and_leave_no_trace(build, draw):
    model, inputs = build(), draw()
    with torch.no_grad():
        model.branches[3].down.bias[0] = torch.nan
    flags, before, random_state = mixed_flags(model), snapshot(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="baseline velocity of sample 0 is not finite"):
        attribute_layers(model, inputs)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.get_rng_state().equal(random_state)
    assert all(
        value.equal(before[name][0]) for name, (value, *_) in snapshot(model).items() if "3.down.bias" not in name
    )


def test_an_ablation_that_is_not_finite_names_sample_and_layer(build, draw):
    """Layer 0 shrinks the stream of sample 1; without it layer 1's values overflow."""
    model, inputs = build(depth=2, cond=0), draw(cond=0, masked=False)
    original = model.branches[3].forward

    def overflow(h, key_mask=None):
        out = original(h, key_mask)
        # The staircase's rows here: the control, the baseline's three samples, those of the stream without layer 0.
        return out.index_fill(0, torch.tensor([1 + BATCH + 1]), torch.inf)

    model.branches[3].forward = overflow
    with pytest.raises(ValueError, match="velocity of sample 1 without layer 0 is not finite"):
        attribute_layers(model, inputs)


@pytest.mark.parametrize("metric", ["rms", "squared"])
def test_a_network_at_its_initialisation(draw, metric):
    torch.manual_seed(0)
    model = DiT(DiTConfig(depth=4, width=WIDTH, heads=HEADS, mels=MELS, cond=COND, max_frames=16))
    with pytest.warns(UserWarning, match="velocity is identically zero.*train before probing"):
        scores = attribute_layers(model, draw(), metric=metric)
    assert scores.by_sample.count_nonzero() == 0
    with pytest.warns(UserWarning, match="equal weights on all layers"):
        selection = select_layers(scores, k=2)
    assert selection.layers == (0, 1, 2, 3)
    assert selection.weights == (0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("metric", ["rms", "squared"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_without_effect_is_not_above_the_floor(build, draw, metric, engine):
    model, inputs = build(), draw()
    with torch.no_grad():
        model.branches[2].out.weight.zero_(), model.branches[2].out.bias.zero_()
        model.branches[3].down.weight.zero_(), model.branches[3].down.bias.zero_()
    scores = attribute_layers(model, inputs, metric=metric, engine=engine)
    assert scores.above_floor.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model": len}, TypeError, "expected a torch.nn.Module, got builtin_function_or_method"),
        ({"engine": "fast"}, ValueError, "engine: expected one of .*, got 'fast'"),
        ({"metric": "cosine"}, ValueError, "metric: expected one of .*, got 'cosine'"),
        ({"blocks": [0, DEPTH]}, ValueError, r"0-based layers below 3, got \[0, 3\]"),
        ({"blocks": [1, 1]}, ValueError, "distinct"),
        ({"branches": ["mlp"]}, ValueError, "mlp"),
        ({"domains": ["speech"]}, ValueError, "domains: expected 3 names, got 1"),
        ({"max_samples": 0}, ValueError, "max_samples"),
        ({"inputs": {"x": torch.zeros(1)}}, TypeError, r"expected x_t, t and perhaps cond, mask; got \['x'\]"),
        ({"inputs": {"x_t": None, "t": torch.zeros(1)}}, TypeError, r"got \['t'\]"),
        ({"inputs": torch.zeros(3, 9, 5)}, TypeError, "mapping or a tuple"),
        ({"t": [0.1, 0.5, 0.9]}, TypeError, "t: expected a tensor with the samples first, got list"),
        ({"t": torch.tensor(0.5)}, TypeError, "t: .* got a scalar"),
        ({"t": torch.rand(BATCH + 1)}, ValueError, r"t: expected 3 samples as in x_t, got \[4\]"),
        ({"cond": torch.randn(BATCH + 2, FRAMES, COND)}, ValueError, r"cond: expected 3 samples .* got \[5, 9, 3\]"),
        ({"mask": torch.ones(BATCH, FRAMES)}, ValueError, "mask: expected bool"),
        ({"x_t": torch.zeros(0, FRAMES, MELS)}, ValueError, "at least one sample"),
        ({"mask": torch.arange(BATCH).repeat(FRAMES, 1).T != 1}, ValueError, "mask: sample 1 has no valid frame"),
    ],
)
def test_bad_input_is_named(build, draw, change, error, message):
    arguments = {"model": build(), "inputs": draw()}
    for name, value in change.items():
        (arguments["inputs"] if name in ("x_t", "t", "cond", "mask") else arguments)[name] = value
    with pytest.raises(error, match=message):
        attribute_layers(**arguments)
