"""The released layout: a checkpoint built here, loaded, and its network computed by hand from the paper's formulas.

Only elementary tensor operations below: no layer, no norm and no attention of torch's.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast.models.conditioning import TokenConditioner
from agrepa_fast.models.dit import Attention, DiT

WIDTH, HEADS, DEPTH, MELS, FRAMES, LAYERS = 16, 4, 3, 5, 11, (0, 2)


def released_checkpoint(dtype=torch.float32, seed=0):
    """Every tensor of a released checkpoint, small, random, nothing left at zero."""
    generator = torch.Generator().manual_seed(seed)

    def linear(name, outs, ins, bias=True):
        state[f"{name}.weight"] = torch.randn(outs, ins, generator=generator, dtype=torch.float64) / math.sqrt(ins)
        if bias:
            state[f"{name}.bias"] = torch.randn(outs, generator=generator, dtype=torch.float64) * 0.3

    state: dict[str, torch.Tensor] = {}
    linear("token_embedding_s3", 7, WIDTH, bias=False)
    linear("token_embedding_as", 9, WIDTH, bias=False)
    linear("P_s3", WIDTH, WIDTH, bias=False)
    linear("P_as", WIDTH, WIDTH, bias=False)
    linear("teacher_proj_speech", 12, WIDTH, bias=False)
    linear("teacher_proj_audio", 6, WIDTH, bias=False)
    linear("input_proj", WIDTH, 2 * MELS + WIDTH)
    linear("time_embed.0", 4 * WIDTH, WIDTH)
    linear("time_embed.2", WIDTH, 4 * WIDTH)
    for n in range(DEPTH):
        linear("in_proj", 3 * WIDTH, WIDTH)
        for kind in ("weight", "bias"):
            state[f"blocks.{n}.attn.in_proj_{kind}"] = state.pop(f"in_proj.{kind}")
        linear(f"blocks.{n}.attn.out_proj", WIDTH, WIDTH)
        linear(f"blocks.{n}.ff.0", 4 * WIDTH, WIDTH)
        linear(f"blocks.{n}.ff.3", WIDTH, 4 * WIDTH)
        linear(f"blocks.{n}.time_mlp.1", 6 * WIDTH, WIDTH)
    for domain, width in (("speech", 12), ("audio", 6)):
        for i in range(len(LAYERS)):
            linear(f"repa_heads_{domain}.{i}.0", WIDTH, WIDTH)
            linear(f"repa_heads_{domain}.{i}.2", width, WIDTH)
    state["output_layer.0.weight"] = 1 + torch.randn(WIDTH, generator=generator, dtype=torch.float64) * 0.2
    state["output_layer.0.bias"] = torch.randn(WIDTH, generator=generator, dtype=torch.float64) * 0.2
    linear("output_layer.1", MELS, WIDTH)
    state["pos_emb"] = torch.from_numpy(sinusoids(40, WIDTH)).unsqueeze(0)
    return {name: value.to(dtype) for name, value in state.items()}


def sinusoids(frames, width):
    """sin on even, cos on odd channels, base 10000; the table is kept in float32."""
    table = np.zeros((frames, width))
    for p in range(frames):
        for c in range(0, width, 2):
            table[p, c] = math.sin(p / 10000 ** (c / width))
            table[p, c + 1] = math.cos(p / 10000 ** (c / width))
    return table.astype(np.float32)


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


def network_by_hand(state, x_t, t, cond, mask=None):
    """Velocity and the output of each block, from the formulas, in the dtype of the checkpoint."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    batch, frames, _ = x_t.shape
    h = linear("input_proj", torch.cat([x_t, cond], -1))
    h = h + torch.from_numpy(sinusoids(frames, WIDTH)).to(h.dtype)
    half = WIDTH // 2
    angle = torch.stack([t * 10000 ** (-i / half) for i in range(half)], -1)
    time = linear("time_embed.2", silu(linear("time_embed.0", torch.cat([angle.cos(), angle.sin()], -1))))
    outputs = []
    for n in range(DEPTH):
        m = linear(f"blocks.{n}.time_mlp.1", silu(time)).unsqueeze(1)
        scale_attn, shift_attn, scale_ff, shift_ff, gate_attn, gate_ff = m.split(WIDTH, -1)

        a = norm(h) * (1 + scale_attn) + shift_attn
        qkv = a @ state[f"blocks.{n}.attn.in_proj_weight"].T + state[f"blocks.{n}.attn.in_proj_bias"]
        q, k, v = (part.reshape(batch, frames, HEADS, WIDTH // HEADS) for part in qkv.split(WIDTH, -1))
        logits = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(WIDTH // HEADS)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -math.inf)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.einsum("bhts,bshd->bthd", weights, v).reshape(batch, frames, WIDTH)
        h = h + gate_attn * linear(f"blocks.{n}.attn.out_proj", mixed)

        f = linear(f"blocks.{n}.ff.0", norm(h) * (1 + scale_ff) + shift_ff)
        f = f * 0.5 * (1 + torch.erf(f / math.sqrt(2)))
        h = h + gate_ff * linear(f"blocks.{n}.ff.3", f)
        outputs.append(h)
    closed = norm(h) * state["output_layer.0.weight"] + state["output_layer.0.bias"]
    return linear("output_layer.1", closed), outputs


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(1)
    x_t, cond, t = (
        torch.randn(2, FRAMES, MELS, generator=generator, dtype=torch.float64),
        torch.randn(2, FRAMES, WIDTH + MELS, generator=generator, dtype=torch.float64),
        torch.tensor([0.13, 0.82], dtype=torch.float64),
    )
    return x_t.to(dtype), t.to(dtype), cond.to(dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_loaded_network_equals_the_one_computed_by_hand(dtype, atol, masked):
    state = released_checkpoint(dtype)
    model = DiT.from_released(state, heads=HEADS).to(dtype)
    if dtype == torch.float64:  # loaded into float32 parameters first
        state = {name: value.float().double() for name, value in state.items()}
    model.eval()
    mask = torch.arange(FRAMES) < torch.tensor([[FRAMES], [6]]) if masked else None
    inputs = make_inputs(dtype)
    with torch.no_grad():
        velocity, hidden = model(*inputs, mask, hidden_layers=range(DEPTH))
    if mask is not None:  # padded frames enter as zeros, whatever they hold
        inputs = [value if value.dim() < 3 else value * mask.unsqueeze(-1) for value in inputs]
    expected, outputs = network_by_hand(state, *inputs, mask)
    assert expected.abs().max() > 0.5  # not all but zero
    torch.testing.assert_close(velocity, expected, rtol=0, atol=atol)
    for layer in range(DEPTH):
        torch.testing.assert_close(hidden[layer], outputs[layer], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["scale", "shift", "gate"])
def test_the_order_of_the_modulation_matters(name):
    """The network by hand is told from one whose chunks are swapped between attention and feed-forward."""
    state = released_checkpoint()
    model = DiT.from_released(state, heads=HEADS).eval()
    first, second = {"scale": (0, 2), "shift": (1, 3), "gate": (4, 5)}[name]
    key = "blocks.1.time_mlp.1.weight"
    parts = list(state[key].split(WIDTH))
    parts[first], parts[second] = parts[second], parts[first]
    inputs = make_inputs(torch.float32)
    wrong, _ = network_by_hand({**state, key: torch.cat(parts)}, *inputs)
    with torch.no_grad():
        assert (model(*inputs) - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_multihead_attention_of_the_same_weights(masked):
    """The released attention is torch's nn.MultiheadAttention: same packing of q, k, v and heads."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = Attention(WIDTH, HEADS, dropout=0.0)
    ours.qkv.weight, ours.qkv.bias = theirs.in_proj_weight, theirs.in_proj_bias
    ours.out.weight, ours.out.bias = theirs.out_proj.weight, theirs.out_proj.bias
    h = torch.randn(2, FRAMES, WIDTH)
    mask = torch.arange(FRAMES) < torch.tensor([[FRAMES], [4]]) if masked else torch.ones(2, FRAMES, dtype=torch.bool)
    expected, _ = theirs(h, h, h, key_padding_mask=~mask, need_weights=False)
    torch.testing.assert_close(ours(h, mask[:, None, None, :]), expected, rtol=0, atol=1e-6)


def test_sizes_come_from_the_shapes():
    state = released_checkpoint()
    config = DiT.from_released(state, heads=2, dropout=0.3).config
    assert (config.depth, config.width, config.heads, config.mels) == (DEPTH, WIDTH, 2, MELS)
    assert (config.cond, config.ff_ratio, config.dropout, config.max_frames) == (WIDTH + MELS, 4, 0.3, 40)
    flat = DiT.from_released({**state, "pos_emb": state["pos_emb"][0]}, heads=2)
    assert flat.config.max_frames == 40
    del state["pos_emb"]
    assert DiT.from_released(state, heads=2).config.max_frames == 2048


def test_every_released_tensor_is_read_or_named_as_another_modules():
    """Change any one tensor: the loaded DiT or conditioner changes, unless it belongs to teachers or heads."""
    state = released_checkpoint()

    def loaded(checkpoint):
        modules = (DiT.from_released(checkpoint, heads=HEADS), TokenConditioner.from_released(checkpoint))
        return [value for module in modules for value in module.state_dict().values()]

    before = loaded(state)
    unread = set()
    for name in state:
        after = loaded({**state, name: state[name] + 1})
        if all(torch.equal(a, b) for a, b in zip(before, after)):
            unread.add(name.split(".")[0])
    assert unread == {"teacher_proj_speech", "teacher_proj_audio", "repa_heads_speech", "repa_heads_audio", "pos_emb"}


@pytest.mark.parametrize(
    "key",
    [
        "input_proj.weight",
        "time_embed.2.bias",
        "blocks.0.ff.0.weight",
        "blocks.1.attn.in_proj_bias",
        "blocks.2.time_mlp.1.weight",
        "output_layer.0.bias",
        "output_layer.1.weight",
    ],
)
def test_a_missing_key_is_named(key):
    state = released_checkpoint()
    del state[key]
    with pytest.raises(ValueError, match=f"released checkpoint: no '{key}'"):
        DiT.from_released(state, heads=HEADS)


def test_a_missing_block_is_named():
    state = {name: value for name, value in released_checkpoint().items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"released checkpoint: no 'blocks\.1\."):
        DiT.from_released(state, heads=HEADS)


@pytest.mark.parametrize(
    "key, expected",
    [
        ("time_embed.0.weight", [64, 16]),
        ("blocks.1.time_mlp.1.weight", [96, 16]),
        ("blocks.2.time_mlp.1.bias", [96]),
        ("blocks.1.attn.out_proj.weight", [16, 16]),
        ("blocks.2.ff.3.weight", [16, 64]),
        ("output_layer.1.bias", [5]),
    ],
)
def test_a_shape_that_does_not_fit_is_named(key, expected):
    state = released_checkpoint()
    state[key] = torch.cat([state[key], state[key]], dim=-1)
    got = list(state[key].shape)
    with pytest.raises(ValueError) as error:
        DiT.from_released(state, heads=HEADS)
    assert str(error.value) == f"released checkpoint: '{key}' is {got}, expected {expected}"


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match=r"width: expected a multiple of heads \(5\), got 16"):
        DiT.from_released(released_checkpoint(), heads=5)


def test_token_tables_are_loaded():
    state = released_checkpoint()
    conditioner = TokenConditioner.from_released(state)
    assert conditioner.vocabularies == {"s3": 7, "as": 9}
    assert conditioner.topology == "single"
    tokens = torch.tensor([[[6], [0], [3]], [[8], [8], [1]]])
    embedded = conditioner.embed(tokens, torch.tensor([0, 1]))
    for b, name in enumerate(("s3", "as")):
        for s in range(3):
            expected = state[f"P_{name}.weight"] @ state[f"token_embedding_{name}.weight"][tokens[b, s, 0]]
            torch.testing.assert_close(embedded[b, s], expected, rtol=0, atol=1e-6)

    only = TokenConditioner.from_released({n: v for n, v in state.items() if "s3" not in n})
    assert only.vocabularies == {"as": 9}


def test_bad_token_tables_are_named():
    state = released_checkpoint()
    with pytest.raises(ValueError, match=r"no 'token_embedding_s3.weight' or 'token_embedding_as.weight'"):
        TokenConditioner.from_released({n: v for n, v in state.items() if "token" not in n})
    with pytest.raises(ValueError, match=r"no 'P_as.weight'"):
        TokenConditioner.from_released({n: v for n, v in state.items() if n != "P_as.weight"})
    dual = {**state, "P_s3.weight": torch.zeros(16, 32)}
    with pytest.raises(ValueError, match=r"'P_s3.weight' is \[16, 32\], expected \[16, 16\]"):
        TokenConditioner.from_released(dual)
    other = {**state, "token_embedding_as.weight": torch.zeros(9, 8)}
    with pytest.raises(ValueError, match=r"'token_embedding_as.weight' is \[9, 8\], expected \[9, 16\]"):
        TokenConditioner.from_released(other)
