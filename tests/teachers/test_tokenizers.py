"""S3 tokens by the package's own model, with random weights."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.teachers.tokenizers import build_tokenizer

s3tokenizer = pytest.importorskip("s3tokenizer")


@pytest.fixture
def model(monkeypatch):
    from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2

    torch.manual_seed(0)
    small = S3TokenizerV2("v2", ModelConfig(n_audio_state=64, n_audio_head=1, n_audio_layer=1))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    monkeypatch.setattr(s3tokenizer, "load_model", lambda path: small)
    return small


def test_tokens_of_a_clip_are_the_package_s_alone_and_padded(model, tmp_path):
    path = tmp_path / "speech_tokenizer_v2.onnx"
    path.write_bytes(b"")
    teacher = build_tokenizer(f"s3:{path}")
    lengths = torch.tensor([16_000, 9_000])
    audio = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    tokens, mask = teacher(audio, lengths, 16_000)
    assert teacher.rate == 25
    assert mask.sum(1).tolist() == [25, 14]
    for row, length in enumerate(lengths.tolist()):
        mels, counts = s3tokenizer.padding([s3tokenizer.log_mel_spectrogram(audio[row, :length])])
        alone, _ = model.quantize(mels, counts)
        assert tokens[row, mask[row], 0].tolist() == alone[0].tolist()
    assert len(set(tokens[0, :, 0].tolist())) > 3


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path):
    path = tmp_path / "speech_tokenizer_v2.onnx"
    path.write_bytes(b"not onnx")
    with pytest.raises(UserError, match="not an S3 tokenizer") as error:
        build_tokenizer(f"s3:{path}")
    assert "\n" not in str(error.value)
