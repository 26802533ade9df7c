"""Hidden states of a forward that fails, and of a model that changes: an error, never those of another forward."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import agrepa_fast as ag

from .hidden_models import Block, Plain, made


def test_a_forward_that_fails_leaves_no_states_of_two_forwards(monkeypatch):
    model, inputs = made(Plain)
    with ag.HiddenStates(model, [1, 3]) as states:
        model(*inputs)

        def fail(*_):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(model.blocks[2], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(*(x + 1 for x in inputs))
        with pytest.raises(ValueError, match=r"none of blocks.1 \(layer 1\) since the last read"):
            states.read()


def test_a_dit_that_fails_leaves_no_states(monkeypatch):
    model = ag.DiT(ag.DiTConfig(depth=2, width=16, heads=2, mels=4, cond=0))
    x_t, t = torch.randn(2, 5, 4), torch.rand(2)
    with ag.HiddenStates(model, [0]) as states:
        model(x_t, t)
        monkeypatch.setattr(model.output, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x_t, t)
        with pytest.raises(ValueError, match="since the last read"):
            states.read()


def test_a_block_that_was_replaced_is_named():
    model, inputs = made(Plain)
    with ag.HiddenStates(model, [1]) as states:
        model.blocks[1] = copy.deepcopy(model.blocks[0])
        assert isinstance(model.blocks[1], Block)
        model(*inputs)
        with pytest.raises(ValueError, match=r"another module has taken the place of blocks.1 \(layer 1\)"):
            states.read()


def test_a_forward_that_fails_behind_its_blocks_leaves_no_states():
    model, inputs = made(Plain)
    with ag.HiddenStates(model, [0]) as states:
        failing = model.blocks[-1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(*inputs)
        with pytest.raises(ValueError, match=r"none of blocks.0 \(layer 0\) since the last read"):
            states.read()
        failing.remove()
        model(*inputs)
        assert list(states.read()) == [0]


@pytest.mark.parametrize("kind", ["blocks", "dit"])
def test_another_threads_forward_is_never_read(kind):
    if kind == "blocks":
        model, inputs = made(Plain)
    else:
        model = ag.DiT(ag.DiTConfig(depth=2, width=16, heads=2, mels=4, cond=0))
        inputs = (torch.randn(2, 5, 4), torch.rand(2))
    with ag.HiddenStates(model, [1]) as states:
        model(*inputs)
        thread = threading.Thread(target=lambda: model(*(x / 2 for x in inputs)))
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match=r"^hidden states: another thread has run the model's forward since"):
            states.read()
        model(*inputs)
        assert list(states.read()) == [1]


def test_an_attached_model_can_be_exported():
    model, inputs = made(Plain)
    expected = model(*inputs)
    with ag.HiddenStates(model, [1]):
        exported = torch.export.export(model, tuple(inputs))
    assert torch.equal(exported.module()(*inputs), expected)
