"""Hidden states of a diffusers model, under LoRA, of several block lists, and of layers that are lists of modules."""

from __future__ import annotations

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
    Plain,
    made,
)


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


class Listed(nn.Module):
    """Layers that are lists of modules: of a norm, an optional gate, and a list of two branches."""

    def __init__(self, gated=(1, 2), width=WIDTH):
        super().__init__()
        self.head, self.tail = nn.Linear(5, width), nn.Linear(width, 5)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Linear(width, width) if layer in gated else None,
                    nn.LayerNorm(width),
                    nn.ModuleList(nn.Linear(width, width) for _ in range(2)),
                ]
            )
            for layer in range(DEPTH)
        )

    def forward(self, x, t, kept=None):
        x = self.head(x) + t[:, None, None]
        for gate, norm, branches in self.layers:
            if kept is not None:
                kept.append(x)
            if gate is not None:
                x = gate(x) + x
            for branch in branches:
                x = x + branch(norm(x))  # the norm is called twice
        return self.tail(self.norm(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_are_lists_of_modules(compiled):
    model, inputs = made(Listed)
    kept = []
    velocity = model(*inputs, kept)
    run = torch.compile(model, fullgraph=True, backend=BACKEND) if compiled else model
    with ag.HiddenStates(model) as states:
        assert states.layers == (0, 1, 2)
        with torch.no_grad():
            run(*inputs)  # a forward without a read: the next one takes its place
        for _ in range(3):
            assert torch.equal(run(*inputs), velocity)
            found = states.read()
            assert [torch.equal(found[layer], kept[layer + 1]) for layer in states.layers] == [True] * 3
            expected = torch.autograd.grad(kept[2].square().sum(), model.head.weight, retain_graph=True)
            assert torch.equal(*torch.autograd.grad(found[1].square().sum(), model.head.weight), *expected)
        with pytest.raises(ValueError, match=r"hidden states: none of layers\.0"):
            states.read()
    assert not any("forward" in vars(module) for module in model.modules())
    assert ag.HiddenStates(model, inputs=inputs).names == {layer: f"layers.{layer}" for layer in range(DEPTH)}
    with pytest.raises(ValueError, match=r"layers: 'layers.3' is a list of modules .* choose among 0 to 2"):
        ag.HiddenStates(model, [1, 3])
