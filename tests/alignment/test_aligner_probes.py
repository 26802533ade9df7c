"""The probes of an `Aligner`: what it scores on, and what it chooses from the scores."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import agrepa_fast as ag

from .foreign import DEPTH, TEACHERS, aligner_for, batch, network


def test_probes_take_given_inputs_a_function_of_times_or_the_last_call():
    model = network()
    aligner = aligner_for(model, "mean", state=None)
    b = batch(0, "mean")
    with pytest.raises(ValueError, match=r"no inputs to probe on: .*give inputs="):
        aligner.step(2)
    given = aligner.probe((b["x"], b["time"]))
    assert torch.equal(given.by_sample, ag.attribute_layers(model, (b["x"], b["time"])).by_sample)
    asked = []

    def inputs(t_grid):
        asked.append(t_grid)
        names = {"x_t": "x", "t": "time"}
        return ag.probe_inputs(b["x"], None, None, t_grid, torch.Generator().manual_seed(0), sigma=1.0, names=names)

    scores = aligner.step(2, inputs, domains=b["domains"] * 5)
    assert asked == [(0.1, 0.3, 0.5, 0.7, 0.9)]
    assert scores.by_sample.shape == (DEPTH, 20)
    assert aligner.step(3, inputs) is None
    assert len(asked) == 1
    with aligner:
        model(b["x"], time=b["time"])
        with torch.no_grad():
            model(b["x"][:2] + 1, b["time"][:2])  # a validation, which is not a training step
        scores = aligner.probe()
    expected = ag.attribute_layers(model, (b["x"][:3], b["time"][:3]))
    assert torch.equal(scores.by_sample, expected.by_sample)


def test_probe_inputs_follow_the_models_path():
    x = torch.randn(2, 3, 4)
    found = ag.probe_inputs(
        x, None, None, [0.25, 1.0], torch.Generator().manual_seed(3), sigma=2.0,
        names={"x_t": "sample", "t": "timestep"}, extra={"text": torch.tensor([7, 8]), "scale": 3},
    )  # fmt: skip
    noise = 2 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found["sample"], torch.cat([0.75 * noise + 0.25 * x, x]))
    assert found["timestep"].tolist() == [0.25, 0.25, 1, 1]
    assert found["text"].tolist() == [7, 8, 7, 8]
    assert found["scale"] == 3
    assert set(found) == {"sample", "timestep", "text", "scale"}
    with pytest.raises(ValueError, match="names: expected some of x_t, t, cond, mask, got 'x'"):
        ag.probe_inputs(x, None, None, [0.5], names={"x": "sample"})
    with pytest.raises(ValueError, match="sigma"):
        ag.probe_inputs(x, None, None, [0.5], sigma=0)


def test_a_probe_runs_under_the_autocast_of_the_step():
    model = network()
    aligner = aligner_for(model, "mean")
    b = batch(0, "mean")
    with aligner:
        with torch.autocast("cpu", torch.bfloat16):
            model(b["x"].bfloat16(), b["time"])
        scores = aligner.step(2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ag.attribute_layers(model, (b["x"][:3].bfloat16(), b["time"][:3]))
    assert torch.equal(scores.by_sample, expected.by_sample)


def test_where_no_score_says_anything_the_next_probe_chooses():
    model = network()
    with torch.no_grad():
        tail = model.tail.weight.clone()
        model.tail.weight.zero_()
        model.tail.bias.zero_()
    aligner = aligner_for(model, "mean")
    b = batch(0, "mean")
    with pytest.warns(UserWarning, match="falling back to equal weights"):
        aligner.step(2, (b["x"], b["time"]))
    assert aligner.selection.layers == tuple(range(DEPTH))
    with torch.no_grad():
        model.tail.weight.copy_(tail)
    aligner.step(4, (b["x"], b["time"]))
    assert len(aligner.selection.layers) == 2


def test_candidates_alone_are_scored_and_chosen():
    model = network()
    aligner = aligner_for(model, "mean", layers=["blocks.1", 3], k=1)
    b = batch(0, "mean")
    assert aligner.step(2, (b["x"], b["time"])).layers == (1, 3)
    assert set(aligner.selection.layers) < {1, 3}
    aligner.step(4, (b["x"], b["time"]))
    assert set(aligner.selection.layers) < {1, 3}
    assert list(aligner.loss_fn.heads["audio"]) == ["1", "3"]


def test_each_teacher_may_have_its_own_layers():
    """Chosen from the samples of its domains, which are named beside the probe's inputs."""
    model = network()
    aligner = aligner_for(model, "mean", domains={"speech": ["voice"], "audio": ["music"]}, k=1)
    b = batch(0, "mean")
    names = ["voice", "music", "voice", "music"]
    with aligner:
        model(b["x"], b["time"])
        scores = aligner.step(2, domains=names)
        expected = {
            name: ag.select_layers(scores.domain(of), 1) for name, of in (("speech", "voice"), ("audio", "music"))
        }
        assert aligner.selection == expected
        assert scores.domains == ("voice", "music", "voice")
        model(b["x"], b["time"])
        aligner.loss(b["features"]).backward()
        shown = {f"cosine/{name}/{own.layers[0]}" for name, own in expected.items()}
        assert {name for name in aligner.metrics() if "/" in name} == shown
    again = aligner_for(network(), "mean", domains={"speech": ["voice"], "audio": ["music"]}, k=1)
    again.load_state_dict(aligner.state_dict())
    assert again.selection == expected


def test_weights_may_follow_the_flow_time():
    model = network()
    plan = ag.ProbePlan(start=2, t_grid=(0.2, 0.8))
    aligner = ag.Aligner(model, TEACHERS, k=1, weighting="by-time", probe=plan, weight=1.0)
    b = batch(0, "mean")
    noise = torch.randn(b["x"].shape, generator=torch.Generator().manual_seed(0))

    def inputs(t_grid):
        return ag.probe_inputs(
            b["x"], None, None, t_grid, torch.Generator().manual_seed(0), sigma=1.0, names={"x_t": "x", "t": "time"}
        )

    with aligner:
        scores = aligner.step(2, inputs)
        torch.testing.assert_close(inputs((0.2,))["x"], 0.8 * noise + 0.2 * b["x"])
        assert aligner.selection == ag.select_layers(scores, 1, weighting="by-time")
        model(b["x"], b["time"])
        found = aligner.loss(b["features"], t=b["time"])
        hidden = ag.HiddenStates(model).attach()
        model(b["x"], b["time"])
        expected, _ = aligner.loss_fn(hidden.read(), b["features"], t=b["time"])
        hidden.detach()
    assert found.item() == expected.item() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_probe_of_a_bad_batch_is_postponed(bad):
    """One batch with nan among the training batches: the loop goes on, and the next step's batch chooses."""
    model = network()
    aligner = aligner_for(model, "mean")
    before = [parameter.clone() for parameter in model.parameters()]
    with aligner:
        for step in (1, 2, 3):
            b = batch(step, "mean")
            x = b["x"].clone()
            if step == 2:
                x[1, 0, 0] = bad
            velocity = model(x, time=b["time"])
            aligner.loss(b["features"], b["mask"], b["domains"])
            if step == 2:
                with pytest.warns(
                    UserWarning, match="^step 2: the probe is postponed to the next step: .*(nan|finite)"
                ):
                    assert aligner.step(step) is None
                assert aligner.selection is None
                assert aligner.due(3)
                assert not velocity.isfinite().all()
            else:
                scores = aligner.step(step)
    assert torch.equal(scores.by_sample, ag.attribute_layers(model, (b["x"][:3], b["time"][:3])).by_sample)
    assert aligner.choice.probed == 3
    assert all(map(torch.equal, before, model.parameters()))


def test_a_network_that_has_diverged_ends_the_run():
    model = network()
    with torch.no_grad():
        model.tail.bias[0] = math.nan
    aligner = aligner_for(model, "mean")
    b = batch(0, "mean")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2, 22):
            assert aligner.step(step, (b["x"], b["time"])) is None
    assert len(caught) == 1
    with pytest.raises(ag.errors.NotFiniteError, match=r"^step 22: no probe was finite in 21 steps: .*: check the"):
        aligner.step(22, (b["x"], b["time"]))
    with torch.no_grad():
        model.tail.bias[0] = 0
    assert aligner.step(22, (b["x"], b["time"])) is not None
