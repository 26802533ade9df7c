"""The network as its own teacher: targets, stop-gradient, the choice of the target layer, resume, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from agrepa_fast import LayerSelection, cli
from agrepa_fast.alignment.self_targets import SOURCES
from agrepa_fast.attribution.stored import lasp, pooled_hidden
from agrepa_fast.errors import UserError
from agrepa_fast.models.conditioning import assemble_condition
from agrepa_fast.models.flow import SIGMA, path
from agrepa_fast.ops import masked_mean
from agrepa_fast.report import read_log
from agrepa_fast.teachers.registry import SELF_SOURCES, build_teacher, register_teacher
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.choice import choose
from agrepa_fast.training.clips import fixed_batches, load_data, spread
from agrepa_fast.training.ema import Ema
from agrepa_fast.training.objective import Objective, StepInputs
from agrepa_fast.training.optimizer import build_optimizer
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.step import TrainStep
from agrepa_fast.training.trainer import Trainer

SOURCE = pytest.mark.parametrize("source", list(SOURCES))
POOL = pytest.mark.parametrize("pool", ["mean", "null"])
QUIET = ("train.samples=0", "model.dropout=0")


def own(source: str, **fields: object) -> str:
    given = ", ".join(f"{name}: {value}" for name, value in {"source": source, **fields}.items())
    return f"alignment.teachers={{self: {{{given}}}}}"


@pytest.fixture
def build(tiny_config, tmp_path):
    """build(*changes) -> configuration, step inputs of held-out clips, objective away from its initialisation."""

    def objective_of(*changes):
        config = tiny_config("model.dropout=0", *changes)
        data = load_data(config, tmp_path)
        [batch] = fixed_batches(data.valid, spread(data.valid, 2), config, one_shape=True)
        torch.manual_seed(0)
        objective = Objective(config, {}, torch.Generator().manual_seed(1))
        for parameter in objective.backbone.network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        average = copy.deepcopy(objective.backbone).requires_grad_(False).eval()
        for parameter in average.parameters():
            parameter.mul_(0.9)
        objective.follow(average)
        everywhere = torch.ones(2, dtype=torch.bool)
        return config, StepInputs.of(batch, {}, batch.mask, {"self": everywhere}), objective

    return objective_of


@SOURCE
@POOL
def test_the_loss_is_the_cosine_to_the_later_layer(build, source, pool):
    """Against plain PyTorch: the head of layer 0, and layer 2 of this forward or of the average at the cleaner time."""
    _, inputs, objective = build(own(source, target_layer=2), f"alignment.pool={pool}")
    objective.aligner.select(LayerSelection.uniform([0]))
    draws = objective.draw(inputs)
    _, metrics = objective(inputs, draws, torch.tensor(1.0))

    def states(backbone, t):
        x_t, _ = path(inputs.mel, draws.noise, t)
        cond = assemble_condition(
            backbone.embed_tokens(inputs), inputs.mel, inputs.prompt, draws.keep_tokens, draws.keep_prompt
        )
        return backbone.network(x_t, t, cond, inputs.mask, hidden_layers=range(3))[1]

    hidden = states(objective.backbone, draws.t)
    if source == "self-flow":
        assert (draws.clean_t > draws.t).all()
        assert (draws.clean_t < 1).all()
        target = states(objective._average[0], draws.clean_t)[2]
    else:
        target = hidden[2]
    x = hidden[0]
    if pool == "mean":
        x, target = masked_mean(x, inputs.mask), masked_mean(target, inputs.mask)
    head = objective.alignment.heads["self"]["0"]
    cosine = F.cosine_similarity(head.output(F.gelu(head.hidden(F.layer_norm(x, (16,))))), target, dim=-1)
    cosine = cosine.mean() if pool == "mean" else cosine[inputs.mask].mean()
    torch.testing.assert_close(metrics["align_loss"], 1 - cosine.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["cosine/self/0"], cosine.detach(), rtol=1e-5, atol=1e-6)


@SOURCE
def test_a_run_sees_the_random_numbers_of_a_run_without_alignment(build, source):
    """Noise, t and two dropouts, step after step: arms of a study differ in nothing but the alignment."""
    _, inputs, objective = build(own(source, target_layer=2))
    generator = torch.Generator().manual_seed(1)
    size = inputs.mel.shape[0]
    for _ in range(3):
        draws = objective.draw(inputs)
        assert torch.equal(draws.noise, SIGMA * torch.randn(inputs.mel.shape, generator=generator))
        assert torch.equal(draws.t, torch.rand(size, generator=generator))
        assert torch.equal(draws.keep_tokens, torch.rand(size, generator=generator) >= 0.1)
        assert torch.equal(draws.keep_prompt, torch.rand(size, generator=generator) >= 0.1)


def test_the_cleaner_time_is_uniform_between_t_and_1(build):
    """Over 20,000 samples, also among those of nearly one t: the share of the way has the quantiles of a uniform."""
    _, inputs, objective = build(own("self-flow", target_layer=2))
    many = dataclasses.replace(inputs, mel=inputs.mel[:1, :1, :1].expand(20_000, 1, 1))
    draws = objective.draw(many)
    share = (draws.clean_t - draws.t) / (1 - draws.t)
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(share.quantile(levels), levels, rtol=0, atol=0.02)
    assert abs(torch.corrcoef(torch.stack([draws.t, share]))[0, 1]) < 0.03
    torch.testing.assert_close(share[(draws.t - 0.5).abs() < 0.05].quantile(levels), levels, rtol=0, atol=0.05)


@SOURCE
@POOL
def test_no_gradient_reaches_the_target(build, source, pool):
    """What lies after the aligned layer gets the gradient of the flow loss alone, to the last bit."""
    _, inputs, objective = build(own(source, target_layer=2), f"alignment.pool={pool}")
    objective.aligner.select(LayerSelection.uniform([0]))
    network, draws = objective.backbone.network, objective.draw(inputs)
    total = objective(inputs, draws, torch.tensor(1.0))[0]
    flow = objective(inputs, draws, None)[0]
    after = [p for branch in network.branches[2:] for p in branch.parameters()]
    before = [p for branch in network.branches[:2] for p in branch.parameters()]
    gradients = [torch.autograd.grad(loss, [*after, *before]) for loss in (total, flow)]
    for mine, other in zip(*(part[: len(after)] for part in gradients)):
        assert torch.equal(mine, other)
    assert not any(torch.equal(mine, other) for mine, other in zip(*(part[len(after) :] for part in gradients)))
    assert all(p.grad is None for p in objective._average[0].parameters())


@pytest.mark.parametrize(("source", "pool"), [("layersync", "null"), ("self-flow", "mean")])
def test_it_trains_compiled_as_eager(build, source, pool, monkeypatch):
    original = torch.compile
    monkeypatch.setattr("torch.compile", lambda module, **options: original(module, backend="eager", **options))
    torch._dynamo.reset()
    steps = []
    for engine in ("compile", "eager"):
        config, inputs, objective = build(own(source, target_layer=2), f"alignment.pool={pool}")
        objective.aligner.select(LayerSelection.uniform([0, 1]))
        ema = Ema(objective.backbone, 0.5)
        objective.follow(ema.module)
        objective.aligner.align(0.5)
        step = TrainStep(objective, build_optimizer(objective, config), ema, config, inputs.mel.device, False, engine)
        for _ in range(3):
            step([inputs], 1e-3)
        steps.append((objective.state_dict(), step.read()[0]))
    torch._dynamo.reset()
    (mine, metrics), (other, expected) = steps
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("source", "pool"), [("layersync", "mean"), ("self-flow", "null")])
def test_a_resumed_run_ends_with_the_same_bits(tiny_config, source, pool, state_bits, assert_same_bits):
    """The target layer is measured at step 3; the second half of the run goes on with it."""
    changes = (*QUIET, own(source), f"alignment.pool={pool}", "model.depth=4", "probe.every=2", "probe.samples=4")
    whole = start_run(tiny_config(*changes)).run()
    newest = load_checkpoint(whole).path
    bits, chosen = state_bits(whole), json.loads((whole / "selection.json").read_text())
    newest.rename(whole / "held")
    again = resume_run(load_checkpoint(whole).path)
    assert again.step == 4
    assert again.aligner.self_targets.layers == {"self": chosen["target"]}
    again.run()
    assert_same_bits(bits, state_bits(whole))
    probes = [entry["selection"] for entry in read_log(whole / "log.jsonl") if entry["event"] == "probe"]
    assert len(probes) > 1
    assert len({probe["target"] for probe in probes}) == 1
    assert all(max(probe["layers"]) < probe["target"] < 4 for probe in probes)


@pytest.mark.parametrize("policy", ["foga", "foga-soft", "stored", "first-order", "deepest", "random", "even"])
@pytest.mark.parametrize("target", [2, None])
def test_every_policy_chooses_before_the_target(tiny_config, tmp_path, policy, target):
    changes = (*QUIET, "model.depth=5", f"alignment.policy={policy}", "probe.start=0", "probe.samples=4")
    trainer = Trainer(tiny_config(*changes, own("layersync", target_layer=target or "null")), tmp_path)
    for parameter in trainer.objective.backbone.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    choose(trainer)
    [layer] = trainer.aligner.self_targets.layers.values()
    assert layer == (target or trainer.selection.target)
    assert max(trainer.selection.layers) < layer
    if policy == "deepest":
        assert trainer.selection.layers == (layer - 2, layer - 1)


def test_the_target_is_the_layer_that_stores_most_of_the_clips_own_spectra(tiny_config, tmp_path):
    config = tiny_config(*QUIET, own("layersync"), "model.depth=5", "probe.k=1", "probe.samples=2")
    trainer = Trainer(config, tmp_path)
    torch.manual_seed(5)
    for parameter in trainer.objective.backbone.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    choose(trainer)
    [batch] = fixed_batches(trainer.data.valid, spread(trainer.data.valid, 2), config, one_shape=True)
    rows = [mel[mask] for mel, mask in zip(batch.mel, batch.mask)]
    spectra = torch.stack([torch.cat([row.mean(0), row.std(0, correction=0)]) for row in rows])
    noise = SIGMA * torch.randn(batch.mel.shape, generator=torch.Generator().manual_seed(config.train.seed))
    network, (cond, _) = trainer.objective.backbone.network, trainer.objective.backbone.condition(batch)
    order = batch.domain.argsort(stable=True)
    hidden = []
    for time in config.probe.t_grid:
        t = torch.full((len(rows),), time)
        inputs = {"x_t": path(batch.mel, noise, t)[0], "t": t, "cond": cond, "mask": batch.mask}
        hidden.append(pooled_hidden(network, inputs)[:, order])
    fitted = torch.tensor([True, False]).repeat(2)
    strength = lasp(torch.cat(hidden, 1), spectra[order].repeat(2, 1), fitted).mean(1)
    assert trainer.selection.target == 1 + int(strength[1:].argmax())


def test_beside_another_teacher_each_with_its_own_layers(tiny_config):
    """The other teacher may take any layer, the network itself those before its target."""
    teachers = "alignment.teachers={voice: {}, self: {source: layersync, target_layer: 2}}"
    changes = (*QUIET, teachers, "alignment.selection_per=teacher", "alignment.policy=deepest", "alignment.bitc=true")
    run = start_run(tiny_config(*changes)).run()
    chosen = json.loads((run / "selection.json").read_text())["teachers"]
    assert chosen["voice"]["layers"] == [1, 2]
    assert chosen["self"]["layers"] == [0, 1]
    [*_, last] = [entry for entry in read_log(run / "log.jsonl") if entry["event"] == "valid"]
    assert {name for name in last if name.startswith("cosine/")} == {
        f"cosine/{name}" for name in ("voice/1", "voice/2", "self/0", "self/1")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([own("layersync", target_layer=3)], r"teachers.self.target_layer: expected a layer below model.depth \(3\)"),
        ([own("layersync", target_layer=1)], r"probe.k: expected at most 1, .* target of teacher 'self', got 2"),
        ([own("self-flow"), "probe.k=3"], r"probe.k: expected at most 2, "),
        ([own("layersync", target_layer=1), "alignment.layers=[1]"], r"after all of alignment.layers \(1\), got 1"),
        ([own("layersync"), "alignment.layers=[1]"], r"expected a layer after 1, as alignment.layers .* got null"),
        ([own("self-flow", cached="true")], r"teachers.self.cached: expected false with self-flow"),
        ([own("layersync", options="{layer: 2}")], r"teachers.self.options: expected none with layersync .* got layer"),
        ([own("spectral", target_layer=2)], r"teachers.self.target_layer: expected null with source spectral"),
        ([own("layersync", target_layer=0)], r"target_layer: expected at least 1"),
        ([own("layersync"), "alignment.bitc=true"], r"alignment.bitc: expected false without a teacher other than"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny_config, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        tiny_config(*changes)
    assert "\n" not in str(caught.value)


def test_a_selection_that_does_not_fit_the_target_is_refused(tiny_config, tmp_path):
    file = tmp_path / "selection.json"
    LayerSelection.uniform([0, 2]).to_json(file)
    with pytest.raises(UserError, match=r"target layer 2: expected a layer after the aligned ones \(0, 2\) of the 3"):
        Trainer(tiny_config(own("layersync", target_layer=2), f"alignment.selection={file}"), tmp_path / "run")
    LayerSelection.uniform([0]).to_json(file)
    with pytest.raises(UserError, match=r"no target layer: give target_layer, from 1 to 2"):
        Trainer(tiny_config(own("layersync"), f"alignment.selection={file}"), tmp_path / "run")
    file.write_text('{"layers": [1], "weights": [1.0], "target": 1}')
    with pytest.raises(UserError, match=r"not a layer selection \(target: expected a layer after all of \[1\], got 1"):
        Trainer(tiny_config(own("layersync"), f"alignment.selection={file}"), tmp_path / "run")


def test_there_is_nothing_to_extract(tiny, capsys):
    changes = [change for change in tiny(own("layersync")) if "=" in change]
    assert cli.main(["extract", "demo", "--teacher", "self", *changes]) == 2
    assert "--teacher self: its source layersync is the network itself" in capsys.readouterr().err


def test_the_names_are_taken():
    assert tuple(SOURCES) == SELF_SOURCES
    with pytest.raises(ValueError, match="registered already"):
        register_teacher("layersync", lambda: None)
    with pytest.raises(UserError, match="'self-flow': it is the network that is trained"):
        build_teacher("self-flow")
