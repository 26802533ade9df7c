"""`Aligner` in a plain loop, against the same loop written out with hooks; resumed; compiled; wrapped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import agrepa_fast as ag

from .foreign import CHANNELS, DEPTH, FRAMES, TEACHERS, WIDTH, aligner_for, batch, network, optimizer_for, train

POOLS = pytest.mark.parametrize("pool", ["mean", None])


def parameters(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def by_hand(pool, steps, scores_at):
    """What `Aligner` does, written out: hooks, the loss, the schedule, the averages, the choice."""
    model = network()
    loss_fn = ag.AlignmentLoss(WIDTH, TEACHERS, ag.LayerSelection.uniform(range(DEPTH)), pool, every_head=True)
    decayed = [p for p in loss_fn.parameters() if p.dim() > 1]
    rest = [p for p in loss_fn.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": model.parameters()},
            {"params": decayed, "weight_decay": 0.1},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=3e-2,
    )
    hidden, average, selection, selections = {}, None, None, []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _m, _a, output, number=number: hidden.__setitem__(number, output))
    for step in range(1, steps + 1):
        b = batch(step, pool)
        loss = (model(b["x"], b["time"]) - b["velocity"]).square().mean()
        done = step - 1
        if selection is not None and 2 <= done < 12:
            strength = 0.5 * min(1, (done - 1) / 3)
            if done >= 9:
                strength *= (1 + math.cos(math.pi * (done - 9) / 3)) / 2
            loss = loss + torch.tensor(strength) * loss_fn(hidden, b["features"], b["mask"], b["domains"])[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in scores_at:
            scores = ag.attribute_layers(model, {"x": b["x"][:3], "time": b["time"][:3]}).mean.tolist()
            average = [0.3 * old + 0.7 * new for old, new in zip(average, scores)] if average else scores
            best = sorted(sorted(range(DEPTH), key=lambda n: -average[n])[:2])
            weights = tuple(average[n] / (average[best[0]] + average[best[1]]) for n in best)
            selection = ag.LayerSelection(tuple(best), weights, "foga")
            loss_fn.select(selection)
        selections.append(selection)
    return model, loss_fn, selections


@POOLS
def test_a_plain_loop_does_what_is_written_out(pool):
    model = network()
    aligner = aligner_for(model, pool)
    selections = train(model, aligner, optimizer_for(model, aligner), 0, 14, lambda step: batch(step, pool))
    reference, loss_fn, expected = by_hand(pool, 14, {2, 4, 6, 8, 10})
    assert [s and s.layers for s in selections] == [s and s.layers for s in expected]
    assert len({s.layers for s in selections if s}) > 1
    same(parameters(model, aligner.loss_fn), parameters(reference, loss_fn))
    assert not any("forward" in vars(module) for module in model.modules())


@POOLS
@pytest.mark.parametrize("every_head", [True, False])
def test_a_resumed_run_ends_with_the_same_bits(pool, every_head, tmp_path):
    """Saved after two re-selections, at a step between two probes."""

    def made(seed):
        model = network(seed)
        aligner = aligner_for(model, pool, every_head=every_head, stop_similarity=0.9)
        return model, aligner, optimizer_for(model, aligner)

    def data(step):
        return batch(step, pool)

    model, aligner, optimizer = made(3)
    whole = train(model, aligner, optimizer, 0, 11, data)
    half, half_aligner, half_optimizer = made(3)
    before = train(half, half_aligner, half_optimizer, 0, 7, data)
    assert before == whole[:7]
    assert len({s for s in before if s}) == 3
    state = {"model": half.state_dict(), "aligner": half_aligner.state_dict(), "optimizer": half_optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again, again_aligner, again_optimizer = made(1)
    again.load_state_dict(state["model"])
    again_aligner.load_state_dict(state["aligner"])
    again_optimizer.load_state_dict(state["optimizer"])
    assert train(again, again_aligner, again_optimizer, 7, 11, data) == whole[7:]
    same(parameters(again, again_aligner.loss_fn), parameters(model, aligner.loss_fn))
    assert again_aligner.metrics() == aligner.metrics()
    assert again_aligner.choice.state_dict() == aligner.choice.state_dict()


def test_the_velocity_and_a_run_without_weight_are_those_without_an_aligner():
    model, plain = network(), network()
    aligner = aligner_for(model, "mean", weight=0.0)
    train(model, aligner, optimizer_for(model, aligner), 0, 6, lambda step: batch(step, "mean"))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-2)
    for step in range(1, 7):
        b = batch(step, "mean")
        optimizer.zero_grad()
        (plain(b["x"], b["time"]) - b["velocity"]).square().mean().backward()
        optimizer.step()
    same(parameters(model), parameters(plain))


@POOLS
def test_a_compiled_step_is_compiled_once(pool):
    """The user's step with model, taps, loss and backward of two re-selections; and the same losses as eager."""
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        aligner = aligner_for(
            model, pool, schedule=ag.AlignmentSchedule.constant(), selection=[0, 1], layers=range(DEPTH)
        )
        optimizer = optimizer_for(model, aligner)

        def forward(b, model=model, aligner=aligner):
            loss = (model(b["x"], b["time"]) - b["velocity"]).square().mean()
            domains = {name: b["speech"] if name == "speech" else ~b["speech"] for name in TEACHERS}
            return loss + aligner.loss(b["features"], b["mask"], domains)

        step = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
        losses[compiled] = []
        with aligner, torch._dynamo.config.patch(error_on_recompile=True):
            for number, layers in enumerate([(0, 1), (0, 1), (1, 3), (0, 2), (0, 2)], 1):
                b = batch(number, pool)
                b["speech"] = torch.tensor([domain == "speech" for domain in b.pop("domains")])
                aligner.select(ag.LayerSelection(layers, (0.75, 0.25)))
                loss = step(b)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                aligner.step(number)
                losses[compiled].append(loss.item())
                assert f"cosine/speech/{layers[1]}" in aligner.metrics()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


@POOLS
def test_a_compiled_model_trains_alike(pool):
    """Compiled before the aligner is there, through the start of alignment, three probes and their selections."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = network()
        aligned = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        aligned(torch.zeros(4, FRAMES, CHANNELS), time=torch.zeros(4))
        aligner = aligner_for(aligned, pool)
        optimizer = optimizer_for(model, aligner)
        selections = train(aligned, aligner, optimizer, 0, 7, lambda step: batch(step, pool))
        results.append((selections, parameters(model, aligner.loss_fn)))
    assert results[0][0] == results[1][0]
    assert len({s for s in results[0][0] if s}) == 3
    same(results[0][1], results[1][1])


def test_targets_may_be_functions_and_are_asked_only_where_needed():
    model = network()
    aligner = ag.Aligner(model, {"speech": 7}, selection=[1], schedule=ag.AlignmentSchedule(1, 0, 2, 2), weight=2.0)
    asked, b = [], batch(0, "mean")

    def teacher():
        asked.append(torch.is_grad_enabled())
        return b["features"]["speech"]

    with aligner:
        for step in range(3):
            model(b["x"], b["time"])
            loss = aligner.loss({"speech": teacher})
            assert len(asked) == (step > 0)
            assert (loss == 0) == (step != 1)
            aligner.step(step + 1)
    assert asked == [False]


def test_groups_hold_the_heads_alone():
    model = network()
    aligner = ag.Aligner(model, TEACHERS, selection=[0, 2])
    decayed, rest = aligner.param_groups(weight_decay=0.3, lr=1e-4)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert decayed["lr"] == rest["lr"] == 1e-4
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    heads = set(map(id, [*decayed["params"], *rest["params"]]))
    assert heads == set(map(id, aligner.loss_fn.parameters()))
    assert not heads & set(map(id, model.parameters()))
    assert list(aligner.loss_fn.heads["speech"]) == ["0", "2"]


def test_unselected_heads_run_only_where_asked():
    for every_head in (True, False):
        model = network()
        aligner = aligner_for(model, None, every_head=every_head)
        optimizer = optimizer_for(model, aligner)
        train(model, aligner, optimizer, 0, 3, lambda step: batch(step, None))
        with_gradient = {
            int(name.split(".")[1]) for name, p in aligner.loss_fn.heads.named_parameters() if p.grad is not None
        }
        chosen = set(aligner.selection.layers)
        assert with_gradient == (set(range(DEPTH)) if every_head else chosen)
        assert aligner.states.layers == (tuple(range(DEPTH)) if every_head else tuple(sorted(chosen)))


def test_alignment_ends_at_a_similarity():
    model = network()
    aligner = ag.Aligner(model, TEACHERS, selection=[1], stop_similarity=-1.0)
    b = batch(0, "mean")
    with aligner:
        losses = []
        for step in (1, 2):
            model(b["x"], b["time"])
            losses.append(aligner.loss(b["features"]).item())
            aligner.step(step)
    assert losses[0] > 0
    assert losses[1] == 0
    assert aligner.metrics()["align_factor"] == 0


@pytest.mark.parametrize("wrap", ["ddp", "compile", "peft", "deepcopy"])
def test_wrapped_models(wrap, tmp_path):
    model = network()
    b = batch(0, "mean")
    if wrap == "ddp":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if wrap == "peft":
            peft = pytest.importorskip("peft")
            wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["mix"], r=2))
        else:
            wrapped = {
                "ddp": nn.parallel.DistributedDataParallel,
                "compile": lambda m: torch.compile(m, backend="eager"),
                "deepcopy": copy.deepcopy,
            }[wrap](model)
        aligner = aligner_for(wrapped, "mean")
        velocity = model(b["x"], b["time"])
        with aligner:
            assert torch.equal(wrapped(b["x"], time=b["time"]), velocity)
            scores = aligner.step(2)
            wrapped(b["x"], time=b["time"])
            loss = aligner.loss(b["features"])
            loss.backward()
        expected = ag.attribute_layers(model, (b["x"][:3], b["time"][:3]))
        assert torch.equal(scores.by_sample, expected.by_sample)
    finally:
        if wrap == "ddp":
            torch.distributed.destroy_process_group()


def test_mistakes_are_one_line():
    model = network()
    with pytest.raises(ValueError, match=r"policy 'foga' needs probe=ProbePlan\(...\), or give selection="):
        ag.Aligner(model, TEACHERS)
    with pytest.raises(ag.errors.UserError, match="policy: expected one of"):
        ag.Aligner(model, TEACHERS, policy="best")
    with pytest.raises(ValueError, match="layers: Network has no layer 4, only 0 to 3"):
        ag.Aligner(model, TEACHERS, selection=[4])
    with pytest.raises(ValueError, match="selection: layer 2 has no head"):
        ag.Aligner(model, TEACHERS, selection=[2], layers=[0, 1])
    with pytest.raises(ValueError, match="k: expected 1 to 2 layers, got 3"):
        ag.Aligner(model, TEACHERS, layers=[0, 1], probe=ag.ProbePlan(1))
    del model.dim
    with pytest.raises(ValueError, match="Network does not say how wide its hidden states are: give width="):
        ag.Aligner(model, TEACHERS, selection=[1])
    for wrong, message in (
        ({"start": -1}, "start: expected an integer of at least 0, got -1"),
        ({"start": 1, "t_grid": (0.5, 2)}, "t_grid: expected at least one time"),
        ({"start": 1, "momentum": 1}, "momentum"),
        ({"start": 1, "options": {"metric": "cosine"}}, "options: metric: expected one of rms, squared"),
    ):
        with pytest.raises(ValueError, match=message):
            ag.ProbePlan(**wrong)


def test_a_state_of_another_aligner_is_refused():
    state = ag.Aligner(network(), TEACHERS, selection=[1]).state_dict()
    for options, message in (
        ({"selection": [2]}, r"state: selection: '1 \(1.000\)' in the state, '2 \(1.000\)' here"),
        (
            {"selection": [1], "layers": [1, 2]},
            r"state: loss.heads.speech.2.hidden.weight: here and there .* other layers",
        ),
        ({"selection": [1], "head": "linear"}, "state: head: 'mlp' in the state, 'linear' here"),
        ({"selection": [1], "pool": None}, "state: pool: 'mean' in the state, None here"),
        ({"selection": [1], "objective": "cka"}, "state: objective: 'cosine' in the state, 'cka' here"),
        ({"probe": ag.ProbePlan(1), "layers": [1], "k": 1}, r"state: selection: '1 \(1.000\)' in the state, None here"),
        ({"selection": [1], "stop_similarity": 0.5}, "state: stop: only one of the two has stop_similarity"),
    ):
        with pytest.raises(ValueError, match=message):
            ag.Aligner(network(), TEACHERS, **options).load_state_dict(state)
    probed = {"layers": [1, 2], "probe": ag.ProbePlan(1), "k": 2}
    state = ag.Aligner(network(), TEACHERS, **probed).state_dict()
    for name, value, before in (("k", 1, 2), ("policy", "random", "'foga'"), ("weighting", "by-time", "'share'")):
        with pytest.raises(ValueError, match=f"^state: {name}: {before} in the state, {value!r} here"):
            ag.Aligner(network(), TEACHERS, **{**probed, name: value}).load_state_dict(state)
    again = ag.Aligner(network(), TEACHERS, **probed, weight=2.0, schedule=ag.AlignmentSchedule(1, 2, 3, 4))
    again.load_state_dict({key: value for key, value in state.items() if key != "settings"})  # of an older version
    again.load_state_dict(state)
    with pytest.raises(ValueError, match=r"expected what Aligner.state_dict returns"):
        ag.Aligner(network(), TEACHERS, selection=[1]).load_state_dict({"loss": {}})
