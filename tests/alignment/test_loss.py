"""AlignmentLoss and InterfaceLoss against loops over samples in NumPy, and what must not reach a gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agrepa_fast import AlignmentLoss, DiT, DiTConfig, InterfaceLoss, LayerSelection

BATCH, FRAMES, WIDTH = 4, 7, 6
TEACHERS = {"speech": 5, "audio": 3}
SELECTION = LayerSelection((1, 4, 9), (0.5, 0.3, 0.2))
NAMES = ["speech", "audio", "speech", "audio"]
MASK = torch.arange(FRAMES) < torch.tensor([[7], [4], [1], [6]])


def build(pool="mean", selection=SELECTION, teachers=TEACHERS, dtype=torch.float64) -> AlignmentLoss:
    torch.manual_seed(0)
    return AlignmentLoss(WIDTH, teachers, selection, pool).to(dtype)


def draw(pool="mean", dtype=torch.float64, layers=SELECTION.layers):
    generator = torch.Generator().manual_seed(1)
    hidden = {layer: torch.randn(BATCH, FRAMES, WIDTH, generator=generator, dtype=dtype) + 1 for layer in layers}
    shape = (BATCH,) if pool else (BATCH, FRAMES)
    targets = {name: torch.randn(*shape, size, generator=generator, dtype=dtype) for name, size in TEACHERS.items()}
    return {layer: h.requires_grad_(True) for layer, h in hidden.items()}, targets


def cosine(a, b):
    return a @ b / math.sqrt((a @ a + 1e-8) * (b @ b + 1e-8))


def head(parameters, teacher, layer, x):
    x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
    p = {name: parameters[f"heads.{teacher}.{layer}.{name}"].double().numpy() for name in PARAMETERS}
    x = p["hidden.weight"] @ x + p["hidden.bias"]
    x = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])
    return p["output.weight"] @ x + p["output.bias"]


PARAMETERS = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")


def by_loop(loss_fn, weights, hidden, targets, mask, names):
    """The loss and the raw cosines, one sample and one frame at a time; names None = every teacher for all."""
    parameters = loss_fn.state_dict()
    total, cosines = 0.0, {}
    for layer, weight in weights.items():
        for teacher in TEACHERS:
            values = []
            for n in range(BATCH):
                frames = [i for i in range(FRAMES) if mask is None or mask[n, i]]
                if (names is not None and names[n] != teacher) or not frames:
                    continue
                h, z = hidden[layer][n].detach().double().numpy(), targets[teacher][n].double().numpy()
                if loss_fn.pool:
                    values.append(cosine(head(parameters, teacher, layer, h[frames].mean(0)), z))
                else:
                    values += [cosine(head(parameters, teacher, layer, h[i]), z[i]) for i in frames]
            cosines[f"cosine/{teacher}/{layer}"] = np.mean(values) if values else math.nan
            total += weight * np.mean([1 - value for value in values]) if values else 0.0
    return total, cosines


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("form", ["none", "names", "mapping", "weights"])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("pool", ["mean", None])
def test_equals_the_loop(pool, mask, form, dtype, tolerance):
    loss_fn = build(pool, dtype=dtype)
    hidden, targets = draw(pool, dtype)
    speech = torch.tensor([name == "speech" for name in NAMES])
    domains = {
        "none": None,
        "names": NAMES,
        "mapping": {"audio": ~speech, "speech": speech},
        "weights": {"audio": (~speech).float(), "speech": speech.float()},
    }[form]
    loss, metrics = loss_fn(hidden, targets, mask, domains)
    weights = dict(zip(SELECTION.layers, SELECTION.weights))
    expected, cosines = by_loop(loss_fn, weights, hidden, targets, mask, None if form == "none" else NAMES)
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(cosines, abs=tolerance)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("pool", ["mean", None])
def test_samples_with_weights(pool):
    """Weights of the samples, over the number of rows; the cosines stay raw. By the losses of one sample at a time."""
    loss_fn = build(pool)
    hidden, targets = draw(pool)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
    loss, metrics = loss_fn(hidden, targets, MASK, NAMES, weights)
    plain, raw = loss_fn(hidden, targets, MASK, NAMES)
    assert metrics == raw
    expected = 0.0
    for n in range(BATCH):
        only = (torch.arange(BATCH) == n).unsqueeze(1)
        alone = by_loop(
            loss_fn,
            dict(zip(SELECTION.layers, SELECTION.weights)),
            hidden,
            targets,
            MASK & only,
            NAMES,
        )[0]
        rows = [i for i in range(BATCH) if NAMES[i] == NAMES[n]]
        share = 1 / len(rows) if pool else MASK[n].sum().item() / MASK[rows].sum().item()
        expected += weights[n].item() * share * alone
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    assert plain.item() != pytest.approx(expected, rel=1e-2)
    loss.backward()
    assert all(h.grad[2].count_nonzero() == 0 for h in hidden.values())


@pytest.mark.parametrize("pool", ["mean", None])
def test_similarity_is_the_mean_cosine_by_the_layers_weights(pool):
    loss_fn = build(pool)
    hidden, targets = draw(pool)
    loss_fn.select(LayerSelection((4, 9), (0.75, 0.25)))
    _, metrics = loss_fn(hidden, targets, MASK, NAMES)
    cosines = {layer: np.mean([metrics[f"cosine/{name}/{layer}"].item() for name in TEACHERS]) for layer in (4, 9)}
    assert loss_fn.similarity(metrics).item() == pytest.approx(0.75 * cosines[4] + 0.25 * cosines[9])
    _, metrics = loss_fn(hidden, targets, MASK, ["audio"] * BATCH)
    expected = 0.75 * metrics["cosine/audio/4"] + 0.25 * metrics["cosine/audio/9"]
    assert loss_fn.similarity(metrics).item() == pytest.approx(expected.item())
    _, metrics = loss_fn(hidden, targets, torch.zeros_like(MASK))
    assert loss_fn.similarity(metrics).isnan()


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_domain_that_is_absent_gives_exactly_nothing(pool):
    loss_fn = build(pool)
    hidden, targets = draw(pool)
    targets["audio"].fill_(torch.nan)  # no sample of it counts
    loss, metrics = loss_fn(hidden, targets, MASK, ["speech"] * BATCH)
    loss.backward()
    one = AlignmentLoss(WIDTH, {"speech": 5}, SELECTION, pool).double()
    one.load_state_dict({key: value for key, value in loss_fn.state_dict().items() if "audio" not in key})
    assert loss.item() == one(hidden, targets, MASK)[0].item()
    for parameter in loss_fn.heads["audio"].parameters():
        assert parameter.grad is not None
        assert parameter.grad.count_nonzero() == 0
    for parameter in loss_fn.heads["speech"].parameters():
        assert parameter.grad.count_nonzero() > 0
    assert all(metrics[f"cosine/audio/{layer}"].isnan() for layer in SELECTION.layers)
    assert all(metrics[f"cosine/speech/{layer}"].isfinite() for layer in SELECTION.layers)


@pytest.mark.parametrize("pool", ["mean", None])
def test_layers_and_teachers_are_paired_by_name(pool):
    loss_fn = build(pool)
    hidden, targets = draw(pool)
    expected = loss_fn(hidden, targets, MASK, NAMES)[0].item()
    other_order = build(pool, teachers={"audio": 3, "speech": 5})
    other_order.load_state_dict(loss_fn.state_dict())
    hidden = {layer: hidden[layer] for layer in (9, 1, 4)} | {0: torch.full((BATCH, FRAMES, WIDTH), torch.nan)}
    targets = {name: targets[name] for name in ("audio", "speech")}
    assert other_order(hidden, targets, MASK, NAMES)[0].item() == pytest.approx(expected, rel=1e-12)
    swapped = hidden | {1: hidden[9], 9: hidden[1]}
    assert loss_fn(swapped, targets, MASK, NAMES)[0].item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("pool", ["mean", None])
def test_select_changes_the_weights_in_place_and_nothing_else(pool):
    loss_fn = build(pool)
    hidden, targets = draw(pool)
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    buffers = {name: value.data_ptr() for name, value in loss_fn.named_buffers()}
    loss_fn.select(LayerSelection((4, 9), (0.75, 0.25)))
    assert loss_fn.weights.tolist() == [[0, 0.75, 0.25]] * 2
    assert {name: value.data_ptr() for name, value in loss_fn.named_buffers()} == buffers
    assert all(value.equal(before[name]) for name, value in loss_fn.state_dict().items() if name.startswith("heads"))
    loss, metrics = loss_fn(hidden, targets, MASK, NAMES)
    expected, _ = by_loop(loss_fn, {4: 0.75, 9: 0.25}, hidden, targets, MASK, NAMES)
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    loss.backward()
    assert all(parameter.requires_grad for parameter in loss_fn.parameters())
    unselected = [parameter.grad for teacher in TEACHERS for parameter in loss_fn.heads[teacher]["1"].parameters()]
    if pool:  # all heads run: the same graph, zeros for what is not selected
        assert len(metrics) == 6
        assert all(grad.count_nonzero() == 0 for grad in unselected)
    else:  # only the selected heads run
        assert sorted(metrics) == sorted(f"cosine/{teacher}/{layer}" for teacher in TEACHERS for layer in (4, 9))
        assert unselected == [None] * 8
    with pytest.raises(ValueError, match=r"layer 2 has no head, only \[1, 4, 9\]"):
        loss_fn.select(LayerSelection((2,), (1.0,)))


def test_heads_are_no_part_of_the_backbone():
    model = DiT(DiTConfig(depth=2, width=WIDTH, heads=1, mels=2, cond=0, max_frames=8))
    names, parameters = set(model.state_dict()), list(model.parameters())
    loss_fn = AlignmentLoss(WIDTH, TEACHERS, LayerSelection((0, 1), (0.5, 0.5)))
    x_t = torch.randn(BATCH, FRAMES, 2, generator=torch.Generator().manual_seed(0))
    _, hidden = model(x_t, torch.rand(BATCH), hidden_layers=loss_fn.active)
    loss_fn(hidden, draw(dtype=torch.float32)[1])[0].backward()
    assert set(model.state_dict()) == names
    assert not {id(p) for p in parameters} & {id(p) for p in loss_fn.parameters()}
    assert model.input.weight.grad.count_nonzero() > 0  # the loss does reach the backbone
    assert set(loss_fn.state_dict()) == {
        f"layer_weights.{teacher}.{name}" for teacher in TEACHERS for name in ("weights", "selected")
    } | {f"heads.{teacher}.{layer}.{name}" for teacher in TEACHERS for layer in (0, 1) for name in PARAMETERS}


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("pool", ["mean", None])
def test_what_masked_frames_hold_reaches_no_gradient(pool, rubbish):
    loss_fn = build(pool)
    hidden, targets = draw(pool)
    loss_fn(hidden, targets, MASK, NAMES)[0].backward()
    expected = [parameter.grad.clone() for parameter in loss_fn.parameters()]
    loss_fn.zero_grad()
    dirty = {
        layer: h.detach().masked_fill(~MASK.unsqueeze(-1), rubbish).requires_grad_(True) for layer, h in hidden.items()
    }
    if pool is None:
        targets = {name: z.masked_fill(~MASK.unsqueeze(-1), rubbish) for name, z in targets.items()}
    loss_fn(dirty, targets, MASK, NAMES)[0].backward()
    for parameter, grad in zip(loss_fn.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-14)
    for layer, h in dirty.items():
        assert h.grad[~MASK].count_nonzero() == 0
        assert h.grad[~MASK].isfinite().all()
        torch.testing.assert_close(h.grad[MASK], hidden[layer].grad[MASK], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_sample_without_valid_frames_does_not_count(pool):
    loss_fn = build(pool)
    hidden, targets = draw(pool)
    mask = MASK.clone()
    mask[2] = False
    loss, _ = loss_fn(hidden, targets, mask)
    rows = [0, 1, 3]
    without, _ = loss_fn({k: h[rows] for k, h in hidden.items()}, {k: z[rows] for k, z in targets.items()}, mask[rows])
    assert loss.item() == pytest.approx(without.item(), rel=1e-12)
    empty, metrics = loss_fn(hidden, targets, torch.zeros_like(mask))
    assert empty.item() == 0
    assert all(value.isnan() for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", ["float32", "autocast", "half"])
@pytest.mark.parametrize("pool", ["mean", None])
def test_half_precision_stays_finite(pool, heads, dtype):
    """Zero rows, huge rows and tiny rows; the heads in float32 (with and without autocast) or in half as well."""
    loss_fn = build(pool, dtype=dtype if heads == "half" else torch.float32)
    hidden, targets = draw(pool, torch.float32)
    with torch.no_grad():
        for h in hidden.values():
            h[0], h[1] = 0, h[1] * 1e-7
            h[3] *= 1e4
        targets["speech"][0] = 0
    half = {layer: h.detach().to(dtype).requires_grad_(True) for layer, h in hidden.items()}
    with torch.autocast("cpu", dtype, enabled=heads == "autocast"):
        loss, _ = loss_fn(half, {name: z.to(dtype) for name, z in targets.items()}, MASK)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = loss_fn.float()(hidden, targets, MASK)[0]
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in loss_fn.parameters())
    assert all(h.grad.isfinite().all() for h in half.values())


def test_teachers_get_no_gradient():
    hidden, targets = draw()
    targets = {name: z.requires_grad_(True) for name, z in targets.items()}
    build()(hidden, targets)[0].backward()
    bitc = InterfaceLoss(WIDTH, TEACHERS, {}).double()
    bitc(hidden[1], targets)[0].backward()
    assert [z.grad for z in targets.values()] == [None, None]


def test_compiles_into_one_graph():
    selection = LayerSelection((1, 4), (0.75, 0.25))
    loss_fn = build(selection=selection, dtype=torch.float32)
    hidden, targets = draw(dtype=torch.float32, layers=selection.layers)
    speech = torch.tensor([name == "speech" for name in NAMES])
    arguments = (hidden, targets, MASK, {"speech": speech, "audio": ~speech})
    expected, eager_metrics = loss_fn(*arguments)
    inputs = [*hidden.values(), *loss_fn.parameters()]
    eager = torch.autograd.grad(expected, inputs)
    loss, metrics = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, eager_metrics)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), eager)


@pytest.mark.parametrize("mask, names, kept", [(None, None, None), (MASK, NAMES, [1, 1, 0, 1]), (MASK, None, [0] * 4)])
def test_interface_equals_the_loop(mask, names, kept):
    torch.manual_seed(0)
    loss_fn = InterfaceLoss(WIDTH, TEACHERS, {"speech": 0.5}).double()
    hidden, targets = draw()
    embedding = hidden[1]
    expected, cosines = 0.0, {}
    for teacher, weight in {"speech": 0.5, "audio": 1.0}.items():
        matrix, values = loss_fn.heads[teacher].weight.detach().numpy(), []
        for n in range(BATCH):
            if (names is None or names[n] == teacher) and (kept is None or kept[n]):
                frames = embedding[n].detach().numpy()[slice(None) if mask is None else mask[n].numpy()]
                values.append(cosine(matrix @ frames.mean(0), targets[teacher][n].numpy()))
        expected += weight * (1 - np.mean(values)) if values else 0.0
        cosines[f"cosine/{teacher}/tokens"] = np.mean(values) if values else math.nan
    keep = None if kept is None else torch.tensor(kept, dtype=torch.bool)
    loss, metrics = loss_fn(embedding, targets, mask, names, keep)
    assert loss.item() == pytest.approx(expected, rel=1e-7, abs=1e-12)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(cosines, rel=1e-7, nan_ok=True)


def test_interface_heads_start_orthogonal_without_bias():
    weights = [linear.weight for linear in InterfaceLoss(WIDTH, TEACHERS, {}).heads.values()]
    for weight in weights:
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)
    assert len(list(InterfaceLoss(WIDTH, TEACHERS, {}).parameters())) == len(weights)
