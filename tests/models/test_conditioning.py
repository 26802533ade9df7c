"""The token condition against a naive embed, concatenate, project, interpolate, sample by sample.

tokens [B, S, K], token_lengths and vocabulary [B], mask [B, T] -> [B, T, C].
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from agrepa_fast.models.conditioning import TokenConditioner, assemble_condition, interpolate_time

VOCABULARIES = {"text": 7, "s3": 11, "as": 5}
WIDTH, FRAMES = 6, 13


def make_conditioner(secondary=0, dtype=torch.float64):
    torch.manual_seed(0)
    return TokenConditioner(VOCABULARIES, WIDTH, secondary).to(dtype)


def make_batch(secondary=0):
    """Four samples: three vocabularies, one of them twice, once without tokens."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = torch.tensor([1, 0, 2, 1])
    sizes = [list(VOCABULARIES.values())[v] for v in vocabulary]
    tokens = torch.stack([torch.randint(size, (9, 1), generator=generator) for size in sizes])
    if secondary:
        tokens = torch.cat([tokens, torch.randint(secondary, (4, 9, 1), generator=generator)], dim=2)
    lengths, frames = torch.tensor([9, 4, 1, 0]), torch.tensor([13, 10, 3, 8])
    return tokens, lengths, vocabulary, torch.arange(FRAMES) < frames.unsqueeze(1)


def naive(conditioner, tokens, lengths, vocabulary, mask):
    """One sample at a time: look up each stream, concatenate, project, stretch, normalise."""
    out = torch.zeros(*mask.shape, WIDTH, dtype=torch.float64)
    for b, name in enumerate(list(VOCABULARIES)[v] for v in vocabulary):
        count, frames = int(lengths[b]), int(mask[b].sum())
        if count == 0:
            continue
        parts = [conditioner.tables[name].weight[tokens[b, :count, 0]]]
        if conditioner.secondary is not None:
            parts.append(conditioner.secondary.weight[tokens[b, :count, 1]])
        embedded = torch.cat(parts, dim=-1) @ conditioner.projections[name].weight.T
        stretched = F.interpolate(embedded.T.unsqueeze(0), size=frames, mode="linear", align_corners=False)[0].T
        out[b, :frames] = stretched / stretched.pow(2).sum(-1, keepdim=True).sqrt()
    return out


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_interpolation_is_that_of_torch_sample_by_sample(dtype, atol):
    """Stretched and squeezed, down to one token and one frame. Positions are float32 in both dtypes."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 7, 30, 50, 50, 50, 3])
    frames = torch.tensor([1, 9, 7, 94, 94, 25, 1, 2])
    x = torch.randn(8, 50, 3, generator=generator, dtype=torch.float64).to(dtype)
    got = interpolate_time(x, lengths, frames, 94)
    assert got.dtype == dtype
    for b in range(8):
        mine = x[b : b + 1, : lengths[b]].transpose(1, 2)
        expected = F.interpolate(mine, size=int(frames[b]), mode="linear", align_corners=False)[0].T
        torch.testing.assert_close(got[b, : frames[b]], expected, rtol=0, atol=atol * 10)
        corners = F.interpolate(mine, size=int(frames[b]), mode="linear", align_corners=True)[0].T
        if lengths[b] != frames[b] and lengths[b] > 1:
            assert (got[b, : frames[b]] - corners).abs().max() > 1e-2


def test_interpolation_of_a_ramp():
    """Three tokens over six frames: frame j is centred on token (j + 1/2) / 2 - 1/2, held at the ends."""
    ramp = torch.tensor([0.0, 1.0, 2.0, 99.0]).reshape(1, 4, 1)
    got = interpolate_time(ramp, torch.tensor([3]), torch.tensor([6]), 6).flatten()
    torch.testing.assert_close(got, torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("secondary", [0, 8])
def test_equals_the_naive_computation(secondary):
    conditioner = make_conditioner(secondary)
    assert conditioner.topology == ("dual" if secondary else "single")
    batch = make_batch(secondary)
    got, expected = conditioner(*batch), naive(conditioner, *batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got[3] == 0).all()  # no tokens: the null embedding
    valid = batch[3] & (batch[1] > 0).unsqueeze(1)
    torch.testing.assert_close(got[valid].norm(dim=-1), torch.ones(int(valid.sum()), dtype=torch.float64))
    assert (got[~valid] == 0).all()


@pytest.mark.parametrize("secondary", [0, 8])
def test_gradients_equal_the_naive_ones_and_reach_every_table(secondary):
    conditioner = make_conditioner(secondary)
    batch = make_batch(secondary)
    upstream = torch.randn(4, FRAMES, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = []
    for compute in (conditioner, lambda *arguments: naive(conditioner, *arguments)):
        conditioner.zero_grad()
        (compute(*batch) * upstream).sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in conditioner.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 1e-3, name
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-5)
    used = set(batch[0][0, :9, 0].tolist())  # the one sample of "s3" that has tokens
    for token in range(VOCABULARIES["s3"]):
        assert (grads[0]["tables.s3.weight"][token] != 0).any() == (token in used)


@pytest.mark.parametrize("secondary", [0, 8])
def test_padding_of_tokens_and_frames_changes_nothing(secondary):
    conditioner = make_conditioner(secondary, torch.float32)
    tokens, lengths, vocabulary, mask = make_batch(secondary)
    expected = conditioner(tokens, lengths, vocabulary, mask)
    padded = F.pad(tokens, (0, 0, 0, 5), value=3)
    for b, n in enumerate(lengths):
        padded[b, n:] = 4
    got = conditioner(padded, lengths, vocabulary, F.pad(mask, (0, 6)))
    torch.testing.assert_close(got[:, :FRAMES], expected, rtol=0, atol=1e-6)
    assert (got[:, FRAMES:] == 0).all()


def test_half_precision_has_no_nan_at_a_zero_embedding():
    """F.normalize's eps of 1e-12 is 0 in float16."""
    conditioner = make_conditioner(dtype=torch.float32).half()
    torch.nn.init.zeros_(conditioner.tables["text"].weight)
    tokens, lengths, vocabulary, mask = make_batch()
    got = conditioner(tokens, lengths, vocabulary, mask)
    got.float().square().sum().backward()
    assert got.dtype == torch.float16
    assert (got[1] == 0).all()
    assert got.isfinite().all()
    assert conditioner.tables["s3"].weight.grad.isfinite().all()
    torch.testing.assert_close(got[0].float().norm(dim=-1), torch.ones(FRAMES), rtol=0, atol=2e-3)


def test_assembled_condition():
    """Tokens beside the reference mel; dropping tokens keeps the reference (guidance's null branch)."""
    generator = torch.Generator().manual_seed(0)
    embedding, mel = torch.randn(4, 5, 3, generator=generator), torch.randn(4, 5, 2, generator=generator)
    mel[0, 3:] = float("nan")  # never shown, so never read
    prompt = torch.arange(5) < torch.tensor([[2], [5], [1], [3]])
    keep_tokens, keep_prompt = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    for tokens, reference in ((None, None), (keep_tokens, None), (None, keep_prompt), (keep_tokens, keep_prompt)):
        got = assemble_condition(embedding, mel, prompt, tokens, reference)
        expected = torch.zeros(4, 5, 5)
        for b in range(4):
            for frame in range(5):
                if tokens is None or tokens[b]:
                    expected[b, frame, :3] = embedding[b, frame]
                if prompt[b, frame] and (reference is None or reference[b]):
                    expected[b, frame, 3:] = mel[b, frame]
        assert torch.equal(got, expected)


def test_a_bfloat16_embedding_sets_the_dtype():
    embedding = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    got = assemble_condition(embedding, torch.full((1, 2, 2), 1 / 3), torch.ones(1, 2, dtype=torch.bool))
    assert got.dtype == torch.bfloat16
    assert got[0, 0, 4].item() == torch.tensor(1 / 3).bfloat16().item()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"vocabularies: expected at least one non-empty one, got {}"):
        TokenConditioner({}, 4)
    with pytest.raises(ValueError, match=r"vocabularies: expected at least one non-empty one, got {'s3': 0}"):
        TokenConditioner({"s3": 0}, 4)
    tokens, lengths, vocabulary, mask = make_batch()
    with pytest.raises(ValueError, match=r"tokens: expected .*\[batch, tokens, 2\] \(dual\), got \[4, 9, 1\]"):
        make_conditioner(secondary=8)(tokens, lengths, vocabulary, mask)
    with pytest.raises(ValueError, match=r"tokens: expected .*\[batch, tokens, 1\] \(single\), got \[4, 9\]"):
        make_conditioner()(tokens[..., 0], lengths, vocabulary, mask)
    with pytest.raises(ValueError, match=r"tokens: expected non-empty .* got \[4, 0, 1\]"):
        make_conditioner()(tokens[:, :0], lengths, vocabulary, mask)
