"""The objective of a batch: which frames are aligned, what the metrics mean, condition dropout."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.models.flow import SIGMA, path
from agrepa_fast.ops import masked_mean
from agrepa_fast.teachers.registry import build_teacher
from agrepa_fast.training.clips import fixed_batches, hold_out, load_data, spread
from agrepa_fast.training.objective import Objective, domain_tables, teacher_targets


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
