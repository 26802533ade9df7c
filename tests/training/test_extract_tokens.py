"""`agrepa extract` of tokens, and a run that trains on them."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import cli
from agrepa_fast.data.audio import read_audio
from agrepa_fast.errors import UserError
from agrepa_fast.teachers import beats
from agrepa_fast.teachers.tokenizers import build_tokenizer
from agrepa_fast.training.clips import load_data
from agrepa_fast.training.extract import Extraction


@pytest.fixture
def tokenizer(tmp_path):
    """A BEATs tokenizer of random weights; returns its file."""
    small = {"encoder_layers": 1, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16, "encoder_attention_heads": 2}
    small |= {"embed_dim": 8, "conv_pos": 4, "conv_pos_groups": 2}
    torch.manual_seed(0)
    weights = dict(beats.Beats(beats.FIELDS | small).state_dict())
    for number, shape in ((0, (16, 16)), (2, (4, 16))):
        weights |= {f"quantize_layer.{number}.weight": torch.randn(shape)}
        weights |= {f"quantize_layer.{number}.bias": torch.randn(shape[0])}
    weights["quantize.embedding.weight"] = torch.nn.functional.normalize(torch.randn(40, 4), dim=-1)
    torch.save({"cfg": small, "model": weights}, tmp_path / "tokenizer.pt")
    return tmp_path / "tokenizer.pt"


def test_extracted_tokens_are_the_run_s_tokens(tiny, tiny_config, tmp_path, tokenizer, capsys):
    changes = (
        f"data.tokens={{audio: 'beats:{tokenizer}'}}",
        "data.vocabularies={text: [256], beats: [40]}",
        "data.vocabulary_of={audio: beats}",
    )
    with pytest.raises(
        UserError, match=r"data.tokens.audio: no tokens in .*: run agrepa extract CONFIG --tokens beats"
    ):
        load_data(tiny_config(*changes), tmp_path)
    assert cli.main(["extract", "demo", *tiny(*changes), "--tokens", "beats"]) == 0
    assert "6 clips" in capsys.readouterr().out
    data = load_data(tiny_config(*changes), tmp_path)
    teacher = build_tokenizer(f"beats:{tokenizer}")
    for dataset in (data.train, data.valid):
        for index, clip in enumerate(dataset.clips):
            tokens = dataset.item(index, torch.Generator())["tokens"][:, 0]
            if clip.domain == "speech":
                assert bytes(tokens.tolist()).decode() in clip.text
                continue
            audio = read_audio(clip.path, 16000)
            wanted, mask = teacher(audio[None], torch.tensor([len(audio)]), 16000)
            whole = wanted[0, mask[0], 0].long().tolist()
            assert len(tokens) > 8
            assert any(whole[i : i + len(tokens)] == tokens.tolist() for i in range(len(whole)))
    # The file that made them has changed.
    tokenizer.write_bytes(tokenizer.read_bytes() + b"0")
    with pytest.raises(UserError, match=r"data.tokens.audio: .* was made with other weights than"):
        load_data(tiny_config(*changes), tmp_path)


def test_tokens_beyond_the_vocabulary_are_named(tiny_config, tmp_path, tokenizer):
    changes = (f"data.tokens={{audio: 'beats:{tokenizer}'}}", "data.vocabularies={text: [256], beats: [2]}")
    config = tiny_config(*changes, "data.vocabulary_of={audio: beats}")
    Extraction(config, [], ["beats"]).run()
    with pytest.raises(UserError, match=r"token \d+ in stream 0 is outside 0 to 1"):
        load_data(config, tmp_path)
