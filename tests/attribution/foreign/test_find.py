"""What is scored: every block that a forward passes its state through, in its order and by its name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from agrepa_fast import LayerScores, LayerSelection, attribute_layers, select_layers
from agrepa_fast.attribution.files import read_scores
from agrepa_fast.attribution.foreign.register import Adapter, register_adapter
from agrepa_fast.attribution.pictures import plot_scores

from .models import DEPTH, FRAMES, WIDTH, Chain, build, draw
from .networks import (
    AddedOutside,
    AroundTheMiddle,
    Base,
    Concatenated,
    Half,
    InStages,
    Interleaved,
    Normed,
    Plain,
    TakenApart,
    Unrolled,
)


def equals_loop(model, inputs, names, off, mask=None):
    """Names and values of the scores against a loop; `off(model, name)` hooks a block away."""
    with torch.no_grad():
        base = model(**inputs)
        expected = []
        for name in names:
            handles = off(model, name)
            change = (model(**inputs) - base).flatten(1).square().mean(1)
            expected.append((change + 1e-8).sqrt() / ((base.flatten(1).square().mean(1) + 1e-8).sqrt() + 1e-8))
            for handle in handles:
                handle.remove()
    for engine in ("auto", "loop"):
        scores = attribute_layers(model, inputs, engine=engine)
        assert scores.names == tuple(names)
        assert scores.layers == tuple(range(len(names)))
        assert scores.engine == ("prefix" if engine == "auto" else "loop")
        np.testing.assert_allclose(scores.by_sample.numpy(), torch.stack(expected).numpy(), rtol=1e-9)
    assert (torch.stack(expected) > 5e-4).all()
    return scores


def returns_input(model, name):
    return [model.get_submodule(name).register_forward_hook(lambda _, args, __: args[0])]


def returns_zero(*parts):
    def off(model, name):
        modules = [model.get_submodule(f"{name}.{part}" if part else name) for part in parts]
        return [module.register_forward_hook(lambda *_: torch.zeros_like(_[2])) for module in modules]

    return off


INSIDE = ["stages.0.1.0", "stages.0.1.1", "stages.1.1.0", "stages.1.1.1"]
MIDDLE = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
STREAMS = ["double_stream.0", "double_stream.1", "singles.0", "singles.1", "singles.2"]
IN_TURN = ["spatial.0", "temporal.0", "spatial.1", "temporal.1"]


def returns_both(model, name):
    """The arguments of a block of two streams, or its only one."""
    hook = (lambda _, args, out: args) if "double" in name else (lambda _, args, out: args[0])
    return [model.get_submodule(name).register_forward_hook(hook)]


@pytest.mark.parametrize(
    "kind, names, off",
    [
        (Concatenated, STREAMS, returns_both),
        (Interleaved, IN_TURN, returns_input),
        (AroundTheMiddle, MIDDLE, returns_input),
        (InStages, INSIDE, returns_input),
        (TakenApart, [f"layers.{i}" for i in range(4)], returns_zero("2", "3")),
        (Normed, [f"layers.{i}" for i in range(3)], returns_zero("0")),
        (AddedOutside, [f"mixers.{i}" for i in range(4)], returns_zero("")),
        (Unrolled, [f"blocks.{i}" for i in range(3)], returns_zero("attn", "mlp")),
    ],
)
@pytest.mark.filterwarnings("error:.*not scored")
def test_every_block_that_carries_the_state_is_scored_by_its_name(kind, names, off):
    equals_loop(build(kind), draw(), names, off)


class Aside(Base):
    """Blocks over the text before it joins the frames, a time embedding of blocks, and a control branch."""

    def build(self):
        self.refiner, self.blocks = nn.ModuleList([Plain(), Plain()]), nn.ModuleList([Plain(), Plain()])
        self.embedding = nn.ModuleList([Plain(), Plain()])
        self.text = nn.Parameter(torch.zeros(4, WIDTH))

    def forward(self, x, t):
        te = t[:, None].expand(-1, WIDTH)
        for block in self.embedding:
            te = block(te)
        text = self.text + t[:, None, None]
        for block in self.refiner:
            text = block(text)
        h = torch.cat([text, self.head(x) * te[:, None]], 1)
        for block in self.blocks:
            h = block(h)
        return self.tail(h[:, 4:])


def test_blocks_beside_the_state_are_named_where_they_join_it():
    model, inputs = build(Aside), draw()
    with pytest.warns(
        UserWarning, match=r"refiner\.0, refiner\.1 are not scored: they see the condition alone"
    ) as caught:
        scores = attribute_layers(model, inputs)
    assert scores.names == ("blocks.0", "blocks.1")
    assert not any("embedding" in str(warning.message) for warning in caught)
    both = attribute_layers(model, inputs, block_list=["refiner", "blocks"])
    assert both.names == ("refiner.0", "refiner.1", "blocks.0", "blocks.1")
    assert torch.allclose(both.by_sample[2:], scores.by_sample, rtol=1e-10)


def test_a_list_that_block_list_leaves_out_is_named():
    with pytest.warns(UserWarning, match=r"passes through double_stream\.0, double_stream\.1, which are not scored"):
        scores = attribute_layers(build(Concatenated), draw(), block_list="singles")
    assert scores.names == ("singles.0", "singles.1", "singles.2")
    one = attribute_layers(build(AroundTheMiddle), draw(), block_list=["in_blocks", "mid_block", "out_blocks"])
    assert one.names == tuple(MIDDLE)


@pytest.mark.parametrize("said", [False, True])
def test_what_is_multiplied_before_it_is_added(said):
    """The mixers return no state, so zeros switch them off; an adapter that says so changes nothing."""

    class Gated(AddedOutside):
        def body(self, h):
            for mixer in self.mixers:
                h = torch.tanh(h) + mixer(h) * h
            return h

    if said:
        register_adapter(Gated, Adapter(adds=True))
    names = [f"mixers.{i}" for i in range(4)]
    equals_loop(build(Gated), draw(), names, returns_zero(""))


class Renamed(Chain):
    def __init__(self):
        super().__init__()
        self.stages = self.blocks
        del self.blocks

    @property
    def blocks(self):
        return self.stages


def test_a_list_of_any_name_is_found_and_a_wrong_name_is_refused():
    model = build(Renamed)
    equals_loop(model, draw(), [f"stages.{i}" for i in range(DEPTH)], returns_input)
    with pytest.raises(ValueError, match=r"no module list 'stage'; it has: stages \(4\)"):
        attribute_layers(model, draw(), block_list="stage")
    register_adapter(Chain, Adapter(block_list="stages"))  # of the parent class
    assert attribute_layers(model, draw()).names == tuple(f"stages.{i}" for i in range(DEPTH))


def test_a_model_without_blocks_says_what_it_has():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.time = nn.Linear(5, 5), nn.ModuleList([nn.Linear(1, 5)])

        def forward(self, x, t):
            return self.layer(x) + self.time[0](t[:, None])[:, None]

    with pytest.raises(ValueError, match=r"no blocks found in Bare: .*it has: time \(1\)\. .*block_list="):
        attribute_layers(build(Bare), draw())


class WithTwoLists(Chain):
    def __init__(self):
        super().__init__()
        self.blocks, self.layers = self.blocks[:2], self.blocks[2:]

    def forward(self, x, t, mask=None):
        own = Chain.__new__(Chain)
        nn.Module.__init__(own)
        own.head, own.tail, own.blocks = self.head, self.tail, nn.ModuleList([*self.blocks, *self.layers])
        return {"velocity": own(x, t)}


def test_the_velocity_is_picked_by_an_adapter():
    model = build(Chain)
    two = WithTwoLists()
    two.load_state_dict(
        {k.replace("blocks.2", "layers.0").replace("blocks.3", "layers.1"): v for k, v in model.state_dict().items()}
    )
    two.double()
    with pytest.raises(TypeError, match=r"returns dict: .*register_adapter"):
        attribute_layers(two, draw())
    register_adapter(WithTwoLists, Adapter(velocity=lambda output: output["velocity"]))
    scores = attribute_layers(two, draw())
    assert scores.names == ("blocks.0", "blocks.1", "layers.0", "layers.1")
    assert scores.by_sample.equal(attribute_layers(model, draw()).by_sample)
    register_adapter(WithTwoLists, Adapter(velocity=lambda output: output["velocity"], dense=True))
    dense = attribute_layers(two, draw())
    assert (dense.block_evaluations, dense.engine) == (None, "stacked")
    assert torch.allclose(dense.by_sample, scores.by_sample, rtol=1e-10)


class Narrowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4), nn.Linear(4, 4))

    def forward(self, x, t):
        return self.layers(x)


def test_a_block_that_changes_the_shape_is_named():
    with pytest.warns(UserWarning, match=r"layers\.1 are not scored: .*change its shape"):
        assert attribute_layers(build(Narrowing), draw()).names == ("layers.0", "layers.2")
    with pytest.raises(ValueError, match=r"layers\.1 maps \[1, 6, 5\] to \[1, 6, 4\]"):
        attribute_layers(build(Narrowing), draw(), block_list="layers")


class Reversed(Chain):
    def forward(self, x, t, mask=None):
        te = t[:, None].expand(-1, WIDTH)
        h = self.head(x)
        for block in reversed(self.blocks):
            h = block(h, te, table=torch.zeros(FRAMES, WIDTH, dtype=x.dtype))
        return self.tail(h)


def test_layers_are_numbered_in_the_order_of_the_forward():
    equals_loop(build(Reversed), draw(), [f"blocks.{i}" for i in (3, 2, 1, 0)], returns_input)


def test_a_block_that_runs_twice_is_switched_off_in_both_places():
    model = build(Chain)
    model.blocks[2] = model.blocks[0]
    scores = equals_loop(model, draw(), ["blocks.0", "blocks.1", "blocks.3"], returns_input)
    assert scores.names == ("blocks.0", "blocks.1", "blocks.3")
    counted = attribute_layers(model, draw())
    assert counted.block_evaluations == 1 + 2 + 3 + 3


def test_scripted_blocks_are_named():
    model = build(AroundTheMiddle)
    model.out_blocks[0] = torch.jit.script(Half().double())
    with pytest.raises(ValueError, match=r"out_blocks\.0 is a compiled ScriptModule, .*: load the model unscripted"):
        attribute_layers(model, draw())


def test_adapters_are_checked_where_they_are_registered():
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        register_adapter(build(Chain), Adapter())
    with pytest.raises(TypeError, match="expected an Adapter, got str"):
        register_adapter(Chain, "blocks")


class Nested(Base):
    """As a Swin: stages of several blocks, one of a single block, with a norm behind them in the same list."""

    def build(self):
        stages = [nn.Sequential(Plain(), Plain()), nn.Sequential(Plain()), nn.LayerNorm(WIDTH)]
        self.features = nn.Sequential(*stages)

    def body(self, h):
        return self.features(h)


def test_blocks_of_stages_are_scored_each():
    equals_loop(build(Nested), draw(), ["features.0.0", "features.0.1", "features.1.0"], returns_input)


class Crossing(Base):
    """An encoder that the noisy state goes through, and a decoder of learned queries that reads it."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, x, memory):
            return self.inner(x) + memory.mean(1, keepdim=True).sin()

    def build(self):
        self.encoder = nn.ModuleList([Plain(), Plain()])
        self.decoder = nn.ModuleList([self.Layer(), self.Layer()])
        self.queries = nn.Parameter(torch.zeros(4, WIDTH))

    def body(self, h):
        for block in self.encoder:
            h = block(h)
        x = self.queries.expand(len(h), -1, -1)
        for layer in self.decoder:
            x = layer(x, h)
        return x


def test_a_decoder_that_reads_the_state_is_scored():
    names = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    equals_loop(build(Crossing), draw(), names, returns_input)


class Controlled(Base):
    """As Wan VACE: blocks that read the state, keep one of their own and return a hint that the forward adds."""

    class Control(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.hint = Plain(), nn.Linear(WIDTH, WIDTH)

        def forward(self, h, control):
            control = self.inner(control + h)
            return self.hint(control), control

    def build(self):
        self.controls = nn.ModuleList([self.Control(), self.Control(), self.Control()])
        self.blocks = nn.ModuleList([Plain(), Plain(), Plain()])

    def body(self, h):
        control, hints = torch.zeros_like(h), []
        for block in self.controls:
            hint, control = block(h, control)
            hints.append(hint)
        for block, hint in zip(self.blocks, hints):
            h = block(h) + hint
        return h


def test_a_branch_for_control_signals_is_named():
    with pytest.warns(UserWarning, match=r"also passes through controls\.0, .*controls\.2, which are not scored"):
        equals_loop(build(Controlled), draw(), ["blocks.0", "blocks.1", "blocks.2"], returns_input)


def test_names_go_into_tables_files_pictures_and_selections(tmp_path):
    model = build(Concatenated)
    scores = attribute_layers(model, draw())
    assert all(name in scores.table() for name in STREAMS)
    scores.to_csv(tmp_path / "scores.csv")
    assert read_scores(tmp_path / "scores.csv").names == scores.names
    again = LayerScores.from_state(json.loads(json.dumps(scores.state())))
    assert (again.names, again.engine) == (scores.names, "prefix")
    selection = select_layers(scores, k=2)
    assert selection.names == tuple(scores.names[layer] for layer in selection.layers)
    selection.to_json(tmp_path / "selection.json")
    read = LayerSelection.from_json(tmp_path / "selection.json")
    assert read == selection
    assert list(read.modules(model).values()) == [model.get_submodule(name) for name in selection.names]
    with pytest.raises(ValueError, match=f"selection: AddedOutside has no module '{selection.names[0]}'"):
        read.modules(build(AddedOutside))
    with pytest.raises(ValueError, match="it has no names"):
        LayerSelection.uniform([0]).modules(model)
    some = attribute_layers(model, draw(), blocks=["singles.1", 0])
    assert some.names == ("double_stream.0", "singles.1")
    assert torch.allclose(some.by_sample, scores.by_sample[[0, 3]], rtol=1e-10)
    with pytest.raises(ValueError, match=r"blocks: expected layer numbers or some of double_stream\.0.* got 'singles'"):
        attribute_layers(model, draw(), blocks=["singles"])
    ticks = [tick.get_text() for tick in plot_scores(scores, selection).axes[0].get_xticklabels()]
    assert ticks == STREAMS


@pytest.mark.parametrize("names", [["a"], ["a", ""], "ab", [1, 2]])
def test_names_of_a_selection_must_fit_its_layers(names):
    with pytest.raises(ValueError, match="names: expected one name for each of 2 layers"):
        LayerSelection.from_state({"layers": [0, 1], "weights": [0.5, 0.5], "names": names})
