"""Hidden states of models without hooks of the user's own: each against a forward hook of this file's."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import agrepa_fast as ag

WIDTH, FRAMES, SAMPLES, DEPTH = 8, 6, 3, 4
BACKEND = "eager"  # what Dynamo traces is the question here, not what a compiler makes of it


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, te):
        return hidden + torch.tanh(self.mix(hidden) + te[:, None, None])


class Plain(nn.Module):
    """Blocks of one state; `recompute` checkpoints them, `reentrant` in PyTorch's older way."""

    block = Block
    recompute = reentrant = False

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(DEPTH))
        self.tail = nn.Linear(WIDTH, 5)

    def forward(self, x, t):
        x = self.head(x)
        for block in self.blocks:
            x = checkpoint(block, x, t, use_reentrant=self.reentrant) if self.recompute else block(x, t)
        return self.tail(x)


class InPlaceBlock(Block):
    def forward(self, hidden, te):
        hidden += torch.tanh(self.mix(hidden.clone()) + te[:, None, None])
        return hidden.view_as(hidden)


class InPlace(Plain):
    block = InPlaceBlock


class Joint(nn.Module):
    """Two states, as SD3's blocks: the last one returns only the second."""

    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), last

        def forward(self, hidden, text, te=None):
            mixed = torch.tanh(self.a(hidden) + te[:, None, None]) + self.b(text).mean(1, keepdim=True)
            return None if self.last else text + self.b(text), hidden + mixed

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(i == DEPTH - 1) for i in range(DEPTH))
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t):
        text = x[:, :2].cos()
        for block in self.blocks:
            text, x = block(x, text=text, te=t)
        return self.tail(x)


def made(kind, **attributes):
    torch.manual_seed(0)
    model = kind()
    for name, value in attributes.items():
        setattr(model, name, value)
    size = WIDTH if kind is Joint else 5
    return model, (torch.randn(SAMPLES, FRAMES, size), torch.rand(SAMPLES))


def hooked(model, inputs, layers, pick=lambda output: output):
    """{layer: what the block returned}, by forward hooks, with the velocity."""
    found = {}
    handles = [
        model.blocks[layer].register_forward_hook(
            lambda _m, _a, output, layer=layer: found.__setitem__(layer, pick(output).clone())
        )
        for layer in layers
    ]
    velocity = model(*inputs)
    for handle in handles:
        handle.remove()
    return velocity, found


def same(states, expected):
    assert list(states) == list(expected)
    for layer, state in states.items():
        torch.testing.assert_close(state, expected[layer], rtol=0, atol=0)


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
        with pytest.raises(ValueError, match="without gradient"):
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


def test_diffusers_sd3():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=8,
    )  # fmt: skip
    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([100.0, 700.0]),
    }
    velocity = model(**batch).sample
    with ag.HiddenStates(model, ["transformer_blocks.0", 2], state="hidden_states") as states:
        assert torch.equal(model(**batch).sample, velocity)
        assert {layer: list(state.shape) for layer, state in states.read().items()} == {0: [2, 16, 16], 2: [2, 16, 16]}
        model.enable_gradient_checkpointing()
        model(**batch)
        states.read()[0].sum().backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad.abs().sum() > 0


def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["mix"], r=2, init_lora_weights=False)
    model, inputs = made(Plain)
    states = ag.HiddenStates(model, [2]).attach()
    lora = peft.get_peft_model(model, config)
    again = ag.HiddenStates(lora, [2]).attach()
    velocity = lora(*inputs)
    one, two = states.read()[2], again.read()[2]
    assert torch.equal(one, two)
    (one.sum() + velocity.sum()).backward()
    grads = {name for name, p in lora.named_parameters() if p.grad is not None}
    assert grads
    assert all("lora" in name for name in grads)
    scores = ag.attribute_layers(lora, inputs)
    assert ag.HiddenStates(lora, [scores.names[2]]).layers == (2,)
    assert scores.layers == tuple(range(DEPTH))


class TwoLists(Plain):
    """Blocks of two lists, as FLUX has them; the second list runs first."""

    def __init__(self):
        super().__init__()
        self.single_blocks = nn.ModuleList(Block() for _ in range(2))
        self.double_blocks = nn.ModuleList(Block() for _ in range(2))
        del self.blocks

    def forward(self, x, t):
        x = self.head(x)
        for block in [*self.double_blocks, *self.single_blocks]:
            x = block(x, t)
        return self.tail(x)


def test_with_a_batch_blocks_are_those_of_the_scores():
    torch.manual_seed(0)
    model, inputs = TwoLists(), (torch.randn(SAMPLES, FRAMES, 5), torch.rand(SAMPLES))
    scores = ag.attribute_layers(model, inputs)
    states = ag.HiddenStates(model, inputs=inputs)
    assert tuple(states.names.values()) == scores.names
    with states.attach():
        model(*inputs)
        read = states.read()
    hidden = model.head(inputs[0])
    for layer, block in enumerate([*model.double_blocks, *model.single_blocks]):
        hidden = block(hidden, inputs[1])
        assert torch.equal(read[layer], hidden)
    aligner = ag.Aligner(model, {"a": 3}, k=1, width=WIDTH, probe=ag.ProbePlan(1), inputs=inputs)
    assert torch.equal(aligner.step(1, inputs).by_sample, scores.by_sample)
    backwards = ag.Aligner(
        model, {"a": 3}, k=1, width=WIDTH, probe=ag.ProbePlan(1), block_list=["single_blocks", "double_blocks"]
    )
    with pytest.raises(ValueError, match=r"layer 0 of the probe is double_blocks.0, of .* single_blocks"):
        backwards.step(1, inputs)
