"""Finding teachers by name, and what every teacher promises whatever its subclass does."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.teachers import Teacher, base, build_teacher, registry


class Frames(Teacher):
    """10 Hz means of 100 ms of an 8 kHz signal, through a trainable layer with dropout."""

    def __init__(self, width=3):
        super().__init__("frames", width=width, rate=10.0, sample_rate=8_000)
        self.linear = torch.nn.Linear(1, width)
        self.dropout = torch.nn.Dropout(0.5)

    def encode(self, audio, lengths):
        self.heard = (audio.clone(), lengths.clone())
        frames = audio.shape[1] // 800
        means = audio[:, : frames * 800].unflatten(1, (frames, 800)).mean(-1, keepdim=True)
        mask = torch.arange(frames) < (lengths // 800).unsqueeze(1)
        return self.dropout(self.linear(means)), mask


def test_a_registered_teacher_is_built_with_its_options_and_frozen():
    registry.register_teacher("frames", Frames)
    teacher = build_teacher("frames", width=5)
    assert teacher.width == 5
    assert [parameter.requires_grad for parameter in teacher.parameters()] == [False, False]
    assert not teacher.dropout.training
    with pytest.raises(UserError, match=r"teacher 'frames': got an unexpected keyword argument 'widht'"):
        build_teacher("frames", widht=5)
    with pytest.raises(ValueError, match="'frames' is registered already"):
        registry.register_teacher("frames", Frames)
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match="one word without slashes"):
            registry.register_teacher(name, Frames)


@pytest.mark.parametrize(
    "name, message",
    [
        ("spectrl", r"unknown teacher 'spectrl': did you mean 'spectral'\?"),
        (
            "zzz",
            r"unknown teacher 'zzz': registered are spectral; .* its folder or its hub name \(owner/name\)",
        ),
        ("./whisper", r"'\./whisper': no such folder; .*config\.json"),
        ("/nowhere/models/whisper", r"no such folder"),
        ("a/b/c", r"no such folder"),
    ],
)
def test_an_unknown_name_says_what_to_do(name, message):
    with pytest.raises(UserError, match=message) as caught:
        build_teacher(name)
    assert "\n" not in str(caught.value)


def test_training_mode_is_refused_silently():
    teacher = Frames().freeze()
    parent = torch.nn.Sequential(torch.nn.Dropout(0.5), teacher)
    assert parent.train() is parent
    assert parent[0].training
    assert not teacher.training
    assert not teacher.dropout.training
    assert teacher.train(True) is teacher


def test_forward_stays_deterministic_and_without_gradient_even_when_not_frozen():
    teacher = Frames()  # built by hand: the parameters still take gradients, the dropout is in training mode
    assert teacher.dropout.training
    audio = torch.randn(2, 8_000, requires_grad=True)
    lengths = torch.tensor([8_000, 8_000])
    first, _ = teacher(audio, lengths, 8_000)
    second, _ = teacher(audio, lengths, 8_000)
    assert torch.equal(first, second)
    assert not first.requires_grad
    means = audio.detach().view(2, 10, 800).mean(-1, keepdim=True)
    torch.testing.assert_close(first, means * teacher.linear.weight.data[:, 0] + teacher.linear.bias.data)


def test_autocast_does_not_reach_the_teacher():
    teacher = Frames().freeze()
    audio, lengths = torch.randn(1, 8_000), torch.tensor([8_000])
    expected, _ = teacher(audio, lengths, 8_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = teacher(audio, lengths, 8_000)
    assert torch.equal(features, expected)


def test_invalid_frames_are_zero_and_padding_is_not_heard():
    teacher = Frames().freeze()
    audio = torch.full((2, 8_000), float("nan"))
    audio[:, :1_700] = 0.5
    features, mask = teacher(audio, torch.tensor([1_700, 800]), 8_000)
    assert mask.sum(1).tolist() == [2, 1]
    heard, _ = teacher.heard
    assert (heard[0, :1_700] == 0.5).all()
    assert (heard[0, 1_700:] == 0).all()
    assert (features[~mask] == 0).all()
    constant = 0.5 * teacher.linear.weight[:, 0] + teacher.linear.bias
    torch.testing.assert_close(features[0, :2], constant.expand(2, 3))


def test_resampling_of_a_padded_batch_equals_each_clip_alone():
    teacher = Frames().freeze()
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(2, 44_100, generator=generator)
    lengths = torch.tensor([44_100, 20_001])
    teacher(audio, lengths, 44_100)
    together, resampled = teacher.heard
    assert resampled.tolist() == [8_000, -(-20_001 * 8_000 // 44_100)]
    teacher(audio[1:, :20_001], lengths[1:], 44_100)
    alone, _ = teacher.heard
    torch.testing.assert_close(together[1:, : alone.shape[1]], alone, atol=1e-6, rtol=0)
    assert (together[1, alone.shape[1] :] == 0).all()


def test_resampling_keeps_a_tone():
    audio = torch.sin(2 * torch.pi * 1_000 * torch.arange(24_000) / 24_000)[None]
    resampled, lengths = base.resample_audio(audio, torch.tensor([24_000]), 24_000, 16_000)
    assert lengths.tolist() == [16_000]
    expected = torch.sin(2 * torch.pi * 1_000 * torch.arange(16_000) / 16_000)
    torch.testing.assert_close(resampled[0, 100:-100], expected[100:-100], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "audio, lengths, message",
    [
        (torch.zeros(8_000), torch.tensor([8_000]), r"audio must be \[B, n\] floating point, got \[8000\]"),
        (torch.zeros(1, 8_000, dtype=torch.int16), torch.tensor([8_000]), r"torch\.int16"),
        (torch.zeros(2, 8_000), torch.tensor([8_000]), r"lengths must be \[2\] integers, got \[1\]"),
        (
            torch.zeros(1, 8_000),
            torch.tensor([1.0]),
            r"lengths must be \[1\] integers, got \[1\] torch\.float32",
        ),
        (torch.zeros(1, 8_000), torch.tensor([8_001]), r"lengths must lie in 0\.\.8000, got \[8001\]"),
        (torch.zeros(1, 8_000), torch.tensor([-1]), r"lengths must lie in 0\.\.8000"),
    ],
)
def test_wrong_inputs_are_named(audio, lengths, message):
    with pytest.raises(ValueError, match=message):
        Frames()(audio, lengths, 8_000)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchaudio.functional", None)
    with pytest.raises(UserError, match=r"pip install 'agrepa-fast\[audio\]'"):
        build_teacher("spectral")
    with pytest.raises(UserError, match="torchaudio is not installed"):
        Frames()(torch.zeros(1, 16_000), torch.tensor([16_000]), 16_000)
