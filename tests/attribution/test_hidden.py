"""Hidden states of models without hooks of the user's own: each against a forward hook of this file's."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import agrepa_fast as ag

from .hidden_models import (
    BACKEND,
    DEPTH,
    FRAMES,
    SAMPLES,
    WIDTH,
    Block,
    InPlace,
    Joint,
    Plain,
    hooked,
    made,
    same,
)


@pytest.mark.parametrize("layers", [[0], [1, 3], None])
def test_states_and_velocity_are_those_of_a_hook(layers):
    model, inputs = made(Plain)
    velocity, expected = hooked(model, inputs, layers or range(DEPTH))
    with ag.HiddenStates(model, layers) as states:
        assert torch.equal(model(*inputs), velocity)
        same(states.read(), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_by_name_are_those_of_the_scores():
    model, _ = made(Plain)
    states = ag.HiddenStates(model, ["blocks.2", 0])
    assert states.layers == (0, 2)
    assert states.names == {i: f"blocks.{i}" for i in range(DEPTH)}
    with pytest.raises(ValueError, match=r"no layer 'blocks.4', only 0 to 3 \('blocks.0' to 'blocks.3'\)"):
        ag.HiddenStates(model, ["blocks.4"])
    with pytest.raises(ValueError, match="DataParallel copies the network"):
        ag.HiddenStates(nn.DataParallel(model))
    with pytest.raises(ValueError, match="no layer -1"):
        ag.HiddenStates(model, [-1])


@pytest.mark.parametrize("state, index", [("hidden", 1), (1, 1), ("text", 0), (0, 0)])
def test_one_of_several_states_by_name_or_position(state, index):
    model, inputs = made(Joint)
    layers = [0, 2] if index == 0 else [0, 2, 3]
    _, expected = hooked(model, inputs, layers, lambda output: output[index])
    with ag.HiddenStates(model, layers, state=state) as states:
        model(*inputs)
        same(states.read(), expected)


def test_the_last_blocks_names_are_those_of_the_block_before():
    model, inputs = made(Joint)
    with ag.HiddenStates(model, [3], state="hidden") as states:
        model(*inputs)
        assert states.read()[3].shape == (SAMPLES, FRAMES, WIDTH)
    with ag.HiddenStates(model, [3], state="text") as states:
        model(*inputs)
        with pytest.raises(ValueError, match=r"blocks.3 \(layer 3\) returns .*none of which is 'text'"):
            states.read()


def test_an_ambiguous_state_names_the_options():
    model, inputs = made(Joint)
    with ag.HiddenStates(model, [1]) as states:
        model(*inputs)
        with pytest.raises(ValueError, match=r"'text' \(result 0, \[3, 2, 8\]\), 'hidden' \(result 1, \[3, 6, 8\]\)"):
            states.read()


def test_a_result_that_goes_nowhere_is_no_state():
    class WithWeights(Plain):
        class block(Block):
            def forward(self, hidden, te):
                return super().forward(hidden, te), hidden.softmax(1)

        def forward(self, x, t):
            x = self.head(x)
            for block in self.blocks:
                x, _ = block(x, t)
            return self.tail(x)

    model, inputs = made(WithWeights)
    _, expected = hooked(model, inputs, range(DEPTH), lambda output: output[0])
    with ag.HiddenStates(model) as states:
        model(*inputs)
        same(states.read(), expected)


def test_reads_without_a_forward_are_refused():
    model, inputs = made(Plain)
    states = ag.HiddenStates(model, [1])
    with pytest.raises(ValueError, match="not attached"):
        states.read()
    with states:
        with pytest.raises(ValueError, match=r"none of blocks.1 \(layer 1\) since the last read"):
            states.read()
        model(*inputs)
        states.read()
        with pytest.raises(ValueError, match="since the last read"):
            states.read()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, inputs = made(Plain)
    with ag.HiddenStates(model, [1]) as states:
        model(*inputs)
        states.read()[1].square().sum().backward()
    expected = model.blocks[0].mix.weight.grad.clone()
    model.zero_grad()
    model.recompute, model.reentrant = True, reentrant
    inputs[0].requires_grad_()
    with ag.HiddenStates(model, [1]) as states:
        velocity = model(*inputs)
        if reentrant:
            with pytest.raises(ValueError, match="use_reentrant=False"):
                states.read()
            return
        (states.read()[1].square().sum() + 0 * velocity.sum()).backward()
        assert torch.equal(model.blocks[0].mix.weight.grad, expected)
        with pytest.raises(ValueError, match="since the last read"):  # the recomputation left nothing
            states.read()


def test_states_without_gradient_are_refused_where_one_is_wanted():
    model, inputs = made(Plain)
    with ag.HiddenStates(model, [1]) as states:
        with torch.no_grad():
            model(*inputs)
            states.read()
            model(*inputs)
        with pytest.raises(ValueError, match="the last forward recorded no gradient"):
            states.read()
        with torch.inference_mode():
            model(*inputs)
            states.read()


def test_blocks_that_write_into_their_input():
    model, inputs = made(InPlace)
    _, expected = hooked(model, inputs, [1])
    with torch.no_grad(), ag.HiddenStates(model, [1]) as states:
        model(*inputs)
        with pytest.raises(ValueError, match=r"blocks.1: what follows it writes into its result: .*copy=True"):
            states.read()
    with torch.no_grad(), ag.HiddenStates(model, [1], copy=True) as states:
        model(*inputs)
        same(states.read(), expected)


@pytest.mark.parametrize("kind", [Plain, Joint])
@pytest.mark.parametrize("before", [True, False], ids=["compiled-first", "attached-first"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_whole(kind, before, recompute):
    model, inputs = made(kind, recompute=recompute)
    torch._dynamo.reset()
    velocity, expected = hooked(model, inputs, [1, 3], lambda output: output if kind is Plain else output[1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    if before:
        compiled(*inputs)
    with ag.HiddenStates(compiled, [1, 3], state=None if kind is Plain else "hidden") as states:
        assert torch.equal(compiled(*inputs), velocity)
        same(states.read(), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(*inputs)
            states.read()[3].sum().backward()
            compiled(*inputs)
            states.read()
    assert (
        model.blocks[0].mix.weight.grad.abs().sum() > 0 if kind is Plain else model.blocks[0].a.weight.grad is not None
    )
    assert torch.equal(compiled(*inputs), velocity)


def test_compiled_blocks():
    model, inputs = made(Plain)
    velocity, expected = hooked(model, inputs, [2])
    for block in model.blocks:
        block.compile(fullgraph=True, backend=BACKEND)
    with ag.HiddenStates(model, [2]) as states:
        assert torch.equal(model(*inputs), velocity)
        same(states.read(), expected)
    listed = nn.ModuleList(torch.compile(block, backend=BACKEND) for block in made(Plain)[0].blocks)
    model.blocks = listed
    with ag.HiddenStates(model, [2]) as states:
        assert torch.equal(model(*inputs), velocity)
        same(states.read(), expected)


@pytest.mark.parametrize("kind", [Plain, ag.DiT])
def test_a_probe_keeps_nothing(kind):
    if kind is Plain:
        model, inputs = made(Plain)
    else:
        model, inputs = native()
    with ag.HiddenStates(model, [1]) as states:
        model(*inputs)
        ag.attribute_layers(model, tuple(i[:2] for i in inputs))
        assert states.read()[1].shape[0] == SAMPLES
        ag.attribute_layers(model, inputs)
        with pytest.raises(ValueError, match="since the last read"):
            states.read()


def native():
    torch.manual_seed(0)
    model = ag.DiT(ag.DiTConfig(DEPTH, 16, 2, 5, 0, ff_ratio=2, dropout=0.0, max_frames=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model, (torch.randn(SAMPLES, FRAMES, 5), torch.rand(SAMPLES))


@pytest.mark.parametrize("compiled", [False, True])
def test_our_dit(compiled):
    model, inputs = native()
    velocity, expected = model(*inputs, hidden_layers=[0, 2])
    run = torch.compile(model, fullgraph=True, backend=BACKEND) if compiled else model
    if compiled:
        run(*inputs)
    with ag.HiddenStates(run, [0, 2]) as states:
        assert torch.equal(run(*inputs), velocity)
        same(states.read(), expected)
        again, asked = model(*inputs, hidden_layers=[1])
        assert torch.equal(again, velocity)
        assert list(asked) == [1]
        same(states.read(), expected)
    assert "forward" not in vars(model)


def test_copies_and_pickles_are_free_of_it():
    model, inputs = made(Plain)
    with ag.HiddenStates(model, [1]) as states:
        model(*inputs)
        ema = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        states.read()
        for twin in (ema, read):
            with torch.no_grad():
                twin.blocks[1].mix.weight.zero_()
            assert not torch.equal(twin(*inputs), model(*inputs))
            states.read()
            twin(*inputs)
            with pytest.raises(ValueError, match="since the last read"):
                states.read()


def test_two_at_once_leave_in_any_order():
    model, inputs = made(Plain)
    velocity, expected = hooked(model, inputs, [1])
    own = vars(model.blocks[1])["forward"] = model.blocks[1].forward  # somebody else's
    first, second = ag.HiddenStates(model, [1]).attach(), ag.HiddenStates(model, [1]).attach()
    model(*inputs)
    same(first.read(), expected)
    same(second.read(), expected)
    first.detach()
    assert torch.equal(model(*inputs), velocity)
    same(second.read(), expected)
    second.detach()
    assert vars(model.blocks[1])["forward"] == own
    assert "forward" not in vars(model.blocks[0])


def test_a_wrapper_around_ours_outlives_it():
    model, inputs = made(Plain)
    states = ag.HiddenStates(model, [1]).attach()
    ours = model.blocks[1].forward
    vars(model.blocks[1])["forward"] = lambda *args: ours(*args)
    states.detach()
    model(*inputs)
    assert not states._taps[1].output


def test_switched_off_it_keeps_nothing():
    model, inputs = made(Plain)
    with ag.HiddenStates(model, [1]) as states:
        states.on = False
        model(*inputs)
        with pytest.raises(ValueError, match="since the last read"):
            states.read()


def test_compile_settings_come_back():
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    before = getattr(torch._dynamo.config, name)
    model, _ = made(Plain)
    with ag.HiddenStates(model, [1]), ag.HiddenStates(model, [2]):
        assert getattr(torch._dynamo.config, name)
    assert getattr(torch._dynamo.config, name) == before
