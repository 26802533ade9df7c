"""A probe leaves another model as it was, runs nothing compiled, and refuses what answers from earlier calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agrepa_fast import attribute_layers

from .models import Block, Chain, build, draw, scores_by_loop


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


def test_a_forward_compiled_by_hand_runs_uncompiled():
    """Each ablation would compile it again, and the recorded forward cannot be traced."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    def decorated(x):
        return torch.compile(torch.sin, backend=backend)(x)

    class Helped(Chain):
        def forward(self, x, t, mask=None):
            return super().forward(x, t) + decorated(x)

    model = build(Helped)
    expected = scores_by_loop(build(Helped), "blocks", draw())
    compiled.clear()
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    model.blocks[1].forward = torch.compile(model.blocks[1].forward, backend=backend)
    before = model.forward, model.blocks[1].forward
    np.testing.assert_allclose(attribute_layers(model, draw()).by_sample.numpy(), expected, rtol=1e-10)
    assert not compiled
    assert (model.forward, model.blocks[1].forward) == before


class Remembering(Chain):
    """Keeps counters, buffers, lists and attributes of its last forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("table", torch.zeros(2, dtype=torch.float64))
        self.seen, self.cache = [], {"rows": 0}

    def forward(self, x, t, mask=None):
        self.calls += 1
        self.table = self.table + 1
        self.seen.append(len(x))
        self.cache["rows"] = len(x)
        self.last = x
        return super().forward(x, t)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_a_forward_keeps_is_left_behind(fails):
    model, inputs = build(Remembering), draw()
    model(**inputs)
    calls, table, last = model.calls, model.table, model.last
    if fails:
        with pytest.raises(ValueError, match="no module list"):
            attribute_layers(model, inputs, block_list="none")
    else:
        attribute_layers(model, inputs)
    assert (model.calls is calls, model.table is table, model.last is last) == (True, True, True)
    assert calls.tolist() == [1, 1, 1]
    assert (model.seen, model.cache) == ([3], {"rows": 3})


def test_an_active_cache_is_refused():
    class Hook:
        _is_stateful = True

    class Registry:
        hooks = {"first_block": Hook()}  # noqa: RUF012

    model = build(Chain)
    model.blocks[1]._diffusers_hook = Registry()
    with pytest.raises(ValueError, match=r"^blocks\.1 has an active cache \(Hook 'first_block'\).*disable_cache\(\)"):
        attribute_layers(model, draw())
