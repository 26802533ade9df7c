"""A sample that is several rows of an input, as the codebooks of MusicGen: refused with what to do, exact when done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from agrepa_fast import attribute_layers

CODEBOOKS, SAMPLES, FRAMES = 4, 3, 6


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, text: Tensor) -> Tensor:
        output = self.model(input_ids=ids.flatten(0, 1), encoder_hidden_states=text)
        return output.logits.unflatten(0, (-1, CODEBOOKS))


@pytest.fixture(scope="module")
def musicgen() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 32}
    config = transformers.MusicgenDecoderConfig(vocab_size=20, num_codebooks=CODEBOOKS, **sizes)
    model = transformers.MusicgenForCausalLM(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 20, (SAMPLES, CODEBOOKS, FRAMES), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text() -> Tensor:
    return torch.randn(SAMPLES, 5, 16, generator=torch.Generator().manual_seed(0)).double()


class Rows(nn.Module):
    """Takes the codebooks as rows, as the model itself does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, text: Tensor) -> Tensor:
        return self.model(input_ids=ids, encoder_hidden_states=text).logits


@pytest.mark.parametrize("batched", [None, ["ids"], {"ids": True}])
def test_rows_of_one_sample_are_refused(musicgen, ids, text, batched):
    inputs = {"ids": ids.flatten(0, 1), "text": text}
    with pytest.raises(ValueError, match=r"is several rows of an input, wrap the model .* \[samples, rows, \.\.\.\]"):
        attribute_layers(Rows(musicgen), inputs, batched=batched)


@torch.no_grad()
def test_a_wrapper_that_takes_them_apart_is_exact(musicgen, ids, text):
    model = Wrapped(musicgen)
    scores = attribute_layers(model, {"ids": ids, "text": text})
    assert scores.engine == "prefix"
    base = model(ids, text)
    for name, row in zip(scores.names, scores.by_sample):
        block = model.get_submodule(name)
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
        changed = model(ids, text) - base
        del block.forward
        expected = (changed.flatten(1).square().mean(1) + 1e-8).sqrt() / (
            base.flatten(1).square().mean(1) + 1e-8
        ).sqrt()
        np.testing.assert_allclose(row.numpy(), expected.numpy(), rtol=1e-6)
    assert scores.names == tuple(f"model.model.decoder.layers.{i}" for i in range(3))
