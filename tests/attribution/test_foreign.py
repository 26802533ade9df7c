"""Other people's models: every engine against a loop written here that takes one block out of the list at a time."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import attribute_layers
from agrepa_fast.attribution.foreign import register
from agrepa_fast.attribution.foreign.drive import NotAStaircase
from agrepa_fast.attribution.foreign.register import Adapter, register_adapter

WIDTH, FRAMES, SAMPLES, DEPTH = 8, 6, 3, 4
ENGINES = ["auto", "prefix", "stacked", "loop"]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(register, "_ADAPTERS", {})


class Block(nn.Module):
    """Mixes frames and channels, by the time embedding, a table of positions and an optional mask."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.frames = nn.Linear(FRAMES, FRAMES)

    def forward(self, x, te, *, table, extra=None):
        h = torch.tanh(self.mix(x) * (1 + te[:, None]) + table)
        h = self.frames(h.mT).mT
        if extra is not None:
            h = h * extra["masks"][0][..., None]
        return x + h


class Off(nn.Module):
    """A block that is switched off, whatever it is called with."""

    def forward(self, x, *args, **kwargs):
        return x


class Chain(nn.Module):
    """A plain transformer: head, blocks, and a tail that uses the time embedding."""

    def __init__(self, depth=DEPTH):
        super().__init__()
        self.head = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.tail = nn.Linear(WIDTH, 5)

    def forward(self, x, t, mask=None):
        te = torch.stack([(t * (i + 1)).cos() for i in range(WIDTH)], -1)
        # As many rows as samples (3): it must not be repeated for that.
        table = torch.linspace(-1, 1, FRAMES, dtype=x.dtype)[:, None].expand(FRAMES, WIDTH)
        extra = None if mask is None else {"masks": [mask]}
        h = self.head(x)
        for block in self.blocks:
            h = block(h, te, table=table, extra=extra)
        return self.tail(h * (1 + te[:, None]))


class InPlace(Chain):
    """Blocks that write into their input."""

    class Block(Block):
        def forward(self, x, te, *, table, extra=None):
            return x.copy_(super().forward(x, te, table=table, extra=extra))

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.__class__ = InPlace.Block


class UNetSkips(Chain):
    """Long skips: the second half adds what the first half put out."""

    def __init__(self, extra_tail=False):
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, t, mask=None):
        te = torch.stack([(t * (i + 1)).cos() for i in range(WIDTH)], -1)
        table = torch.zeros(FRAMES, WIDTH, dtype=x.dtype)
        h, skips = self.head(x), []
        for i, block in enumerate(self.blocks):
            if i >= DEPTH // 2:
                h = self.join(torch.cat([h, skips.pop()], -1))
            h = block(h, te, table=table)
            skips.append(h)
        return SimpleNamespace(sample=self.tail(h))


class LateSkip(Chain):
    """A pure chain of blocks whose tail looks back at block 1."""

    def forward(self, x, t, mask=None):
        te = t[:, None].expand(-1, WIDTH)
        h, kept = self.head(x), []
        for block in self.blocks:
            h = block(h, te, table=torch.zeros(FRAMES, WIDTH, dtype=x.dtype))
            kept.append(h)
        return (self.tail(h + (kept[1] if kept[1].shape == h.shape else 0)),)


class TwoStates(nn.Module):
    """As in joint (image, text) transformers: blocks by keyword, two states, the last one returns only one."""

    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), last

        def forward(self, hidden, context, te):
            both = torch.tanh(self.a(hidden)).mean(1, keepdim=True) + torch.tanh(self.b(context)).mean(1, keepdim=True)
            moved = hidden + both * te[:, None] + torch.sin(hidden)
            return None if self.last else context + both.square(), moved

    class Off(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.last = last

        def forward(self, hidden, context, te):
            return None if self.last else context, hidden

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(TwoStates.Block(i + 1 == DEPTH) for i in range(DEPTH))
        self.head, self.tail = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x, context, timestep):
        hidden, te = self.head(x), timestep[:, None].expand(-1, WIDTH)
        for block in self.transformer_blocks:
            context, hidden = block(hidden=hidden, context=context, te=te)
        return self.tail(hidden)


class Encoder(nn.Module):
    """PyTorch's own encoder, frames first inside, with a key padding mask [samples, frames]."""

    class Off(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return src

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.3, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=batch_first)
        self.head, self.batch_first = nn.Linear(5, WIDTH), batch_first

    def forward(self, x, t, mask):
        h = self.head(x) + t[:, None, None]
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.encoder(h, src_key_padding_mask=~mask)
        return h if self.batch_first else h.transpose(0, 1)


def build(kind, *args, dtype=torch.float64):
    model = kind(*args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def draw(dtype=torch.float64, samples=SAMPLES, masked=False):
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(samples, FRAMES, 5, generator=generator).to(dtype),
        "t": torch.rand(samples, generator=generator).to(dtype),
    }
    if masked:
        inputs["mask"] = torch.arange(FRAMES) < torch.tensor([[6], [4], [5]])[:samples]
    return inputs


@torch.no_grad()
def scores_by_loop(model, blocks, inputs, off=lambda i: Off(), mask=None):
    """[L, N]: one forward for each sample and each block taken out of its list."""
    model = copy.deepcopy(model).eval()
    blocks = model.get_submodule(blocks)

    def forward(n):
        velocity = model(**{name: value[n : n + 1] for name, value in inputs.items()})
        velocity = velocity[0] if isinstance(velocity, tuple) else getattr(velocity, "sample", velocity)
        velocity = velocity[0].double().numpy()
        return velocity if mask is None else velocity[mask[n].numpy()[: len(velocity)]]

    samples = len(next(iter(inputs.values())))
    result = np.zeros((len(blocks), samples))
    for n in range(samples):
        base = forward(n)
        for k in range(len(blocks)):
            own = blocks[k]
            blocks[k] = off(k)
            change = np.mean((forward(n) - base) ** 2)
            blocks[k] = own
            result[k, n] = np.sqrt(change + 1e-8) / (np.sqrt(np.mean(base**2) + 1e-8) + 1e-8)
    assert (result > 5e-4).all()
    return result


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Chain, InPlace])
def test_a_chain_equals_the_loop(kind, engine, samples):
    model, inputs = build(kind), draw(samples=samples)
    scores = attribute_layers(model, inputs, engine=engine)
    expected = scores_by_loop(build(Chain), "blocks", inputs)
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-10)
    assert scores.t.tolist() == pytest.approx(inputs["t"].tolist())
    assert scores.block_evaluations == (DEPTH * (DEPTH + 1) / 2 if engine in ("auto", "prefix") else None)


@functools.cache
def loop_in(kind, dtype, weights):
    model, inputs = build(kind, dtype=weights).to(dtype), draw(weights)
    return scores_by_loop(model, "blocks", {name: value.to(dtype) for name, value in inputs.items()})


@pytest.mark.filterwarnings("ignore:layers .* change the velocity by less")
@pytest.mark.parametrize("max_samples", [None, 1, 2])
@pytest.mark.parametrize(
    "kind, engine", [(Chain, name) for name in ENGINES[1:]] + [(UNetSkips, "stacked"), (UNetSkips, "loop")]
)
def test_every_engine_split_and_dtype(kind, engine, max_samples):
    """float64 and float32 to their bounds; bfloat16 within twice the error of the bfloat16 loop, against float64."""

    def scores(dtype):
        return attribute_layers(
            build(kind, dtype=dtype), draw(dtype), engine=engine, max_samples=max_samples
        ).by_sample.numpy()

    wide = torch.float64
    np.testing.assert_allclose(scores(wide), loop_in(kind, wide, wide), rtol=1e-10)
    np.testing.assert_allclose(scores(torch.float32), loop_in(kind, wide, torch.float32), rtol=1e-5, atol=1e-6)
    exact, narrow = loop_in(kind, wide, torch.bfloat16), loop_in(kind, torch.bfloat16, torch.bfloat16)
    error, of_loop = (np.sqrt(np.mean((part - exact) ** 2)) for part in (scores(torch.bfloat16), narrow))
    assert error <= 2 * of_loop


def test_single_precision_and_nested_masks():
    inputs = draw(torch.float32, masked=True)
    scores = attribute_layers(build(Chain, dtype=torch.float32), (inputs["x"], inputs["t"], inputs["mask"]))
    wide = draw(masked=True)
    expected = scores_by_loop(build(Chain), "blocks", wide, mask=wide["mask"])
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-5)


def test_what_has_as_many_rows_as_there_are_samples_is_not_repeated():
    """The table is [frames, width], and here there are as many samples as frames."""
    inputs = draw(samples=FRAMES)
    scores = attribute_layers(build(Chain), inputs, engine="prefix")
    np.testing.assert_allclose(scores.by_sample.numpy(), scores_by_loop(build(Chain), "blocks", inputs), rtol=1e-10)


@pytest.mark.parametrize("blocks, max_samples", [([0, 2], None), ([3], 2), (None, 1), ([1, 0], 2)])
def test_subsets_and_parts(blocks, max_samples):
    inputs = draw()
    scores = attribute_layers(build(Chain), inputs, blocks, max_samples=max_samples)
    chosen = sorted(range(DEPTH) if blocks is None else blocks)
    assert scores.layers == tuple(chosen)
    np.testing.assert_allclose(
        scores.by_sample.numpy(), scores_by_loop(build(Chain), "blocks", inputs)[chosen], rtol=1e-10
    )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("engine", ["auto", "stacked", "loop"])
@pytest.mark.parametrize("kind", [UNetSkips, LateSkip])
def test_long_skips_run_dense(kind, engine, samples):
    inputs = draw(samples=samples)
    scores = attribute_layers(build(kind), inputs, engine=engine)
    np.testing.assert_allclose(scores.by_sample.numpy(), scores_by_loop(build(kind), "blocks", inputs), rtol=1e-10)
    assert scores.block_evaluations is None


@pytest.mark.parametrize("kind", [UNetSkips, LateSkip])
def test_a_staircase_that_would_be_wrong_is_refused(kind):
    with pytest.raises(NotAStaircase, match=r"between blocks\.1|reaches past the blocks"):
        attribute_layers(build(kind), draw(), engine="prefix")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_states_by_keyword(engine):
    inputs = {"x": draw()["x"], "context": torch.randn(SAMPLES, 2, WIDTH).double(), "timestep": draw()["t"]}
    model = build(TwoStates)
    expected = scores_by_loop(model, "transformer_blocks", inputs, lambda i: TwoStates.Off(i + 1 == DEPTH))
    np.testing.assert_allclose(attribute_layers(model, inputs, engine=engine).by_sample.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_transformer_encoder(engine, batch_first):
    """Also with the frames before the samples inside, and with dropout on while it trains."""
    model, inputs = build(Encoder, batch_first).train(), draw(masked=True)
    scores = attribute_layers(model, inputs, engine=engine)

    def off(layer):
        return Encoder.Off(WIDTH, 2, 16, batch_first=batch_first).double()

    expected = scores_by_loop(model, "encoder.layers", inputs, off, inputs["mask"])
    np.testing.assert_allclose(scores.by_sample.numpy(), expected, rtol=1e-10)
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_compiled_model_is_scored_and_stays_compiled():
    expected = scores_by_loop(build(Chain), "blocks", draw())
    whole = torch.compile(build(Chain), backend="eager")
    assert np.allclose(attribute_layers(whole, draw()).by_sample.numpy(), expected, rtol=1e-10)
    by_block = build(Chain)
    by_block.blocks[1] = torch.compile(by_block.blocks[1], backend="eager")
    by_block.blocks[2].compile(backend="eager")
    before = (by_block.blocks[1], by_block.blocks[2]._compiled_call_impl)
    assert np.allclose(attribute_layers(by_block, draw()).by_sample.numpy(), expected, rtol=1e-10)
    assert (by_block.blocks[1], by_block.blocks[2]._compiled_call_impl) == before


@pytest.mark.parametrize("fail_at", [None, 1, 4, 9, 14, 18])
def test_leaves_everything_as_it_was(fail_at):
    """Also when the fail_at-th block call raises: while recording, growing, or running the tail."""
    model, calls = build(Chain), []

    def count(module, args):
        calls.append(module)
        if len(calls) == fail_at:
            raise RuntimeError("out of memory")

    for block in model.blocks:
        block.register_forward_pre_hook(count)
    model.blocks[2].forward = Block.forward.__get__(model.blocks[2])  # as libraries of hooks leave it
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 1
    before = [(dict(vars(m)), m.training) for m in model.modules()]
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    if fail_at is None:
        attribute_layers(model, draw())
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            attribute_layers(model, draw())
    for module, (attributes, training) in zip(model.modules(), before):
        assert vars(module).keys() == attributes.keys()
        assert vars(module).get("forward") is attributes.get("forward")
        assert module.training == training
    assert torch.get_rng_state().equal(random_state)
    assert torch.is_grad_enabled()


def test_evaluations_as_counted_by_hooks():
    """The staircase, and before it the runs on one, one and two samples that find the wiring out, and the noise's."""
    model, rows = build(Chain), [0] * DEPTH
    for i, block in enumerate(model.blocks):
        block.mix.register_forward_hook(lambda _, args, __, i=i: rows.__setitem__(i, rows[i] + args[0].shape[0]))
    attribute_layers(model, draw())
    assert rows == [1 + 1 + 2 + 1 + (i + 1) * SAMPLES for i in range(DEPTH)]


class Noisy(Chain):
    def forward(self, x, t, mask=None):
        return super().forward(x + 1e-3 * torch.randn_like(x), t)


class Dropping(Chain):
    def forward(self, x, t, mask=None):
        return nn.functional.dropout(super().forward(x, t), 0.1)


class HarmlessDraw(Chain):
    def forward(self, x, t, mask=None):
        torch.rand(1)
        return super().forward(x, t)


@pytest.mark.parametrize("kind", [Noisy, Dropping])
def test_a_random_forward_is_found(kind):
    with pytest.raises(ValueError, match="draws random numbers"):
        attribute_layers(build(kind), draw())


def test_drawing_without_using_is_no_fault():
    expected = attribute_layers(build(Chain), draw()).by_sample
    assert attribute_layers(build(HarmlessDraw), draw()).by_sample.equal(expected)


class Named(Chain):
    def __init__(self):
        super().__init__()
        self.stages = self.blocks
        del self.blocks

    @property
    def blocks(self):
        return self.stages


def test_no_blocks_found_says_what_was_searched_and_how_to_name_them():
    model = build(Named)
    message = r"no blocks found in Named: looked for .*transformer_blocks, blocks.*it has: stages \(4\)\. .*block_list="
    with pytest.raises(ValueError, match=message):
        attribute_layers(model, draw())
    expected = attribute_layers(build(Chain), draw()).by_sample
    with pytest.raises(ValueError, match=r"no module list 'stage'; it has: stages \(4\)"):
        attribute_layers(model, draw(), block_list="stage")
    given = attribute_layers(model, draw(), block_list="stages").by_sample
    register_adapter(Chain, Adapter(block_list="stages"))  # of the parent class
    registered = attribute_layers(model, draw()).by_sample
    assert given.shape == expected.shape
    assert registered.equal(given)


class WithTwoLists(Chain):
    def __init__(self):
        super().__init__()
        self.blocks, self.layers = self.blocks[:2], self.blocks[2:]

    def forward(self, x, t, mask=None):
        own = Chain.__new__(Chain)
        nn.Module.__init__(own)
        own.head, own.tail, own.blocks = self.head, self.tail, nn.ModuleList([*self.blocks, *self.layers])
        return {"velocity": own(x, t)}


def test_several_lists_must_be_named_and_the_velocity_picked():
    model = build(Chain)
    two = WithTwoLists()
    two.load_state_dict(
        {k.replace("blocks.2", "layers.0").replace("blocks.3", "layers.1"): v for k, v in model.state_dict().items()}
    )
    two.double()
    with pytest.raises(ValueError, match="several block lists found in WithTwoLists: blocks, layers"):
        attribute_layers(two, draw())
    with pytest.raises(TypeError, match=r"returns dict: .*register_adapter"):
        attribute_layers(two, draw(), block_list=("blocks", "layers"))
    register_adapter(WithTwoLists, Adapter(("blocks", "layers"), velocity=lambda output: output["velocity"]))
    assert attribute_layers(two, draw()).by_sample.equal(attribute_layers(model, draw()).by_sample)
    register_adapter(WithTwoLists, Adapter(("blocks", "layers"), lambda output: output["velocity"], dense=True))
    dense = attribute_layers(two, draw())
    assert dense.block_evaluations is None
    assert torch.allclose(dense.by_sample, attribute_layers(model, draw()).by_sample, rtol=1e-10)


class Narrowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4), nn.Linear(4, 4))

    def forward(self, x, t):
        return self.layers(x)


class Reversed(Chain):
    def forward(self, x, t, mask=None):
        te = t[:, None].expand(-1, WIDTH)
        h = self.head(x)
        for block in reversed(self.blocks):
            h = block(h, te, table=torch.zeros(FRAMES, WIDTH, dtype=x.dtype))
        return self.tail(h)


def test_blocks_that_cannot_be_switched_off_are_named():
    with pytest.raises(ValueError, match=r"layers\.1 \(layer 1\) maps \[1, 6, 5\] to \[1, 6, 4\]"):
        attribute_layers(build(Narrowing), draw())
    with pytest.raises(ValueError, match=r"4 blocks once each and in order .*blocks\.3"):
        attribute_layers(build(Reversed), draw())
    shared = build(Chain)
    shared.blocks[1] = shared.blocks[0]
    with pytest.raises(ValueError, match="the same block stands in it twice"):
        attribute_layers(shared, draw())


def test_a_velocity_that_is_not_finite_names_the_layer():
    model = build(Chain)
    with torch.no_grad():
        model.head.bias.fill_(1e200)  # finite only because block 0 brings it down again

    class Rescue(nn.Module):
        def forward(self, x, te, *, table, extra=None):
            return x * 1e-200

    class Grow(nn.Module):
        def forward(self, x, te, *, table, extra=None):
            return x + torch.where(x.abs() > 1e100, x * 1e200, 0)

    model.blocks[0], model.blocks[1] = Rescue(), Grow()
    with pytest.raises(ValueError, match="velocity of sample 0 without layer 0 is not finite"):
        attribute_layers(model, draw())
    with torch.no_grad():
        model.tail.bias[0] = torch.nan
    with pytest.raises(ValueError, match="baseline velocity of sample 0 is not finite"):
        attribute_layers(model, draw())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"inputs": {"x": torch.zeros(0, FRAMES, 5), "t": torch.zeros(0)}}, ValueError, "at least one sample"),
        ({"inputs": {"x": torch.zeros(2, FRAMES, 5)}}, TypeError, "do not fit Chain.forward: missing .* 't'"),
        ({"inputs": torch.zeros(2, FRAMES, 5)}, TypeError, "mapping of keyword arguments or a tuple, got Tensor"),
        ({"inputs": {"x": None, "t": 3}}, TypeError, "at least one tensor"),
        ({"branches": ("attn",)}, ValueError, "scored by whole blocks"),
        ({"blocks": [4]}, ValueError, r"0-based layers below 4, got \[4\]"),
        ({"domains": ["speech"]}, ValueError, "domains: expected 3 names, got 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        attribute_layers(**{"model": build(Chain), "inputs": draw(), **change})


def test_blocks_that_forward_cannot_call_as_one_are_named():
    scripted = build(Chain)
    scripted.blocks[0] = torch.jit.script(nn.Linear(WIDTH, WIDTH).double())
    with pytest.raises(ValueError, match=r"blocks\.0 is a compiled ScriptModule, .*: load the model unscripted"):
        attribute_layers(scripted, draw())
    nested = build(Chain)
    nested.blocks = nn.ModuleList(nn.ModuleList([block]) for block in nested.blocks)
    with pytest.raises(ValueError, match=r"blocks\.0 is a ModuleList, which forward cannot call as one block"):
        attribute_layers(nested, draw())


def test_adapters_are_checked_where_they_are_registered():
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        register_adapter(build(Chain), Adapter())
    with pytest.raises(TypeError, match="expected an Adapter, got str"):
        register_adapter(Chain, "blocks")
