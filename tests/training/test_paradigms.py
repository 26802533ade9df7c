"""Runs in every parametrisation: they train, probe, resume and sample; what is asked wrongly is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from agrepa_fast.attribution.files import read_scores
from agrepa_fast.errors import UserError
from agrepa_fast.models.flow import flow_matching_loss
from agrepa_fast.models.process import PARAMETRISATIONS
from agrepa_fast.report import foga, loss, read_log
from agrepa_fast.report.folder import read_folder
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.clips import fixed_batches, load_data, spread
from agrepa_fast.training.inference import generate, layer_values, load_backbone, score_layers
from agrepa_fast.training.objective import Objective, StepInputs
from agrepa_fast.training.start import resume_run, start_run

OTHERS = [(path, output) for path, outputs in PARAMETRISATIONS.items() for output in outputs if output != "velocity"]
CPU = torch.device("cpu")


@pytest.fixture
def _no_report(monkeypatch):
    """The report is tested elsewhere and takes longer than the steps."""
    monkeypatch.setattr("agrepa_fast.training.trainer.write_report", lambda run_dir: run_dir)


@pytest.fixture
def objective_of(tiny_config, tmp_path):
    """objective_of(*changes) -> (configuration, objective, a step's inputs, held-out clips)."""

    def build(*changes):
        config = tiny_config("alignment.bitc=false", *changes)
        data = load_data(config, tmp_path)
        [batch] = fixed_batches(data.valid, spread(data.valid, 2), config, one_shape=True)
        torch.manual_seed(0)
        objective = Objective(config, {"spectral": 60}, torch.Generator().manual_seed(1)).eval()
        torch.nn.init.normal_(objective.backbone.network.output.weight, std=0.2)
        for branch in objective.backbone.network.branches:
            torch.nn.init.normal_(getattr(branch, "out", getattr(branch, "down", None)).weight, std=0.2)
        targets = {"spectral": torch.randn(2, 60)}
        domains = {"spectral": torch.tensor([True, True])}
        return config, objective, StepInputs.of(batch, targets, batch.mask, domains), data.valid

    return build


def flow_changes(path, output, weighting="none"):
    return f"flow.path={path}", f"flow.parametrisation={output}", f"flow.weighting={weighting}"


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("path, output", OTHERS)
def test_a_run_trains_probes_resumes_and_samples(tiny_config, state_bits, assert_same_bits, path, output):
    whole = start_run(tiny_config(*flow_changes(path, output), "train.valid_every=8")).run()
    log = read_log(whole / "log.jsonl")
    assert log[0]["process"]["parametrisation"] == output
    scores = read_scores(whole / "foga.csv")
    assert scores.layers == (0, 1, 2)
    assert scores.by_sample.max() > 0  # the probe of step 3 finds a network that has begun to learn
    assert (whole / next(e["path"] for e in log if e["event"] == "sample")).stat().st_size > 1000
    trained = state_bits(whole)
    resume_run(whole / "checkpoints" / "step_00000004").run()
    assert_same_bits(state_bits(whole), trained)


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("changes", [flow_changes("vp-cosine", "v", "sigmoid"), flow_changes("edm", "eps", "edm")])
def test_training_lowers_the_validation_loss(tiny_config, changes):
    few = ("train.steps=60", "alignment.enabled=false", "train.valid_every=60", "train.samples=0")
    log = read_log(start_run(tiny_config(*few, *changes)).run() / "log.jsonl")
    first, last = [e["flow_loss"] for e in log if e["event"] == "valid"]
    assert last < 0.95 * first


@pytest.mark.parametrize(
    "path, output, weighting",
    [("rectified", "velocity", "logit-normal"), ("edm", "x0", "edm"), ("vp-cosine", "v", "none")],
)
def test_the_loss_is_the_weighted_mean_and_the_metric_is_not(objective_of, path, output, weighting):
    config, objective, inputs, _ = objective_of(*flow_changes(path, output, weighting))
    draws = objective.draw(inputs)
    loss, metrics = objective(inputs, draws, None)
    process = config.flow.process
    x_t, target = process.point(inputs.mel, draws.noise, draws.t)
    cond, _ = objective.backbone.condition(inputs)
    assert draws.keep_tokens.all()
    assert draws.keep_prompt.all()
    errors = flow_matching_loss(objective.backbone.network(x_t, draws.t, cond, inputs.mask), target, inputs.mask)
    weight = process.weight(draws.t)
    expected = errors.mean() if weight is None else (weight * errors).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["flow_loss"], errors.mean())
    assert weighting == "none" or abs(loss - metrics["flow_loss"]) > 1e-3 * loss


def test_the_noise_and_the_times_are_those_of_the_path(objective_of):
    config, objective, inputs, _ = objective_of(*flow_changes("edm", "v"))
    _, default, same, _ = objective_of()
    ours, theirs = objective.draw(inputs), default.draw(same)
    assert torch.equal(ours.noise, 2 * theirs.noise)  # std 1 in place of 0.5
    torch.testing.assert_close(ours.t, config.flow.process.times(theirs.t))


@pytest.mark.parametrize("path, output", [("vp-cosine", "eps"), ("edm", "x0"), ("rectified", "x0")])
def test_gradient_cosines_are_of_the_loss_that_is_trained(objective_of, path, output):
    weighting = "edm" if path == "edm" else "none"
    config, objective, inputs, _ = objective_of(*flow_changes(path, output, weighting))
    draws = objective.draw(inputs)
    cosines = objective.gradient_cosines(inputs, draws)
    process = config.flow.process
    x_t, target = process.point(inputs.mel, draws.noise, draws.t)
    cond, _ = objective.backbone.condition(inputs)
    predicted, hidden = objective.backbone.network(x_t, draws.t, cond, inputs.mask, hidden_layers=(0, 1, 2))
    weight = process.weight(draws.t)
    losses = flow_matching_loss(predicted, target, inputs.mask) * (1 if weight is None else weight)
    aligned, _ = objective.alignment(hidden, inputs.targets, inputs.target_mask, inputs.domains)
    for layer, state in hidden.items():
        pair = [torch.autograd.grad(loss, state, retain_graph=True)[0].flatten() for loss in (losses.mean(), aligned)]
        expected = F.cosine_similarity(*pair, dim=0)
        torch.testing.assert_close(cosines[f"gradient_cosine/{layer}"], expected, rtol=1e-4, atol=1e-5)


def ablated(network, layer, inputs):
    """The network's output without a block."""
    kept = [(branch.out if hasattr(branch, "out") else branch.down) for branch in network.branches]
    saved = [(last.weight.detach().clone(), last.bias.detach().clone()) for last in kept]
    try:
        for last in kept[2 * layer : 2 * layer + 2]:
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
        return network(**inputs)
    finally:
        for last, (weight, bias) in zip(kept, saved):
            last.weight.data, last.bias.data = weight, bias


@pytest.mark.parametrize("path, output", [("vp-cosine", "eps"), ("rectified", "x0"), ("edm", "eps"), ("edm", "v")])
@pytest.mark.parametrize("scored", ["network", "velocity"])
@torch.no_grad()
def test_scores_are_changes_of_the_output_or_of_the_velocity(objective_of, path, output, scored):
    """Against a loop that takes the blocks out one at a time and converts each output by hand."""
    config, objective, _, held_out = objective_of(*flow_changes(path, output), f"probe.output={scored}")
    backbone, process = objective.backbone, config.flow.process
    scores = score_layers(backbone, held_out, config, CPU)
    assert scores.metric == "rms"
    [batch] = fixed_batches(held_out, spread(held_out, config.probe.samples), config, one_shape=True)
    cond, _ = backbone.condition(batch)
    generator = torch.Generator().manual_seed(config.train.seed)
    noise = process.noise_std * torch.randn(batch.mel.shape, generator=generator)
    for g, time in enumerate(config.probe.t_grid):
        t = torch.full((2,), time)
        x_t, _ = process.point(batch.mel, noise, t)
        inputs = {"x_t": x_t, "t": t, "cond": cond, "mask": batch.mask}
        results = [backbone.network(**inputs), *(ablated(backbone.network, layer, inputs) for layer in range(3))]
        if scored == "velocity":
            a, b = (part[:, None, None] for part in process.coefficients(t))
            noises = results if output == "eps" else [(x_t - a * data) / b for data in results]
            datas = [(x_t - b * noise) / a for noise in noises] if output == "eps" else results
            if output == "v":
                noises = datas = None
            elif path == "rectified":
                results = [data - noise for data, noise in zip(datas, noises)]
            else:
                results = [a * noise - b * data for data, noise in zip(datas, noises)]
        kept = batch.mask.unsqueeze(-1)
        count = kept.sum((1, 2)) * batch.mel.shape[-1]
        squares = [torch.where(kept, r - results[0], 0).square().sum((1, 2)) / count for r in results[1:]]
        energy = torch.where(kept, results[0], 0).square().sum((1, 2)) / count
        expected = (torch.stack(squares) + 1e-8).sqrt() / ((energy + 1e-8).sqrt() + 1e-8)
        got = scores.by_sample[:, 2 * g : 2 * g + 2].float()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-5)


def test_layer_values_of_the_controls_follow_the_process(objective_of):
    """The gradient-norm control differentiates the loss that is trained, on the path that is trained."""
    config, objective, _, held_out = objective_of(*flow_changes("edm", "x0", "edm"), "probe.t_grid=[0.5]")
    weighted = layer_values("gradient-norm", objective.backbone, {}, held_out, config, CPU)
    plain_config, _, _, _ = objective_of(*flow_changes("edm", "x0"), "probe.t_grid=[0.5]")
    plain = layer_values("gradient-norm", objective.backbone, {}, held_out, plain_config, CPU)
    weight = config.flow.process.weight(torch.tensor([0.5], dtype=torch.float64)).item()
    for name, values in weighted.items():
        torch.testing.assert_close(values, plain[name] * weight, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("_no_report")
def test_generate_samples_by_the_process_of_the_run(tiny_config, monkeypatch):
    changes = flow_changes("edm", "v")
    run_dir = start_run(tiny_config("train.steps=4", *changes, "train.samples=0", "alignment.enabled=false")).run()
    backbone, checkpoint = load_backbone(run_dir, CPU)
    seen = {}

    def sample(network, noise, *arguments, **options):
        seen.update(options, std=noise.std().item())
        return noise

    monkeypatch.setattr("agrepa_fast.training.inference.sample", sample)
    data = load_data(checkpoint.config, run_dir)
    [batch] = fixed_batches(data.valid, spread(data.valid, 2), checkpoint.config, one_shape=True)
    generate(backbone, batch, checkpoint.config)
    assert seen["process"] == checkpoint.config.flow.process
    assert seen["sway_coefficient"] is None  # EDM's own grid; -1 on the rectified path
    assert seen["std"] == pytest.approx(1, rel=0.05)


@pytest.mark.usefixtures("_no_report")
def test_old_checkpoints_are_velocity_on_the_rectified_path(tiny_config):
    """Their config.yaml has none of the fields, and a number for sway."""
    import hashlib

    run_dir = start_run(tiny_config("train.steps=4", "train.samples=0", "alignment.enabled=false")).run()
    file = load_checkpoint(run_dir).path / "config.yaml"
    new = ("path:", "parametrisation:", "weighting:")
    lines = [line for line in file.read_text().splitlines() if not line.strip().startswith(new)]
    file.write_text("\n".join(lines).replace("sway: null", "sway: -1.0") + "\n")
    manifest = file.parent / "manifest.json"
    facts = json.loads(manifest.read_text())
    content = file.read_bytes()
    for entry in (facts.get("files", facts)).items():
        if entry[0] == "config.yaml":
            entry[1].update({key: len(content) for key in ("bytes", "size") if key in entry[1]})
            entry[1]["sha256"] = hashlib.sha256(content).hexdigest()
    manifest.write_text(json.dumps(facts))
    flow = load_checkpoint(run_dir).config.flow
    assert (flow.path, flow.parametrisation, flow.weighting) == ("rectified", "velocity", "none")
    assert flow.sway_coefficient == -1.0


@pytest.mark.usefixtures("_no_report")
def test_a_run_keeps_its_parametrisation(tiny_config):
    run_dir = start_run(tiny_config("train.steps=4", "train.samples=0", "alignment.enabled=false")).run()
    with pytest.raises(UserError, match=r"flow\.parametrisation: the run was trained with velocity, .* got x0"):
        resume_run(run_dir, ["flow.parametrisation=x0"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (["flow.path=vp"], "flow.path: expected one of rectified, vp-cosine, edm, got 'vp'"),
        (
            ["flow.parametrisation=v"],
            "flow.path, flow.parametrisation: expected rectified with one of velocity, eps, x0, got 'v'",
        ),
        (
            ["flow.path=edm"],
            "flow.path, flow.parametrisation: expected edm with one of v, eps, x0, got 'velocity'; v is",
        ),
        (
            ["flow.weighting=edm"],
            "flow.path, flow.parametrisation, flow.weighting: expected edm with v or edm with eps or edm with x0",
        ),
        (["flow.sway=3"], "flow.sway: expected null or at least -1, at most 1.75, got 3"),
        (
            ["flow.parametrisation=eps", "probe.output=velocity", "probe.t_grid=[0,0.5]"],
            "probe.t_grid, probe.output, flow.path, flow.parametrisation: expected times from 0.02 to 1, where",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tiny_config, changes, message):
    with pytest.raises(UserError) as raised:
        tiny_config(*changes)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("_no_report")
def test_the_report_says_what_is_predicted(tiny_config):
    run_dir = start_run(tiny_config(*flow_changes("vp-cosine", "eps"), "train.samples=0")).run()
    folder = read_folder(run_dir)
    assert "Mean squared error of the predicted noise on the path vp-cosine" in loss.section(folder)
    assert "Change of the predicted noise when one layer is switched off" in foga.section(folder)
    folder.log[0]["process"]["scored"] = "velocity"
    assert "Change of the predicted velocity when one layer" in foga.section(folder)
