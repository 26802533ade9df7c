"""The objective of a batch: which frames are aligned, what the metrics mean, condition dropout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from agrepa_fast import LayerSelection
from agrepa_fast.data.audio import read_audio
from agrepa_fast.data.features import collate_features
from agrepa_fast.errors import UserError
from agrepa_fast.models.flow import SIGMA, path
from agrepa_fast.ops import masked_mean
from agrepa_fast.teachers.cache import FeatureKey, FilesBesideAudio, feature_path, write_features
from agrepa_fast.teachers.registry import build_teacher
from agrepa_fast.training.aligning import build_aligner
from agrepa_fast.training.choice import choose
from agrepa_fast.training.clips import fixed_batches, load_data, spread
from agrepa_fast.training.inference import layer_values
from agrepa_fast.training.objective import Draws, Objective, StepInputs
from agrepa_fast.training.targets import domain_tables, teacher_targets
from agrepa_fast.training.trainer import Trainer


@pytest.fixture
def setup(tiny_config, tmp_path):
    def build(*changes):
        config = tiny_config(*changes)
        data = load_data(config, tmp_path)
        teachers = {"spectral": build_teacher("spectral")}
        [batch] = fixed_batches(data.valid, spread(data.valid, 2), config, one_shape=True)
        torch.manual_seed(0)
        return config, batch, teachers, Objective(config, {"spectral": 60})

    return build


def run(objective, batch, targets, mask, domains, weight=None, draws=None):
    """Loss and metrics of a batch; weight None leaves alignment out."""
    given = StepInputs.of(batch, targets, mask, domains)
    weight = None if weight is None else torch.tensor(weight)
    return objective(given, objective.draw(given) if draws is None else draws, weight)


def test_span_leaves_out_the_frames_shown_as_reference(setup):
    config, batch, teachers, _ = setup("alignment.mask=span", "alignment.pool=null", "data.prompt_share=[0.4,0.5]")
    _, span = teacher_targets(teachers, batch, config)
    assert batch.prompt.any()
    assert not (span & batch.prompt).any()
    config, batch, _, _ = setup("alignment.mask=valid", "alignment.pool=null", "data.prompt_share=[0.4,0.5]")
    _, valid = teacher_targets(teachers, batch, config)
    assert torch.equal(valid & ~batch.prompt, span)


def test_pooled_targets_are_means_over_what_the_teacher_heard(setup):
    config, batch, teachers, _ = setup()
    targets, mask = teacher_targets(teachers, batch, config)
    assert torch.equal(mask, batch.mask)
    for row in range(batch.mel.shape[0]):
        samples = int(batch.audio_lengths[row])
        alone, heard = teachers["spectral"](batch.audio[row : row + 1, :samples], torch.tensor([samples]), 16000)
        torch.testing.assert_close(targets["spectral"][row], alone[0][heard[0]].mean(0), rtol=1e-4, atol=1e-5)


def test_frame_targets_are_at_the_mel_frames_times(setup):
    """A mel frame j is centred on j hops; the teacher's frame that covers this time has most of the weight."""
    config, batch, teachers, _ = setup("alignment.pool=null")
    targets, mask = teacher_targets(teachers, batch, config)
    features, _ = teachers["spectral"](batch.audio, batch.audio_lengths, 16000)
    j = 10
    position = j / config.mel.frame_rate * 50 - 0.5
    left = int(position)
    expected = torch.lerp(features[:, left], features[:, left + 1], position - left)
    torch.testing.assert_close(targets["spectral"][:, j], expected, rtol=1e-4, atol=1e-4)
    assert mask[:, j].all()


def test_loss_is_flow_plus_weighted_alignment(setup):
    config, batch, teachers, objective = setup("flow.token_dropout=0.0", "flow.prompt_dropout=0.0", "model.dropout=0.0")
    targets, mask = teacher_targets(teachers, batch, config)
    domains = {"spectral": torch.ones(2, dtype=torch.bool)}
    loss, metrics = run(objective, batch, targets, mask, domains, 0.25)
    expected = metrics["flow_loss"] + 0.25 * metrics["align_loss"]
    torch.testing.assert_close(loss.detach(), expected)
    # at initialisation the velocity is zero, so the flow loss is the mean square of the target
    generator = torch.Generator().manual_seed(3)
    noise = SIGMA * torch.randn(batch.mel.shape, generator=generator)
    t = torch.tensor([0.2, 0.9])
    per_sample, cosines = objective.eval().validate(batch, targets, mask, domains, t, noise)
    _, u = path(batch.mel, noise, t)
    expected = masked_mean(u.square().mean(-1, keepdim=True), batch.mask).squeeze(1)
    torch.testing.assert_close(per_sample, expected)
    assert set(cosines) == {f"cosine/spectral/{layer}" for layer in range(3)}


def test_dropped_tokens_get_no_gradient(setup):
    _, batch, _, objective = setup("flow.token_dropout=0.999999", "alignment.enabled=false")
    torch.nn.init.normal_(objective.backbone.network.output.weight)
    loss, _ = run(objective, batch, {}, batch.mask, {})
    loss.backward()
    table = objective.backbone.conditioner.tables["text"].weight
    assert table.grad.abs().max() == 0
    _, batch, _, objective = setup("flow.token_dropout=0.0", "alignment.enabled=false")
    torch.nn.init.normal_(objective.backbone.network.output.weight)
    loss, _ = run(objective, batch, {}, batch.mask, {})
    loss.backward()
    assert objective.backbone.conditioner.tables["text"].weight.grad.abs().max() > 0


def test_domain_tables(tiny_config):
    config = tiny_config("alignment.teachers={a: {domains: [speech]}, b: {}}")
    tables = domain_tables(config, ("audio", "speech"))
    assert tables["a"].tolist() == [False, True]
    assert tables["b"].tolist() == [True, True]


def cache(batch, teachers, pooled=False):
    """Write the features of the batch's whole clips beside their audio."""
    key = FeatureKey("spectral", rate=0.0 if pooled else 50.0)
    for clip in batch.clips:
        audio = read_audio(clip.path, 16000)
        features, _ = teachers["spectral"](audio[None], torch.tensor([len(audio)]), 16000)
        row = features[0].mean(0) if pooled else features[0]
        write_features(feature_path(clip.path, "spectral"), row, key)
    return beside_audio(batch)


def beside_audio(batch):
    """The features that lie beside the batch's audio, and the batch with them, as the loader makes it."""
    source = FilesBesideAudio("spectral", FeatureKey("spectral"), batch.clips[0].path)
    facts = zip(batch.clips, (batch.starts / 62.5).tolist(), (batch.audio_lengths / 16000).tolist())
    rows = [source.read(clip, None, start, seconds) for clip, start, seconds in facts]
    features = collate_features(rows, source, batch.audio.shape[1] / 16000)
    return {"spectral": source}, dataclasses.replace(batch, features={"spectral": features})


@pytest.mark.parametrize("pool", ["mean", "null"])
def test_cached_and_live_teachers_give_the_same_loss(setup, clips, pool):
    changes = (f"data.train=[{clips}]", "data.max_seconds=30", "data.frames_per_batch=4000", f"alignment.pool={pool}")
    config, batch, teachers, objective = setup(*changes)
    assert not batch.starts.any()
    live, cached = (teacher_targets(*pair, config) for pair in ((teachers, batch), cache(batch, teachers)))
    torch.testing.assert_close(cached[0]["spectral"], live[0]["spectral"], rtol=1e-4, atol=1e-4)
    assert torch.equal(cached[1], live[1])
    domains = {"spectral": torch.ones(batch.mel.shape[0], dtype=torch.bool)}
    losses = []
    for targets, mask in (live, cached):
        objective.generator.manual_seed(0)
        losses.append(run(objective, batch, targets, mask, domains, 1.0)[1]["align_loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_cached_frames_are_read_at_the_crop_s_times(setup, clips):
    """Features that count the teacher's frames: the targets say which times were read."""
    config, batch, _, _ = setup(f"data.train=[{clips}]", "data.max_seconds=0.5", "alignment.pool=null")
    key = FeatureKey("spectral", rate=50.0)
    for clip in batch.clips:
        write_features(feature_path(clip.path, "spectral"), torch.arange(400.0)[:, None].repeat(1, 60), key)
    assert batch.starts.any()
    cached, batch = beside_audio(batch)
    targets, mask = teacher_targets(cached, batch, config)
    frame = torch.arange(batch.mel.shape[1])
    expected = (batch.starts[:, None] + frame) / config.mel.frame_rate * 50 - 0.5
    inside = mask & (frame > 1) & (frame < batch.mask.sum(1, keepdim=True) - 2)
    assert inside.any(1).all()
    torch.testing.assert_close(targets["spectral"][..., 0][inside], expected[inside], rtol=0, atol=1e-3)
    config, *_ = setup(f"data.train=[{clips}]", "data.max_seconds=0.5")
    pooled = teacher_targets(cached, batch, config)[0]["spectral"][:, 0]
    middle = (batch.starts + batch.mask.sum(1) / 2) / config.mel.frame_rate * 50 - 0.5
    torch.testing.assert_close(pooled, middle, rtol=0, atol=1.0)


def test_a_trainer_takes_cached_features_and_refuses_others(setup, clips, tiny_config, tmp_path):
    changes = (f"data.train=[{clips}]", "alignment.teachers.spectral.cached=true", "train.steps=4", "train.samples=0")
    config, batch, teachers, _ = setup(*changes)
    data = load_data(config, tmp_path)
    with pytest.raises(UserError, match=r"no features in .*: run agrepa extract CONFIG --teacher spectral"):
        Trainer(config, tmp_path / "run")
    for part in (data.train, data.valid):
        [whole] = fixed_batches(part, range(len(part)), config, one_shape=True)
        cache(whole, teachers, pooled=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.teachers["spectral"].width == 60
    batch = next(trainer.feed.batches(0, print))
    targets, _ = teacher_targets(trainer.teachers, batch, config)
    assert targets["spectral"].shape == (batch.mel.shape[0], 60)
    with pytest.raises(UserError, match="cached features are pooled"):
        Trainer(tiny_config(*changes, "alignment.pool=null"), tmp_path / "run")
    with pytest.raises(UserError, match="made with layer '', this run has '3'"):
        Trainer(tiny_config(*changes, "alignment.teachers.spectral.options={layer: 3}"), tmp_path / "run")


def test_a_policy_decides_the_layers_after_the_probe(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    trainer = Trainer(tiny_config("alignment.policy=deepest"), tmp_path / "run")
    choose(trainer)
    assert trainer.selection == LayerSelection((1, 2), (0.5, 0.5), "deepest")
    assert trainer.objective.alignment.weights.tolist() == [[0, 0.5, 0.5]]


def test_given_layers_are_aligned_from_the_start(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    trainer = Trainer(tiny_config("alignment.layers=[2,0]", "alignment.policy=deepest"), tmp_path / "run")
    assert trainer.selection == LayerSelection((0, 2), (0.5, 0.5), "fixed")
    assert trainer.objective.alignment.weights.tolist() == [[0.5, 0, 0.5]]
    assert trainer.aligner.strength_at(0) > 0
    choose(trainer)  # writes the policy's choice, and leaves the one that was given
    assert trainer.selection == LayerSelection((0, 2), (0.5, 0.5), "fixed")
    assert LayerSelection.from_json(tmp_path / "run" / "selection.json").layers == (1, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["alignment.policy=fog"], "alignment.policy: expected one of fixed, .*, got 'fog'"),
        (["alignment.policy=fixed"], "alignment.policy: expected alignment.layers with it"),
        (["alignment.layers=[0,3]"], r"alignment.layers: expected distinct layers from 0 to 2, got \[0, 3\]"),
        (["alignment.layers=[1,1]"], r"alignment.layers: expected distinct layers .* got \[1, 1\]"),
        (["alignment.layers=[1]", "alignment.selection=a.json"], "alignment.layers, alignment.selection: .* one of"),
        (["alignment.stop_similarity=2"], r"alignment.stop_similarity: expected null or a cosine .* got 2.0"),
        (["alignment.objective=cosin"], "alignment.objective: expected one of cosine, relation, cka, got 'cosin'"),
        (["alignment.standardise_targets=true"], "alignment.standardise_targets: expected alignment.pool null"),
        (
            ["alignment.objective=cka", "alignment.timestep_weight=data"],
            "alignment.timestep_weight: expected uniform with pooled cka, .* got 'data'",
        ),
        (["alignment.timestep_weight=late"], "alignment.timestep_weight: expected one of uniform, .* got 'late'"),
    ],
)
def test_wrong_choices_are_named(tiny_config, changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(*changes)


@pytest.fixture
def warm(tiny_config, tmp_path):
    """A trainer whose network is no longer at its zero initialisation, with enough clips for a probe."""
    (tmp_path / "run").mkdir()
    changes = ("probe.samples=4", "data.valid_share=0.6", "model.dropout=0.0")
    trainer = Trainer(tiny_config(*changes), tmp_path / "run")
    torch.manual_seed(1)
    for name, parameter in trainer.objective.backbone.network.named_parameters():
        if name.startswith(("output.", "branches.", "modulation.")):
            torch.nn.init.normal_(parameter, std=0.2)
    return trainer


def values_of(trainer, policy):
    parts = (trainer.objective.backbone, trainer.teachers, trainer.data.valid, trainer.config, trainer.device)
    return layer_values(policy, *parts)[""]


def probe_batch(trainer):
    """The clips of the probe, and at every t of the grid what the network is given and what it should say."""
    config = trainer.config
    [batch] = fixed_batches(trainer.data.valid, spread(trainer.data.valid, 4), config, one_shape=True)
    noise = SIGMA * torch.randn(batch.mel.shape, generator=torch.Generator().manual_seed(config.train.seed))
    with torch.no_grad():
        cond, _ = trainer.objective.backbone.condition(batch)
    return batch, cond, [(t, *path(batch.mel, noise, torch.full((4,), t))) for t in config.probe.t_grid]


def test_what_a_layer_stores_decides_at_the_probe(warm):
    """LASP on the probe's clips by hand: one ridge head for all layers, on one clip of each domain."""
    batch, cond, times = probe_batch(warm)
    network = warm.objective.backbone.network.eval()
    states = []
    with torch.no_grad():
        for t, x_t, _ in times:
            _, hidden = network(x_t, torch.full((4,), t), cond, batch.mask, hidden_layers=range(3))
            rows = [[hidden[k][n, : int(batch.mask[n].sum())].mean(0).double() for n in range(4)] for k in range(3)]
            states.append(torch.stack([torch.stack(row) for row in rows]))
    x = torch.stack(states, dim=1)  # [3 layers, 2 times, 4 clips, width]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    z, _ = teacher_targets(warm.teachers, batch, warm.config)
    z = torch.nn.functional.normalize(z["spectral"].double(), dim=-1)
    by_domain = [[n for n in range(4) if batch.domain[n] == domain] for domain in (0, 1)]
    fit, out = [[pair[place] for pair in by_domain] for place in (0, 1)]
    inner, goal = x[:, :, fit].reshape(-1, 16), z[fit].repeat(6, 1)
    centred = inner - inner.mean(0)
    gram = centred.T @ centred
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(16).double()
    matrix = torch.linalg.inv(gram) @ centred.T @ (goal - goal.mean(0))
    predicted = (x[:, :, out] - inner.mean(0)) @ matrix + goal.mean(0)
    cosine = (predicted * z[out]).sum(-1) / predicted.norm(dim=-1) / z[out].norm(dim=-1)
    expected = cosine.mean((1, 2))
    warm.objective.train()
    values = values_of(warm, "stored")
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    assert all(module.training for module in warm.objective.backbone.modules())
    assert expected.std() > 1e-4  # the layers differ, or the order below means nothing


@pytest.mark.parametrize("policy", ["gradient-norm", "first-order"])
def test_how_the_loss_reacts_decides_at_the_probe(warm, policy):
    """The loss by hand, clip by clip; what leaves each block keeps its gradient."""
    batch, cond, times = probe_batch(warm)
    network = warm.objective.backbone.network.eval()
    expected = torch.zeros(3, dtype=torch.float64)
    for t, x_t, target in times:
        start, _ = network.open(x_t, torch.full((4,), t), cond)
        velocity, hidden = network(x_t, torch.full((4,), t), cond, batch.mask, hidden_layers=range(3))
        [h.retain_grad() for h in hidden.values()]
        lengths = batch.mask.sum(1).tolist()
        errors = [(velocity[n, :frames] - target[n, :frames]).square().mean() for n, frames in enumerate(lengths)]
        (sum(errors) / 4).backward()
        for layer, h in hidden.items():
            grad, step = h.grad.double(), (h - (hidden[layer - 1] if layer else start)).detach().double()
            expected[layer] += (grad.norm() if policy == "gradient-norm" else (grad * step).sum().abs()) / len(times)
    torch.testing.assert_close(values_of(warm, policy), expected, rtol=1e-4, atol=1e-7)
    assert expected.std() > 1e-4
    before = network.state_dict()
    warm.config = dataclasses.replace(warm.config, alignment=dataclasses.replace(warm.config.alignment, policy=policy))
    warm.aligner.choice = build_aligner(warm.config, network, {"spectral": 60}).choice
    choose(warm)
    assert warm.selection == LayerSelection.uniform(expected.topk(2).indices.tolist(), policy)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_lasp_says_when_a_teacher_has_too_few_clips(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    trainer = Trainer(tiny_config("alignment.teachers={spectral: {domains: [audio]}}"), tmp_path / "run")
    with pytest.raises(UserError, match=r"probe.samples: what a layer stores .* 'spectral' .* of 1 it cannot"):
        values_of(trainer, "stored")


def test_samples_are_weighed_by_their_time(setup):
    """ "data" weighs by 2 t: the loss with given t against the loss of each sample alone."""
    changes = ("flow.token_dropout=0.0", "flow.prompt_dropout=0.0", "model.dropout=0.0")
    t = torch.tensor([0.125, 0.75])
    plain = setup(*changes)[3]
    config, batch, teachers, objective = setup(*changes, "alignment.timestep_weight=data")
    draws = Draws(t, torch.zeros_like(batch.mel), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    targets, mask = teacher_targets(teachers, batch, config)
    both = torch.ones(2, dtype=torch.bool)
    loss, metrics = run(objective, batch, targets, mask, {"spectral": both}, 1.0, draws)
    plain.load_state_dict(objective.state_dict())
    alone = []
    for n in range(2):
        only = torch.arange(2) == n
        alone.append(run(plain, batch, targets, mask, {"spectral": only}, 1.0, draws)[1])
    expected = sum(2 * t[n] * alone[n]["align_loss"] for n in range(2)) / 2
    torch.testing.assert_close(metrics["align_loss"], expected)
    torch.testing.assert_close(loss.detach(), metrics["flow_loss"] + expected)
    raw = sum(record["cosine/spectral/1"] for record in alone) / 2  # without weights
    torch.testing.assert_close(metrics["cosine/spectral/1"], raw)


def test_alignment_stops_by_similarity(setup):
    """The step that reaches the threshold still counts in full; the next one has no alignment loss in it."""
    changes = ("flow.token_dropout=0.0", "flow.prompt_dropout=0.0", "model.dropout=0.0")
    config, batch, teachers, objective = setup(*changes, "alignment.stop_similarity=-1")
    targets, mask = teacher_targets(teachers, batch, config)
    domains = {"spectral": torch.ones(2, dtype=torch.bool)}
    nobody = {"spectral": torch.zeros(2, dtype=torch.bool)}
    none = run(objective, batch, targets, mask, nobody, 0.5)[1]
    objective.aligner.observe(none)  # no cosine: passed over
    first, before = run(objective, batch, targets, mask, domains, 0.5)
    objective.aligner.observe(before)
    after_loss, after = run(objective, batch, targets, mask, domains, 0.5)
    assert [m["align_factor"].item() for m in (none, before, after)] == [1, 1, 0]
    torch.testing.assert_close(first.detach(), before["flow_loss"] + 0.5 * before["align_loss"])
    assert after["align_loss"] > 0
    assert after_loss.item() == after["flow_loss"].item()
    first.backward()  # the factor has changed since
    grads = [parameter.grad.clone() for parameter in objective.alignment.parameters()]
    assert all(grad.any() for grad in grads)
    objective.zero_grad()
    after_loss.backward()
    assert not any(parameter.grad.any() for parameter in objective.alignment.parameters())


@pytest.mark.parametrize(("teacher", "weight"), [("speech", 0.5), ("sounds", 1.0)])
def test_the_weight_of_bitc_is_the_papers_by_name(tiny_config, teacher, weight):
    config = tiny_config("alignment.bitc=true", f"alignment.teachers={{{teacher}: {{}}}}")
    assert Objective(config, {teacher: 5}).interface.weights == {teacher: weight}
