"""The objective of a batch: which frames are aligned, what the metrics mean, condition dropout."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import LayerSelection
from agrepa_fast.data.audio import read_audio
from agrepa_fast.errors import UserError
from agrepa_fast.models.flow import SIGMA, path
from agrepa_fast.ops import masked_mean
from agrepa_fast.teachers.cache import CachedTeacher, FeatureKey, feature_path, write_features
from agrepa_fast.teachers.registry import build_teacher
from agrepa_fast.training.clips import fixed_batches, hold_out, load_data, spread
from agrepa_fast.training.objective import Objective, domain_tables, teacher_targets
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
    loss, metrics = objective(batch, targets, mask, domains, 0.25)
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
    loss, _ = objective(batch, {}, batch.mask, {}, 0.0)
    loss.backward()
    table = objective.backbone.conditioner.tables["text"].weight
    assert table.grad.abs().max() == 0
    _, batch, _, objective = setup("flow.token_dropout=0.0", "alignment.enabled=false")
    torch.nn.init.normal_(objective.backbone.network.output.weight)
    loss, _ = objective(batch, {}, batch.mask, {}, 0.0)
    loss.backward()
    assert objective.backbone.conditioner.tables["text"].weight.grad.abs().max() > 0


def test_domain_tables(tiny_config):
    config = tiny_config("alignment.teachers={a: {domains: [speech]}, b: {}}")
    tables = domain_tables(config, ("audio", "speech"))
    assert tables["a"].tolist() == [False, True]
    assert tables["b"].tolist() == [True, True]


def test_hold_out_takes_a_share_of_each_domain_and_is_repeatable(tiny_config, tmp_path):
    from agrepa_fast.data.manifest import read_manifest

    clips = read_manifest(tiny_config().data.train[0])
    rest, held = hold_out(clips, 0.34, seed=1)
    assert sorted(map(str, [*rest, *held])) == sorted(map(str, clips))
    assert [sum(clip.domain == d for clip in held) for d in ("audio", "speech")] == [2, 2]
    assert hold_out(clips, 0.34, seed=1) == (rest, held)
    assert hold_out(clips, 0.34, seed=2) != (rest, held)


def cache(batch, teachers, pooled=False):
    """Write the features of the batch's whole clips beside their audio."""
    key = FeatureKey("spectral", rate=0.0 if pooled else 50.0)
    for clip in batch.clips:
        audio = read_audio(clip.path, 16000)
        features, _ = teachers["spectral"](audio[None], torch.tensor([len(audio)]), 16000)
        row = features[0].mean(0) if pooled else features[0]
        write_features(feature_path(clip.path, "spectral"), row, key)
    return {"spectral": CachedTeacher("spectral", FeatureKey("spectral"), batch.clips[0].path)}


@pytest.mark.parametrize("pool", ["mean", "null"])
def test_cached_and_live_teachers_give_the_same_loss(setup, clips, pool):
    changes = (f"data.train=[{clips}]", "data.max_seconds=30", "data.frames_per_batch=4000", f"alignment.pool={pool}")
    config, batch, teachers, objective = setup(*changes)
    assert not batch.starts.any()
    live, cached = (teacher_targets(t, batch, config) for t in (teachers, cache(batch, teachers)))
    torch.testing.assert_close(cached[0]["spectral"], live[0]["spectral"], rtol=1e-4, atol=1e-4)
    assert torch.equal(cached[1], live[1])
    domains = {"spectral": torch.ones(batch.mel.shape[0], dtype=torch.bool)}
    losses = []
    for targets, mask in (live, cached):
        torch.manual_seed(0)
        losses.append(objective(batch, targets, mask, domains, 1.0)[1]["align_loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_cached_frames_are_read_at_the_crop_s_times(setup, clips):
    """Features that count the teacher's frames: the targets say which times were read."""
    config, batch, _, _ = setup(f"data.train=[{clips}]", "data.max_seconds=0.5", "alignment.pool=null")
    key = FeatureKey("spectral", rate=50.0)
    for clip in batch.clips:
        write_features(feature_path(clip.path, "spectral"), torch.arange(400.0)[:, None].repeat(1, 60), key)
    assert batch.starts.any()
    cached = {"spectral": CachedTeacher("spectral", FeatureKey("spectral"), batch.clips[0].path)}
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
    with pytest.raises(UserError, match="no cached features here"):
        Trainer(config, tmp_path / "run")
    for part in (data.train, data.valid):
        [whole] = fixed_batches(part, range(len(part)), config, one_shape=True)
        cache(whole, teachers, pooled=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.teachers["spectral"].width == 60
    targets, _ = teacher_targets(trainer.teachers, batch, config)
    assert targets["spectral"].shape == (batch.mel.shape[0], 60)
    with pytest.raises(UserError, match="cached features are pooled"):
        Trainer(tiny_config(*changes, "alignment.pool=null"), tmp_path / "run")
    with pytest.raises(UserError, match="made with layer '', this run has '3'"):
        Trainer(tiny_config(*changes, "alignment.teachers.spectral.options={layer: 3}"), tmp_path / "run")


def test_a_policy_decides_the_layers_after_the_probe(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    trainer = Trainer(tiny_config("alignment.policy=deepest"), tmp_path / "run")
    trainer._probe()
    assert trainer.selection == LayerSelection((1, 2), (0.5, 0.5), "deepest")
    assert trainer.objective.alignment.weights.tolist() == [0, 0.5, 0.5]
    with pytest.raises(UserError, match=r"alignment.policy: expected even, .* got 'stored'"):
        Trainer(tiny_config("alignment.policy=stored"), tmp_path / "run")
