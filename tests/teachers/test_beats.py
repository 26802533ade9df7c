"""BEATs: equal to the class of speechbrain on random weights, alone and padded; its tokens; what is refused."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.teachers.beats import BeatsTeacher, BeatsTokens
from agrepa_fast.teachers.passes import encode_clips, encode_together
from agrepa_fast.teachers.registry import build_teacher, build_teachers

# The fields of the published BEATs_iter3 checkpoints, small.
SMALL = {
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "embed_dim": 24,
    "input_patch_size": 16,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "num_buckets": 32,
    "max_distance": 80,
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "conv_bias": False,
    "dropout": 0.0,
    "finetuned_model": False,
}
VARIANTS = [
    {},
    {"layer_norm_first": True, "deep_norm": False},
    {"gru_rel_pos": False},
    {"relative_position_embedding": False},
]


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def theirs():
    """The class of speechbrain, built from a configuration."""
    lobes = pytest.importorskip("speechbrain.lobes.models.beats")
    # Its lazy modules import what is not installed when anybody looks through sys.modules, as torch and inspect do.
    for name, module in list(sys.modules.items()):
        if name.startswith("speechbrain") and type(module).__name__ in ("LazyModule", "DeprecatedModuleRedirect"):
            del sys.modules[name]

    def build(**changes):
        torch.manual_seed(0)
        config = lobes.BEATsConfig(SMALL | changes)
        plain = lobes.BEATsConfig.__init__

        class Configured(lobes.BEATs):
            pass

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lobes.BEATsConfig, "__init__", lambda self, cfg=None: plain(self, SMALL | changes))
            model = Configured(output_all_hiddens=True)
        assert model.cfg.__dict__ == config.__dict__
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return build


@pytest.fixture
def checkpoint(theirs, tmp_path):
    def write(extra=None, old_names=False, **changes):
        model = theirs(**changes)
        weights = model.state_dict()
        if old_names:
            # As torch 1 named the two halves of a normalised weight: so are the published files.
            names = {"original0": "weight_g", "original1": "weight_v"}
            weights = {
                k.replace("parametrizations.weight.original0", names["original0"]).replace(
                    "parametrizations.weight.original1", names["original1"]
                ): v
                for k, v in weights.items()
            }
        path = tmp_path / "beats.pt"
        torch.save({"cfg": SMALL | changes, "model": weights | (extra or {})}, path)
        return model, path

    return write


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_equal_to_the_class_on_random_weights(checkpoint, changes):
    model, path = checkpoint(**changes)
    audio = noise(1, 16_000)
    with torch.no_grad():
        [states] = model.extract_features(audio, torch.ones(1))
    for layer in (0, 1, 2):
        features, mask = BeatsTeacher(str(path), layer=layer)(audio, torch.tensor([16_000]), 16_000)
        assert mask.all()
        assert features.shape == (1, 6, 32)
        # The class keeps [T, B, C], patches of a time after each other.
        wanted = states[layer].transpose(0, 1).unflatten(1, (-1, 8)).mean(2)
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)


def test_published_names_of_weights_and_a_classifier_load(checkpoint):
    model, path = checkpoint(extra={"predictor.weight": noise(527, 32), "predictor.bias": noise(527)}, old_names=True)
    teacher = build_teacher(path)
    assert isinstance(teacher, BeatsTeacher)
    with torch.no_grad():
        [states] = model.extract_features(noise(1, 16_000), torch.ones(1))
    features, _ = teacher(noise(1, 16_000), torch.tensor([16_000]), 16_000)
    torch.testing.assert_close(features, states[-1].transpose(0, 1).unflatten(1, (-1, 8)).mean(2), rtol=1e-4, atol=1e-5)


def test_a_clip_alone_and_padded_give_the_same_frames(checkpoint):
    _, path = checkpoint()
    teacher = BeatsTeacher(str(path))
    lengths = torch.tensor([16_000, 9_000, 2_799, 2_800, 0])
    audio = noise(5, 16_000) * (torch.arange(16_000) < lengths[:, None])
    features, mask = teacher(audio, lengths, 16_000)
    # Whole filter-bank windows of 400 samples every 160, whole patches of 16 of them.
    assert mask.sum(1).tolist() == [6, 3, 0, 1, 0]
    assert features.isfinite().all()
    for row, length in enumerate(lengths.tolist()):
        if mask[row].any():
            alone, heard = teacher(audio[row : row + 1, :length], lengths[row : row + 1], 16_000)
            torch.testing.assert_close(features[row, mask[row]], alone[0, heard[0]], rtol=1e-4, atol=1e-5)


def test_layers_share_one_pass(checkpoint, monkeypatch):
    _, path = checkpoint()
    wanted = {f"layer{layer}": (str(path), {"layer": layer}) for layer in (0, 2)} | {"last": (str(path), {})}
    teachers = build_teachers(wanted)
    calls = []
    forward = type(teachers["last"].model).forward
    monkeypatch.setattr(type(teachers["last"].model), "forward", lambda *a: calls.append(1) or forward(*a))
    audio, lengths = noise(2, 16_000), torch.tensor([16_000, 12_000])
    together = encode_together(teachers, audio, lengths, 16_000)
    assert len(calls) == 1
    for name, (source, options) in wanted.items():
        alone = build_teacher(source, **options)(audio, lengths, 16_000)
        assert torch.equal(together[name][0], alone[0])
        assert torch.equal(together[name][1], alone[1])
    with pytest.raises(UserError, match="layer 3 does not exist; hidden states are numbered 0 to 2"):
        build_teachers({"a": (str(path), {}), "b": (str(path), {"layer": 3})})


def test_a_long_recording_is_encoded_in_pieces(checkpoint):
    _, path = checkpoint()
    teacher = BeatsTeacher(str(path))
    teacher.longest = 2.0
    long, short = noise(5 * 16_000), noise(8_000, seed=1)
    rows = encode_clips({"x": teacher}, [long, short], 16_000, torch.device("cpu"))["x"]
    # 498 windows are 31 patches; a piece is 12 frames of 0.16 s with 11 of them kept.
    assert [len(row) for row in rows] == [31, 3]
    piece, _ = teacher(long[None, 11 * 2560 : 23 * 2560], torch.tensor([12 * 2560]), 16_000)
    torch.testing.assert_close(rows[0][11:22], piece[0, :11], rtol=1e-4, atol=1e-5)


def test_tokens_are_the_nearest_codes(checkpoint):
    model, _ = checkpoint()
    with torch.no_grad():
        [states] = model.extract_features(noise(1, 16_000), torch.ones(1))
    first, second = noise(32, 32, seed=1), noise(6, 32, seed=2)
    hidden = (states[-1][:, 0] @ first.T).tanh()
    extra = {
        "quantize.embedding.weight": torch.nn.functional.normalize(noise(500, 6), dim=-1),
        "quantize_layer.0.weight": first,
        "quantize_layer.0.bias": torch.zeros(32),
        "quantize_layer.2.weight": second,
        "quantize_layer.2.bias": -(hidden @ second.T).mean(0),  # around 0, so that the patches get different codes
    }
    model, path = checkpoint(extra=extra)
    tokens, mask = BeatsTokens(str(path)).freeze()(noise(1, 16_000), torch.tensor([16_000]), 16_000)
    points = hidden @ second.T + extra["quantize_layer.2.bias"]
    nearest = (points @ extra["quantize.embedding.weight"].T).argmax(-1)
    assert tokens[0, :, 0].tolist() == nearest.tolist()
    assert len(set(nearest.tolist())) > 2
    assert mask.sum() == 48
    teacher = BeatsTokens(str(path))
    teacher.longest = 2.0
    long = encode_clips({"x": teacher}, [noise(5 * 16_000)], 16_000, torch.device("cpu"))["x"][0]
    assert len(long) == 31 * 8


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"not one", "not a BEATs checkpoint"),
        ({"model": {}}, "not a BEATs checkpoint with cfg and model"),
        ({"cfg": {}, "model": {}}, "the file lacks"),
        ({"cfg": {"input_patch_size": 8}, "model": {}}, "cfg.input_patch_size 8 is not supported, only 16"),
        ({"cfg": {"activation_fn": "relu"}, "model": {}}, "cfg.activation_fn 'relu' is not supported"),
        ({"cfg": {"encoder_layers": "2"}, "model": {}}, "cfg.encoder_layers is '2', expected a value like 12"),
        ({"cfg": SMALL, "model": {"layer_norm.weight": torch.ones(3)}}, "the weights do not fit cfg"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        build_teacher(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickled_object_is_not_run(tmp_path):
    @dataclasses.dataclass
    class Config:
        layers: int = 2

    Config.__qualname__ = "Config"
    globals()["Config"] = Config
    path = tmp_path / "x.pt"
    torch.save({"cfg": Config(), "model": {}}, path)
    with pytest.raises(UserError, match="not a BEATs checkpoint"):
        build_teacher(path)


def test_tokens_need_codes(checkpoint):
    _, path = checkpoint()
    with pytest.raises(UserError, match="a BEATs model without codes"):
        BeatsTokens(str(path))
