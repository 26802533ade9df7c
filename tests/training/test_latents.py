"""Latents of a codec in place of mels: whole runs, normalisation, crops, and every bad file in one line."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from agrepa_fast import cli
from agrepa_fast.attribution.files import read_scores
from agrepa_fast.data.features import FeatureBatch
from agrepa_fast.errors import UserError
from agrepa_fast.report import html, read_log
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.clips import fixed_batches, load_data, load_held_out, spread
from agrepa_fast.training.inference import load_backbone, score_layers
from agrepa_fast.training.latents import with_statistics
from agrepa_fast.training.start import resume_run, start_run
from agrepa_fast.training.targets import teacher_targets

RATE, CHANNELS = 50.0, 6
LATENTS = [f"latents.rate={RATE:g}", f"latents.channels={CHANNELS}", "data.frames_per_batch=100"]
SCALES = np.array([1.0, 2.0, 0.5, 10.0, 0.1, 3.0], np.float32)
OFFSETS = np.array([0.0, 5.0, -1.0, 100.0, 0.2, -3.0], np.float32)


def frames_of(sound):
    info = soundfile.info(str(sound))
    return round(info.frames / info.samplerate * RATE)


def make(sound, seed):
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(frames_of(sound), CHANNELS)).astype(np.float32) * SCALES + OFFSETS
    latents[:, 4] = 0.2  # a constant channel
    return latents


def rows(manifest):
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="|"))


@pytest.fixture(scope="module")
def corpus(manifest, tmp_path_factory):
    """The corpus with latents beside its sounds (half as .npy, half as .safetensors); returns its list."""
    folder = tmp_path_factory.mktemp("latents") / "corpus"
    shutil.copytree(manifest.parent, folder)
    for number, row in enumerate(rows(folder / "metadata.csv")):
        sound = folder / row["audio_file"]
        latents = make(sound, number)
        if number % 2:
            np.save(f"{sound}.latents.npy", latents)
        else:
            safetensors.torch.save_file({"latents": torch.from_numpy(latents)}, f"{sound}.latents.safetensors")
    return folder / "metadata.csv"


@pytest.fixture
def latent_config(tiny_config, corpus):
    def config(*changes, listed=corpus):
        return tiny_config(f"data.train=[{listed}]", "data.latents=beside", *LATENTS, *changes)

    return config


@pytest.fixture
def _no_report(monkeypatch):
    monkeypatch.setattr("agrepa_fast.training.trainer.write_report", lambda run_dir: run_dir)


@pytest.mark.usefixtures("_no_report")
def test_a_run_trains_probes_resumes_and_samples(latent_config, state_bits, assert_same_bits, tmp_path, monkeypatch):
    run_dir = start_run(latent_config("alignment.pool=null", "train.valid_every=8")).run()
    config = load_checkpoint(run_dir).config
    assert (config.dit.mels, config.dit.cond) == (CHANNELS, CHANNELS + config.model.token_width)
    assert len(config.latents.mean) == CHANNELS
    assert read_scores(run_dir / "foga.csv").layers == (0, 1, 2)
    bits = state_bits(run_dir)
    resume_run(run_dir / "checkpoints" / "step_00000004").run()
    assert_same_bits(state_bits(run_dir), bits)
    sample = next(e for e in read_log(run_dir / "log.jsonl") if e["event"] == "sample")
    written = np.load(run_dir / sample["path"])
    assert written.dtype == np.float32
    assert written.shape[1] == CHANNELS
    # In the codec's own units: channel 3 is around 100, whatever the network has learned.
    assert abs(written[:, 3].mean() - 100) < 40
    assert "latents, in" in html.player(run_dir, sample["path"], "step 8")

    # From the command line: latents, and a waveform where a decoder is given.
    (tmp_path / "my_codec.py").write_text(
        "def decode(latents):\n    return latents.mean(1).repeat_interleave(320) / 1e3\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", str(run_dir), "--text", "seven", "--seconds", "0.4", "--out", "said.npy"]
    assert cli.main(arguments) == 0
    assert np.load("said.npy").shape == (20, CHANNELS)
    assert not (tmp_path / "said.wav").exists()
    prompt = next(run_dir.parent.parent.rglob("said.npy"))
    assert cli.main([*arguments, "--reference", str(prompt), "--decoder", "my_codec:decode"]) == 0
    assert np.load("said.npy").shape == (20, CHANNELS)  # without the reference
    assert soundfile.info("said.wav").frames == 20 * 320
    backbone, checkpoint = load_backbone(run_dir, torch.device("cpu"), "model")
    held_out, _ = load_held_out(checkpoint.config, run_dir, checkpoint.state["clips"])
    again = score_layers(backbone, held_out, checkpoint.config, torch.device("cpu"))
    assert again.by_sample.shape == (3, 4)


@pytest.mark.usefixtures("_no_report")
def test_what_needs_sound_is_refused_in_one_line(latent_config, tmp_path, capsys):
    run_dir = start_run(latent_config("train.steps=4", "train.samples=0", "alignment.enabled=false")).run()
    (tmp_path / "x.wav").write_bytes(b"")
    sample = ["sample", str(run_dir), "--text", "a", "--out", str(tmp_path / "a.npy")]
    for arguments, message in (
        (["evaluate", str(run_dir)], "the run generates latents, and evaluation needs sound"),
        ([*sample, "--reference", str(tmp_path / "x.wav")], "expected latents of this codec (.npy or .safetensors)"),
        ([*sample, "--decoder", "no_such_module:decode"], "--decoder no_such_module:decode: No module named"),
        (
            ["train", "--resume", str(run_dir), "latents.rate=25"],
            "latents.rate: the run was trained with another",
        ),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error


def test_each_channel_has_mean_0_and_std_1_over_the_training_clips(latent_config, tmp_path):
    config = latent_config("data.max_seconds=30", "data.frames_per_batch=1500")
    data = load_data(config, tmp_path)
    config = with_statistics(config, data)
    everything = np.concatenate(
        [data.train.latents_of(data.train.clips[index]).numpy() for index in range(len(data.train))]
    )
    np.testing.assert_allclose(config.latents.mean, everything.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    expected = everything.std(0, dtype=np.float64)
    expected[4] = 1  # a constant channel keeps its scale
    np.testing.assert_allclose(config.latents.std, expected, rtol=1e-5)
    samples = torch.cat([data.train.item(index, None)["mel"] for index in range(len(data.train))]).double()
    np.testing.assert_allclose(samples.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(samples.std(0, unbiased=False), [1, 1, 1, 1, 0, 1], atol=1e-5)
    back = config.grid.denormalised(data.train.item(0, None)["mel"])
    torch.testing.assert_close(back, data.train.latents_of(data.train.clips[0]), rtol=1e-5, atol=1e-5)


def test_a_crop_has_the_latents_and_the_sound_of_one_time(latent_config, tmp_path):
    """The crop begins at frame `start`, and its sound at start / rate seconds."""
    config = latent_config("data.max_seconds=0.3", "data.frames_per_batch=60")
    data = load_data(config, tmp_path)
    cropped = 0
    for index in range(len(data.train)):
        sample = data.train.item(index, torch.Generator().manual_seed(index))
        whole = data.train.latents_of(data.train.clips[index])
        start, frames = sample["start"], sample["mel"].shape[0]
        assert torch.equal(sample["mel"], whole[start : start + frames])  # not measured yet: mean 0, std 1
        sound, rate = soundfile.read(str(sample["clip"].path), dtype="float32")
        first = round(start / RATE * rate)
        np.testing.assert_allclose(sample["audio"].numpy(), sound[first : first + len(sample["audio"])], atol=1e-6)
        assert len(sample["audio"]) <= round(frames / RATE * rate)
        cropped += start > 0
    assert cropped > 3


def test_teachers_are_read_at_the_times_of_the_latents(latent_config, tmp_path):
    """Latent j covers j / rate to (j + 1) / rate seconds. A teacher at the same rate gives its frame j unchanged."""
    config = latent_config("alignment.pool=null")
    data = load_data(config, tmp_path)
    [batch] = fixed_batches(data.valid, spread(data.valid, 1), config, one_shape=True)
    frames = batch.mel.shape[1]

    class Ramp:
        """Extracted features that count their frames."""

        rate, width = RATE, 1

        def read(self, clip, sound, start, seconds):
            raise AssertionError

    count = torch.arange(2.0 + frames).view(1, -1, 1)
    start = int(batch.starts[0])
    batch.features["ramp"] = FeatureBatch(
        count + start, None, torch.tensor([frames + 2]), torch.tensor([start]), torch.tensor([True])
    )
    targets, mask = teacher_targets({"ramp": Ramp()}, batch, config)
    valid = mask[0].nonzero().flatten()
    assert len(valid) >= int(batch.mask[0].sum()) - 1
    torch.testing.assert_close(targets["ramp"][0, valid, 0], valid.float() + start, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("_no_report")
def test_a_column_and_a_store_give_what_files_beside_the_audio_give(latent_config, corpus, tmp_path, monkeypatch):
    by_file = load_data(latent_config(), tmp_path)
    listed = corpus.parent / "with_column.csv"
    with listed.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="|")
        writer.writerow(["audio_file", "text", "domain", "latents"])
        for row in rows(corpus):
            [latents] = corpus.parent.glob(f"{row['audio_file']}.latents.*")
            writer.writerow([row["audio_file"], row["text"], row["domain"], latents.relative_to(corpus.parent)])
    by_column = load_data(latent_config("data.latents=column", listed=listed), tmp_path)
    assert by_column.digest == by_file.digest
    for one, other in zip(by_file.train.clips, by_column.train.clips, strict=True):
        assert torch.equal(by_column.train.latents_of(other), by_file.train.latents_of(one))

    # A codec is registered as a teacher, and `agrepa extract` makes the store.
    (tmp_path / "tiny_codec.py").write_text(CODEC)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "codec.yaml"
    data = f"train: [{corpus}], features: {tmp_path}/stores, max_seconds: 1.0, latents: {tmp_path}/none"
    config.write_text(
        f"preset: demo\ndata: {{{data}}}\nlatents: {{rate: 50, channels: 3}}\n"
        f"train: {{imports: [tiny_codec], out: {tmp_path}/runs}}\n"
        "alignment: {teachers: {codec: {source: tiny-codec, cached: true}}}\n"
    )
    assert cli.main(["extract", str(config), "--teacher", "codec"]) == 0
    [store] = (tmp_path / "stores").iterdir()
    stored = latent_config(f"data.latents={store}", "latents.channels=3")
    data = load_data(stored, tmp_path)
    for index in range(3):
        clip = data.train.clips[index]
        sound, _ = soundfile.read(str(clip.path), dtype="float32")
        framed = sound[: len(sound) // 320 * 320].reshape(-1, 320)
        expected = np.stack([framed.mean(1), framed.max(1), framed.min(1)], 1)
        got = data.train.latents_of(data.train.clips[index]).numpy()
        np.testing.assert_allclose(got[: len(expected)], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"data\.latents: .* holds 3 channels of float32 at 50 a second, expected lat"):
        load_data(latent_config(f"data.latents={store}"), tmp_path)


CODEC = """
import torch

from agrepa_fast.teachers import Teacher, register_teacher


class TinyCodec(Teacher):
    def __init__(self):
        super().__init__("tiny-codec", sample_rate=16000, rate=50.0, width=3)

    def encode(self, waveform, lengths):
        framed = waveform[:, : waveform.shape[1] // 320 * 320].unflatten(1, (-1, 320))
        latents = torch.stack([framed.mean(2), framed.amax(2), framed.amin(2)], 2)
        return latents, torch.arange(latents.shape[1]) < (lengths // 320).unsqueeze(1)


register_teacher("tiny-codec", TinyCodec)
"""


def spoil(path, what, latents):
    path.unlink()
    npy = path.with_name(path.name.rpartition(".")[0] + ".npy")
    if what == "missing":
        return
    if what == "text":
        npy.write_text("not an array")
    elif what == "empty":
        npy.write_bytes(b"")
    elif what == "integers":
        np.save(npy, latents.astype(np.int32))
    elif what == "objects":
        np.save(npy, np.array([latents, None], dtype=object), allow_pickle=True)
    elif what == "cut":
        np.save(npy, latents)
        npy.write_bytes(npy.read_bytes()[:-40])
    elif what == "nan":
        latents[3, 2] = np.nan
        np.save(npy, latents)
    elif what == "turned":
        np.save(npy, latents.T)
    elif what == "batch":
        np.save(npy, latents[None])
    elif what == "channels":
        np.save(npy, latents[:, :4])
    elif what == "rate":
        np.save(npy, latents.repeat(2, axis=0))
    else:
        tensors = (
            {"a": torch.zeros(2), "b": torch.zeros(2)} if what == "two" else {"x": torch.zeros(9, 6).to(torch.int8)}
        )
        safetensors.torch.save_file(tensors, str(npy.with_suffix(".safetensors")))


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "no such file of latents"),
        ("text", "not a file of latents ("),
        ("empty", "not a file of latents ("),
        ("integers", "expected floating latents, got int32"),
        ("objects", "not a file of latents ("),
        ("cut", "not a file of latents ("),
        ("nan", "frame 3 holds a value that is not finite: encode the clip again"),
        ("turned", "it is [channels, frames]: transpose it"),
        ("batch", "expected latents [frames, 6] (latents.channels), got [1, "),
        ("channels", "expected latents [frames, 6] (latents.channels), got ["),
        ("rate", "s of audio are 1"),
        ("two", "expected one tensor, or one named latents, got a, b"),
        ("int8", "expected floating latents, got I8"),
    ],
)
def test_bad_latents_are_one_line_with_the_file(latent_config, corpus, tmp_path, what, message):
    folder = tmp_path / "spoilt"
    shutil.copytree(corpus.parent, folder)
    first = rows(corpus)[0]["audio_file"]
    [path] = folder.glob(f"{first}.latents.*")
    spoil(path, what, make(folder / first, 0))
    with pytest.raises(UserError) as raised:
        load_data(latent_config("data.unreadable_share=0", listed=folder / "metadata.csv"), tmp_path)
    text = str(raised.value)
    assert text.startswith("1 of ")
    assert message in text
    assert first in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "changes, message",
    [
        (["latents.rate=50"], "latents.rate, latents.channels: expected both or neither, got 50 and 0"),
        (
            ["data.latents=beside"],
            "data.latents, latents.rate, latents.channels: expected all of them or none, got 'bes",
        ),
        ([*LATENTS], "data.latents, latents.rate, latents.channels: expected all of them or none, got ''"),
        (
            [*LATENTS, "data.latents=beside", "latents.mean=[0,1]"],
            "latents.mean, latents.std: expected 6 numbers in",
        ),
        (
            [*LATENTS, "data.latents=beside", "data.max_seconds=0.01"],
            "data.max_seconds, latents.rate: expected 1 to",
        ),
        (
            [*LATENTS, "data.latents=beside", "latents.decoder=a.b"],
            "latents.decoder: expected module:function, got",
        ),
    ],
)
def test_fields_that_do_not_fit_are_refused(tiny_config, changes, message):
    with pytest.raises(UserError) as raised:
        tiny_config(*changes)
    assert str(raised.value).startswith(message)


def test_unknown_places_are_refused(latent_config, tmp_path):
    with pytest.raises(UserError, match=r"data\.latents: expected beside, column or the folder of a store"):
        load_data(latent_config("data.latents=nowhere"), tmp_path)
    with pytest.raises(UserError, match="has no latents: add the column latents"):
        load_data(latent_config("data.latents=column"), tmp_path)


def test_changed_latents_change_the_identity_of_a_clip(latent_config, corpus, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(corpus.parent, folder)
    config = latent_config(listed=folder / "metadata.csv")
    before = load_data(config, tmp_path)
    file = next(folder.rglob("*.latents.npy"))
    np.save(file, np.load(file) + 1)
    with pytest.raises(UserError, match=r"0 added, 0 removed, 1 changed"):
        load_data(config, tmp_path, before.split.record)
