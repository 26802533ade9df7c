"""`Aligner` where the trainer brings more itself: hidden states, those of an average, scores, target layers."""

from __future__ import annotations

import copy

import pytest
import torch

import agrepa_fast as ag

from .foreign import DEPTH, TEACHERS, WIDTH, aligner_for, batch, network, optimizer_for, train

FLOW = {"own": ag.SelfFlow(3)}


def velocity_loss(model, b):
    return (model(b["x"], b["time"]) - b["velocity"]).square().mean()


def gradients(loss, *modules):
    parameters = [p for module in modules for p in module.parameters()]
    return [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]


def same(found, expected):
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("pool", ["mean", None])
def test_states_that_a_model_returns_are_those_of_the_taps(pool):
    """The same loss and gradients, and nothing takes part in the model's forward."""
    model = ag.DiT(ag.DiTConfig(depth=3, width=16, heads=2, mels=5, cond=4)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    aligner = ag.Aligner(model, {"speech": 7}, selection=[0, 2], pool=pool)
    assert aligner.layers == (0, 2)
    b = batch(1, pool)
    call = (b["x"], b["time"], torch.randn(4, 6, 4), b["mask"])
    targets = {"speech": b["features"]["speech"]}
    _, hidden = model(*call, hidden_layers=aligner.layers)
    given = aligner.loss(targets, b["mask"], hidden=hidden)
    assert "forward" not in vars(model)
    with aligner:
        model(*call)
        tapped = aligner.loss(targets, b["mask"])
    assert given > 0
    assert torch.equal(given, tapped)
    same(gradients(given, model, aligner.loss_fn), gradients(tapped, model, aligner.loss_fn))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("pool", ["mean", None])
def test_self_flow_takes_its_target_from_the_average(pool, given):
    """Against a loss over targets by hand; the average sees the clips at a cleaner time, without gradient."""
    model, average = network(), network(5).requires_grad_(False)
    clean, b = network(7)(batch(2, pool)["x"], batch(2, pool)["time"]).detach(), batch(1, pool)
    aligner = ag.Aligner(model, FLOW, selection=[0], pool=pool, average=None if given else average)
    assert (aligner.layers, aligner.averaged_layers) == ((0,), (3,))
    late = b["time"].lerp(torch.ones(4), 0.5)
    with aligner:
        velocity_loss(model, b)
        with torch.no_grad():
            states = ag.HiddenStates(average, [3])
            with states:
                average(clean, late)
                [target] = states.read().values()
        loss = aligner.loss(mask=b["mask"], averaged={3: target}) if given else None
        if not given:
            average(clean, late)
            loss = aligner.loss(mask=b["mask"])
    loss_fn = ag.AlignmentLoss(WIDTH, {"own": WIDTH}, ag.LayerSelection.uniform([0]), pool)
    loss_fn.load_state_dict(aligner.loss_fn.state_dict())
    with ag.HiddenStates(model, [0]) as taps:
        model(b["x"], b["time"])
        features = ag.ops.masked_mean(target, b["mask"]) if pool else target
        expected = 0.5 * loss_fn(taps.read(), {"own": features}, b["mask"])[0]
    assert torch.equal(loss, expected)
    same(gradients(loss, model, aligner.loss_fn), gradients(expected, model, loss_fn))
    assert not any("forward" in vars(module) for one in (model, average) for module in one.modules())


def test_self_flow_without_an_average_is_refused_at_the_first_step():
    aligner = ag.Aligner(network(), FLOW, k=2, probe=ag.ProbePlan(start=100))
    with (
        aligner,
        pytest.raises(ValueError, match=r"SelfFlow needs hidden states of the average: give Aligner\(average="),
    ):
        aligner.loss()
    model = network()
    aligner = ag.Aligner(model, FLOW, selection=[0], average=network(5))
    with aligner:
        velocity_loss(model, batch(1, "mean"))
        with pytest.raises(ValueError, match=r"none of blocks.3 \(layer 3\) since the last read"):
            aligner.loss()
    with pytest.raises(ValueError, match="hidden states: the average's of layer 3, a target, are missing"):
        aligner.evaluate({0: torch.zeros(1, 2, WIDTH)}, averaged={2: torch.zeros(1, 2, WIDTH)})


def test_scores_of_another_probe_choose():
    """A probe of the user's own does what the aligner's does on the same inputs, also when none is due."""
    states = []
    for mine in (True, False):
        model = network()
        aligner = aligner_for(model, "mean")
        b = batch(1, "mean")
        with aligner:
            model(b["x"], time=b["time"])
            inputs = {"x": b["x"], "time": b["time"]}
            if mine:
                assert not aligner.due(1)
                aligner.step(2, scores=ag.attribute_layers(model, inputs, blocks=range(DEPTH)))
            else:
                aligner.step(2, inputs)
        states.append(aligner.choice.state_dict())
    assert states[0] == states[1]
    assert states[0]["probed"] == 2


def test_the_first_probe_brings_the_target_layers_that_were_left_open():
    model, b = network(), batch(1, "mean")
    with pytest.raises(ValueError, match="'own': expected a target_layer from 1 to 3, got None"):
        ag.Aligner(model, {"own": ag.LayerSync()}, k=2, probe=ag.ProbePlan(2))
    aligner = ag.Aligner(model, {"own": ag.LayerSync()}, k=2, probe=ag.ProbePlan(2, every=2, margin=0.0, targets=True))
    with aligner:
        for step in range(1, 7):
            velocity_loss(model, b)
            aligner.loss(mask=b["mask"])
            if step == 2:
                with pytest.raises(ValueError, match=r"targets: the first probe needs a target layer for .* own"):
                    aligner.step(step)
            aligner.step(step, targets=2 if step == 2 else None)
    assert aligner.selection.target == 2
    assert aligner.selection.layers == (0, 1)
    assert aligner.choice.probed == 6


def test_gradient_cosines_are_those_of_autograd():
    model, b = network(), batch(1, None)
    aligner = ag.Aligner(model, {"speech": 7}, selection=[0, 2], pool=None)
    targets = {"speech": b["features"]["speech"]}
    with aligner:
        flow = velocity_loss(model, b)
        hidden = aligner.states.read()
        cosines = aligner.gradient_cosines(flow, hidden, targets, b["mask"])
    aligned, _ = aligner.evaluate(hidden, targets, b["mask"])
    for layer in (0, 2):
        one, two = (torch.autograd.grad(loss, hidden[layer], retain_graph=True)[0] for loss in (flow, aligned))
        expected = torch.cosine_similarity(one.flatten(), two.flatten(), dim=0)
        torch.testing.assert_close(cosines[f"gradient_cosine/{layer}"], expected)
    assert all(p.grad is None for p in (*model.parameters(), *aligner.loss_fn.parameters()))
    assert aligner.selected(cosines | {"gradient_cosine/1": expected}).keys() == cosines.keys()


def test_a_step_as_one_function_is_recorded_once():
    """What changes from step to step is in tensors; `topology` changes where the heads that run do."""
    model = network()
    aligner = aligner_for(model, None, every_head=False, selection=[0, 1], layers=range(DEPTH))
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def step(hidden, b, strength):
        loss, metrics = aligner.evaluate(hidden, b["features"], b["mask"])
        return strength * loss, metrics

    b = batch(1, None)
    hidden = {layer: torch.randn(4, 6, WIDTH) for layer in range(DEPTH)}
    assert aligner.topology is False
    aligner.align(0.5)
    first = aligner.topology
    assert {(name, layer) for name, layer, _ in first} == {(name, layer) for name in TEACHERS for layer in (0, 1)}
    with torch._dynamo.config.patch(error_on_recompile=True):
        one, metrics = step(hidden, b, aligner.strength)
        aligner.align(0.25)
        aligner.observe(metrics)
        aligner.loss_fn.select(ag.LayerSelection((0, 1), (0.5, 0.5)))
        two, _ = step(hidden, b, aligner.strength)
    assert torch.equal(one, 2 * two)
    assert aligner.topology == first
    aligner.select(ag.LayerSelection.uniform([1, 3]))
    aligner.align(0.5)
    assert aligner.topology != first
    aligner.freeze_idle()
    asking = {n.split(".")[1] for n, p in aligner.loss_fn.heads.named_parameters() if p.requires_grad}
    assert asking == {"1", "3"}
    torch._dynamo.reset()


def test_a_copy_of_an_aligner_that_was_never_attached_works_alone():
    model = network()
    pair = copy.deepcopy({"model": model, "aligner": aligner_for(model, "mean")})
    copied, aligner = pair["model"], pair["aligner"]
    assert aligner.model is copied
    hooks = [len(p._post_accumulate_grad_hooks) for p in aligner.loss_fn.parameters()]
    assert hooks == [1] * len(hooks)  # with several ranks the copy averages its gradients, too
    train(copied, aligner, optimizer_for(copied, aligner), 0, 4, lambda step: batch(step, "mean"))
    assert aligner.selection is not None
    same([p.detach() for p in model.parameters()], [p.detach() for p in network().parameters()])
