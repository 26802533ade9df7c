"""The built-in corpus: synthetic speech with transcripts and sound events with captions, as WAV files [S].

It needs NumPy alone and no download. The same seed and sizes give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import wave
from pathlib import Path

import numpy as np

from ..errors import UserError
from .events import EVENTS, sound_event
from .voice import LEXICON, SPEAKERS, Array, speak

# It is recorded, so that a corpus of an older recipe is not taken for this one.
RECIPE = 2
LONGEST_SECONDS = 2.0


def write_corpus(
    folder: str | Path, *, seed: int = 0, speech: int = 120, audio: int = 120, sample_rate: int = 16000
) -> Path:
    """Write `speech` spoken clips and `audio` sound events of 0.5 to 2 s; return the path of metadata.csv.

    The folder gets wav/*.wav (16-bit mono at `sample_rate` Hz), metadata.csv (`audio_file|text|domain|speaker`, the two
    domains alternating) and corpus.json. A spoken clip has one to three of 20 words in one of six voices; a sound event
    is of one of 13 classes, with a caption. Clip i depends on the seed and i alone, so a larger corpus begins with the
    clips of a smaller one. A folder that holds the same corpus is reused. The folder appears complete or not at all.

    Raises:
        UserError: the folder holds anything else.
    """
    if speech < 0 or audio < 0 or speech + audio == 0:
        raise UserError(f"a corpus needs at least one clip, got speech={speech} audio={audio}")
    if seed < 0:
        raise UserError(f"the corpus seed must not be negative, got {seed}")
    if sample_rate < 16000:
        raise UserError(f"the corpus needs a sample rate of at least 16000 Hz, got {sample_rate}")
    folder = Path(folder)
    record = {"recipe": RECIPE, "seed": seed, "speech": speech, "audio": audio, "sample_rate": sample_rate}
    if _holds(folder, record):
        return folder / "metadata.csv"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: is not empty and does not hold this corpus ({_describe(record)}): "
            "choose another folder or delete it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _build(building, record)
        # mkdtemp makes a private folder; this one is as readable as any other.
        building.chmod(0o755)
        try:
            os.replace(building, folder)
        except OSError:
            # Another process of the same run may have finished first.
            if not _holds(folder, record):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder / "metadata.csv"


def _build(folder: Path, record: dict[str, int]) -> None:
    (folder / "wav").mkdir()
    seed, rate = record["seed"], record["sample_rate"]
    rows = []
    for index in range(max(record["speech"], record["audio"])):
        if index < record["speech"]:
            waveform, text, speaker = _speech_clip(np.random.default_rng([seed, 0, index]), rate)
            name = f"wav/speech_{index:05d}.wav"
            _write_wav(folder / name, waveform, rate)
            rows.append(f"{name}|{text}|speech|{speaker}")
        if index < record["audio"]:
            rng = np.random.default_rng([seed, 1, index])
            kind = list(EVENTS)[index % len(EVENTS)]
            waveform, text = sound_event(kind, rng, rng.uniform(1.0, LONGEST_SECONDS), rate)
            name = f"wav/{kind}_{index:05d}.wav"
            _write_wav(folder / name, _finish(waveform, rng), rate)
            rows.append(f"{name}|{text}|audio|")
    header = "audio_file|text|domain|speaker"
    (folder / "metadata.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    (folder / "corpus.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def _speech_clip(rng: np.random.Generator, rate: int) -> tuple[Array, str, str]:
    speaker = SPEAKERS[int(rng.integers(len(SPEAKERS)))]
    names = list(LEXICON)
    words = [names[index] for index in rng.integers(len(names), size=int(rng.integers(1, 4)))]
    waveform = speak(words, speaker, rng, rate)
    while len(waveform) > LONGEST_SECONDS * rate:
        words.pop()
        waveform = speak(words, speaker, rng, rate)
    short = round(0.5 * rate) - len(waveform)
    if short > 0:
        waveform = np.pad(waveform, (short // 2, short - short // 2))
    return _finish(waveform, rng), " ".join(words), speaker.name


def _finish(waveform: Array, rng: np.random.Generator) -> Array:
    """Set the level, fade the ends against clicks, and add the faint noise of a room (-80 dB)."""
    fade = np.minimum(1.0, np.arange(1, len(waveform) + 1) / 80)
    waveform = waveform * fade * fade[::-1] * rng.uniform(0.3, 0.7)
    return waveform + 1e-4 * rng.standard_normal(len(waveform))


def _write_wav(path: Path, waveform: Array, rate: int) -> None:
    # Written by the standard library, so that the corpus needs no audio extra.
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())


def _holds(folder: Path, record: dict[str, int]) -> bool:
    try:
        recorded = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    clips = record["speech"] + record["audio"]
    complete = (folder / "metadata.csv").is_file() and len(list((folder / "wav").glob("*.wav"))) == clips
    return recorded == record and complete


def _describe(record: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items())
