"""Weights for each teacher, and weights by flow time, against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast import AlignmentLoss, LayerSelection
from agrepa_fast.errors import UserError

BATCH, FRAMES, WIDTH, DEPTH = 5, 6, 6, 4
TEACHERS = {"speech": 5, "audio": 3}
NAMES = ["speech", "audio", "speech", "audio", "speech"]
MASK = torch.arange(FRAMES) < torch.tensor([[6], [3], [1], [5], [4]])
T = torch.tensor([0.0, 0.37, 0.5, 0.93, 0.2], dtype=torch.float64)
LAYERS = tuple(range(DEPTH))
OWN = {
    "speech": LayerSelection((0, 2), (0.334, 0.118), weighting="score"),
    "audio": LayerSelection((0, 1, 3), (0.5, 0.3, 0.2)),
}
# Exact in float32; a layer that scores nothing at some time, and times that differ between the teachers.
BY_TIME = {
    "speech": LayerSelection.by_time((0.125, 0.5, 0.875), {0: (1, 2, 0), 2: (3, 1, 0.5), 3: (0, 0, 2)}),
    "audio": LayerSelection.by_time((0.25, 0.5, 0.75), {1: (0.5, 0.25, 1), 3: (0, 4, 1)}),
}
ONE_TIME = LayerSelection.by_time((0.5,), {0: (1,), 3: (3,)})
TWO_TIMES = LayerSelection.by_time((0.25, 0.75), {1: (1, 0), 2: (0, 1)})
SELECTIONS = {"own": OWN, "by-time": BY_TIME, "one-time": ONE_TIME, "two-times": TWO_TIMES}


def build(selection, pool="mean", objective="cosine", dtype=torch.float64, every_head=False) -> AlignmentLoss:
    torch.manual_seed(0)
    return AlignmentLoss(WIDTH, TEACHERS, selection, pool, "linear", objective, every_head=every_head).to(dtype)


def every_layer(selection) -> LayerSelection:
    """A head on every layer, with as many times as a selection has."""
    own = selection if isinstance(selection, LayerSelection) else selection["audio"]
    return LayerSelection.uniform(LAYERS, t_grid=[i / 8 for i in range(len(own.t_grid))])


def draw(pool="mean", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden = {layer: torch.randn(BATCH, FRAMES, WIDTH, generator=generator, dtype=dtype) + 1 for layer in LAYERS}
    shape = (BATCH,) if pool else (BATCH, FRAMES)
    targets = {name: torch.randn(*shape, size, generator=generator, dtype=dtype) for name, size in TEACHERS.items()}
    return {layer: h.requires_grad_() for layer, h in hidden.items()}, targets


def weight_at(selection: LayerSelection, layer: int, t: float) -> float:
    """A layer's weight for a sample at time t: the scores by linear interpolation, then shares of them."""
    if layer not in selection.layers:
        return 0.0
    if not selection.t_grid:
        return selection.weights[selection.layers.index(layer)]
    times = selection.t_grid

    def score(row):
        if t <= times[0] or len(times) == 1:
            return row[0]
        if t >= times[-1]:
            return row[-1]
        after = next(i for i, time in enumerate(times) if time >= t)
        share = (t - times[after - 1]) / (times[after] - times[after - 1])
        return row[after - 1] * (1 - share) + row[after] * share

    return score(selection.scores[selection.layers.index(layer)]) / sum(map(score, selection.scores))


def by_loop(loss_fn, selection, pool, hidden, targets, mask, names, sample_weight):
    """The loss, one teacher, layer, sample and frame at a time, on the graph of the hidden states."""
    total = torch.zeros((), dtype=torch.float64)
    for teacher in TEACHERS:
        own = selection if isinstance(selection, LayerSelection) else selection[teacher]
        for layer in own.layers:
            linear = loss_fn.heads[teacher][str(layer)].output
            losses, weights = [], []
            for n in range(BATCH):
                frames = [i for i in range(FRAMES) if mask is None or mask[n, i]]
                if names is not None and names[n] != teacher:
                    continue
                rows = [hidden[layer][n, frames].mean(0)] if pool else [hidden[layer][n, i] for i in frames]
                goals = [targets[teacher][n]] if pool else [targets[teacher][n, i] for i in frames]
                for h, z in zip(rows, goals):
                    x = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
                    y = linear.weight.detach() @ x + linear.bias.detach()
                    losses.append(1 - y @ z / ((y @ y + 1e-8) * (z @ z + 1e-8)).sqrt())
                    weight = weight_at(own, layer, T[n].item())
                    weights.append(weight if sample_weight is None else weight * sample_weight[n].item())
            total = total + sum(loss * weight for loss, weight in zip(losses, weights)) / len(losses)
    return total


@pytest.mark.parametrize("how", ["plain", "weighted", "every sample"])
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("pool", ["mean", None])
def test_equals_the_loop(pool, kind, how):
    selection = SELECTIONS[kind]
    loss_fn = build(every_layer(selection), pool)
    loss_fn.select(selection)
    hidden, targets = draw(pool)
    mask, names = (None, None) if how == "every sample" else (MASK, NAMES)
    sample_weight = torch.tensor([0.5, 2.0, 0.25, 1.5, 1.0]).double() if how == "weighted" else None
    arguments = (hidden, targets, mask, names, sample_weight)
    loss, metrics = loss_fn(*arguments, t=T)
    expected = by_loop(loss_fn, selection, pool, *arguments)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    both = (torch.autograd.grad(value, [*hidden.values()], materialize_grads=True) for value in (loss, expected))
    for mine, theirs in zip(*both):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    # The cosines are raw, whatever the weights: those of the same heads with equal weights.
    plain = build(LayerSelection.uniform(LAYERS), pool)
    plain.heads.load_state_dict(loss_fn.heads.state_dict())
    _, raw = plain(hidden, targets, mask, names)
    for name, value in metrics.items():
        assert value.item() == pytest.approx(raw[name].item(), rel=1e-9)


class NoSync(TorchDispatchMode):
    """Fails where a number would be read from the device, or a shape would depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, pool", [("by-time", "mean"), ("by-time", None), ("own", "mean"), ("own", None)])
def test_another_map_is_other_numbers_in_the_same_graph(kind, pool):
    """Compiled once, without a host sync; new layers, scores and times change the values and nothing else."""
    torch._dynamo.reset()  # what other tests compiled counts towards Dynamo's limit
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    selection = SELECTIONS[kind]
    loss_fn = build(every_layer(selection), pool, dtype=torch.float32, every_head=True)
    hidden, targets = draw(pool, torch.float32)
    speech = torch.tensor([name == "speech" for name in NAMES])
    arguments = (hidden, targets, MASK, {"speech": speech, "audio": ~speech}, None, T.float())
    compiled = torch.compile(loss_fn, fullgraph=True, backend=counting)
    swapped = {"speech": selection["audio"], "audio": selection["speech"]}
    found = []
    for chosen in (every_layer(selection), selection, swapped, selection["audio"]):
        loss_fn.select(chosen)
        with NoSync():
            expected, _ = loss_fn(*arguments)
        loss, _ = compiled(*arguments)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        found.append(loss.item())
    assert len(set(found)) == 4
    assert len(graphs) == 1


def test_only_the_heads_of_a_teacher_s_own_layers_exist_and_run():
    loss_fn = build(OWN, None)
    assert {name: list(heads._modules) for name, heads in loss_fn.heads.items()} == {
        "speech": ["0", "2"],
        "audio": ["0", "1", "3"],
    }
    assert loss_fn.layers == loss_fn.active == (0, 1, 2, 3)
    torch.testing.assert_close(loss_fn.weights, torch.tensor([[0.334, 0, 0.118, 0], [0.5, 0.3, 0, 0.2]]))
    loss_fn.select({"speech": LayerSelection((2,), (1.0,)), "audio": LayerSelection((1, 3), (0.5, 0.5))})
    assert loss_fn.active_heads == (("speech", 2), ("audio", 1), ("audio", 3))
    assert loss_fn.active == (1, 2, 3)
    hidden, targets = draw(None)
    loss, metrics = loss_fn({layer: hidden[layer] for layer in (1, 2, 3)}, targets, MASK, NAMES)
    assert sorted(metrics) == ["cosine/audio/1", "cosine/audio/3", "cosine/speech/2"]
    loss.backward()
    grads = {name: p.grad for name, p in loss_fn.heads.named_parameters() if name.endswith("weight")}
    assert [name for name, grad in grads.items() if grad is not None] == [
        "speech.2.output.weight",
        "audio.1.output.weight",
        "audio.3.output.weight",
    ]
    with pytest.raises(ValueError, match=r"selection: layer 1 has no head, only \[0, 2\]"):
        loss_fn.select(LayerSelection((1,), (1.0,)))
    assert loss_fn.active_heads[0] == ("speech", 2)  # a refused selection changes nothing


def test_every_head_may_run_frame_by_frame():
    """Heads of layers that are not selected have a weight of 0, and a gradient of exactly zero."""
    loss_fn, plain = (
        build(LayerSelection.uniform(LAYERS), None, every_head=True),
        build(LayerSelection.uniform(LAYERS), None),
    )
    hidden, targets = draw(None)
    for module in (loss_fn, plain):
        module.select(OWN)
        module(hidden, targets, MASK, NAMES)[0].backward()
    assert loss_fn.active_heads == tuple((name, layer) for name in TEACHERS for layer in LAYERS)
    for mine, theirs in zip(loss_fn.heads.parameters(), plain.heads.parameters()):
        torch.testing.assert_close(mine.grad, torch.zeros_like(mine) if theirs.grad is None else theirs.grad)
    assert sum(p.grad is None for p in plain.heads.parameters()) == 2 * 3  # three heads of weight and bias did not run


def test_by_flow_time_all_heads_run_frame_by_frame():
    loss_fn = build(every_layer(BY_TIME), None)
    loss_fn.select(BY_TIME)
    assert loss_fn.active_heads == tuple((name, layer) for name in TEACHERS for layer in LAYERS)


def test_similarity_takes_each_teacher_s_weights():
    loss_fn = build(OWN)
    hidden, targets = draw()
    _, metrics = loss_fn(hidden, targets, MASK, NAMES)
    cosine = {name: {n: metrics[f"cosine/{name}/{n}"].item() for n in OWN[name].layers} for name in TEACHERS}
    speech = (0.334 * cosine["speech"][0] + 0.118 * cosine["speech"][2]) / 0.452
    audio = 0.5 * cosine["audio"][0] + 0.3 * cosine["audio"][1] + 0.2 * cosine["audio"][3]
    assert loss_fn.similarity(metrics).item() == pytest.approx((speech + audio) / 2, rel=1e-6)
    _, metrics = loss_fn(hidden, targets, MASK, ["audio"] * BATCH)
    cosines = [metrics[f"cosine/audio/{n}"].item() for n in (0, 1, 3)]
    expected = 0.5 * cosines[0] + 0.3 * cosines[1] + 0.2 * cosines[2]
    assert loss_fn.similarity(metrics).item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_time_that_does_not_count_may_be_nan(pool):
    loss_fn = build(BY_TIME, pool)
    hidden, targets = draw(pool)
    mask = MASK.clone()
    mask[3] = False
    t = T.clone()
    expected = loss_fn(hidden, targets, mask, NAMES, t=t)[0]
    t[3] = math.nan
    loss, _ = loss_fn(hidden, targets, mask, NAMES, t=t)
    assert loss.item() == expected.item()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in loss_fn.parameters())


def test_what_is_refused():
    hidden, targets = draw()
    by_time, plain = build(every_layer(BY_TIME)), build(LayerSelection.uniform(LAYERS))
    with pytest.raises(ValueError, match=r"t: expected floating point \[5\], as the weights depend on it"):
        by_time(hidden, targets)
    with pytest.raises(ValueError, match=r"t: expected floating point \[5\]"):
        by_time(hidden, targets, t=torch.ones(BATCH, dtype=torch.long))
    with pytest.raises(ValueError, match=r"t: expected \[5\], got \[4\]"):
        plain(hidden, targets, t=torch.ones(4))
    with pytest.raises(ValueError, match="at 3 times, the loss was built for weights that do not change with t"):
        plain.select(BY_TIME)
    with pytest.raises(ValueError, match="at 2 times, the loss was built for weights by flow time, at 3 times"):
        by_time.select(TWO_TIMES)
    with pytest.raises(ValueError, match='weighting "score" is not normalised'):
        by_time.select(OWN)
    with pytest.raises(ValueError, match=r"one for each of the teachers \['speech', 'audio'\], got \['speech'\]"):
        plain.select({"speech": OWN["speech"]})
    with pytest.raises(UserError, match="scores at as many times for each teacher"):
        build({"speech": TWO_TIMES, "audio": ONE_TIME})
    with pytest.raises(UserError, match="pooled 'cka' compares samples with each other"):
        build(BY_TIME, objective="cka")
