"""Formant synthesis for the built-in corpus: words written as phonemes to a speech-like waveform [S].

A band-limited glottal pulse train and noise each pass a filter that follows the formant tracks (Klatt 1980, done in the
short-time Fourier domain). The vowel formants are those of Peterson and Barney 1952.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

FRAME_SECONDS = 0.005


@dataclass(frozen=True)
class Phoneme:
    """Targets of one sound: formants in Hz, amplitudes from 0 to 1, noise band in Hz, length in seconds."""

    formants: tuple[float, float, float]
    voiced: float
    noise: float = 0.0
    noise_centre: float = 0.0  # 0: the noise passes through the formants (aspiration)
    noise_width: float = 1.0
    seconds: float = 0.09
    nasal: bool = False
    burst: bool = False  # a stop: the noise sounds only in the last 15 ms, after the closure


@dataclass(frozen=True)
class Speaker:
    """One voice: mean pitch in Hz, formant scale (a shorter tract has higher formants), breath and tempo."""

    name: str
    pitch: float
    tract: float
    breath: float
    tempo: float


SPEAKERS = (
    Speaker("anna", 205.0, 1.16, 0.05, 1.00),
    Speaker("ben", 112.0, 1.00, 0.03, 1.05),
    Speaker("cleo", 232.0, 1.20, 0.08, 0.93),
    Speaker("dov", 92.0, 0.95, 0.03, 1.10),
    Speaker("esme", 180.0, 1.10, 0.12, 0.97),
    Speaker("finn", 138.0, 1.04, 0.05, 0.90),
)

PHONEMES = {
    "IY": Phoneme((270, 2290, 3010), 1.0, seconds=0.13),
    "IH": Phoneme((390, 1990, 2550), 1.0, seconds=0.10),
    "EH": Phoneme((530, 1840, 2480), 1.0, seconds=0.12),
    "AE": Phoneme((660, 1720, 2410), 1.0, seconds=0.14),
    "AA": Phoneme((730, 1090, 2440), 1.0, seconds=0.14),
    "AO": Phoneme((570, 840, 2410), 1.0, seconds=0.14),
    "UH": Phoneme((440, 1020, 2240), 1.0, seconds=0.10),
    "UW": Phoneme((300, 870, 2240), 1.0, seconds=0.13),
    "AH": Phoneme((640, 1190, 2390), 1.0, seconds=0.11),
    "ER": Phoneme((490, 1350, 1690), 1.0, seconds=0.13),
    "W": Phoneme((300, 650, 2200), 0.6, seconds=0.07),
    "Y": Phoneme((270, 2200, 3000), 0.6, seconds=0.06),
    "R": Phoneme((340, 1100, 1500), 0.6, seconds=0.08),
    "L": Phoneme((350, 1050, 2800), 0.6, seconds=0.08),
    "M": Phoneme((260, 1000, 2200), 0.45, seconds=0.09, nasal=True),
    "N": Phoneme((260, 1600, 2600), 0.45, seconds=0.09, nasal=True),
    "S": Phoneme((320, 1700, 2600), 0.0, 0.35, 6200.0, 1500.0, seconds=0.12),
    "SH": Phoneme((320, 1900, 2600), 0.0, 0.40, 3300.0, 1000.0, seconds=0.12),
    "F": Phoneme((320, 1100, 2300), 0.0, 0.12, 5000.0, 4000.0, seconds=0.10),
    "TH": Phoneme((320, 1400, 2500), 0.0, 0.10, 6800.0, 2500.0, seconds=0.09),
    "Z": Phoneme((300, 1700, 2600), 0.30, 0.20, 6000.0, 1500.0, seconds=0.10),
    "V": Phoneme((300, 1100, 2300), 0.40, 0.06, 4500.0, 4000.0, seconds=0.08),
    "H": Phoneme((500, 1500, 2500), 0.0, 0.25, seconds=0.07),
    "P": Phoneme((320, 800, 2200), 0.0, 0.45, 900.0, 900.0, seconds=0.09, burst=True),
    "T": Phoneme((320, 1750, 2700), 0.0, 0.60, 4800.0, 1800.0, seconds=0.09, burst=True),
    "K": Phoneme((320, 1900, 2200), 0.0, 0.55, 2100.0, 600.0, seconds=0.09, burst=True),
    "B": Phoneme((260, 800, 2200), 0.15, 0.30, 700.0, 700.0, seconds=0.07, burst=True),
    "D": Phoneme((260, 1750, 2700), 0.15, 0.40, 4000.0, 1500.0, seconds=0.07, burst=True),
    "G": Phoneme((260, 1900, 2200), 0.15, 0.40, 1900.0, 600.0, seconds=0.07, burst=True),
    "_": Phoneme((500, 1500, 2500), 0.0, seconds=0.05),
}

LEXICON = {
    "zero": "Z IH R AO UH",
    "one": "W AH N",
    "two": "T UW",
    "three": "TH R IY",
    "four": "F AO R",
    "five": "F AA IH V",
    "six": "S IH K S",
    "seven": "S EH V AH N",
    "eight": "EH IH T",
    "nine": "N AA IH N",
    "mola": "M AO L AA",
    "kesu": "K EH S UW",
    "tiba": "T IY B AA",
    "shano": "SH AA N AO",
    "luri": "L UW R IY",
    "dagu": "D AA G UW",
    "pefa": "P EH F AA",
    "woy": "W AO IY",
    "yamer": "Y AE M ER",
    "hizu": "H IY Z UW",
}


def speak(words: list[str], speaker: Speaker, rng: np.random.Generator, sample_rate: int) -> Array:
    """Words of LEXICON spoken by `speaker`: waveform [S] float64 with peak 1, S at `sample_rate`."""
    symbols = ["_"]
    for word in words:
        symbols += [*LEXICON[word].split(), "_"]
    sounds = [PHONEMES[symbol] for symbol in symbols]
    tempo = speaker.tempo * rng.uniform(0.92, 1.08)
    lengths = [max(3, round(sound.seconds * tempo * rng.uniform(0.9, 1.1) / FRAME_SECONDS)) for sound in sounds]
    frames = sum(lengths)
    owner = np.repeat(np.arange(len(sounds)), lengths)

    formants = np.array([sound.formants for sound in sounds])[owner] * speaker.tract
    formants = formants * rng.normal(1.0, 0.01, size=3)
    formants = np.stack([_smooth(track, 11) for track in formants.T], axis=1)
    voiced = _smooth(np.array([sound.voiced for sound in sounds])[owner], 5)
    from_end = np.concatenate([np.arange(length, 0, -1) for length in lengths])
    is_burst = np.array([sound.burst for sound in sounds])[owner]
    noise = np.array([sound.noise for sound in sounds])[owner] * np.where(is_burst, from_end <= 3, 1.0)
    noise = _smooth(noise, 3)
    nasal = _smooth(np.array([sound.nasal for sound in sounds], dtype=float)[owner], 5)

    hop = round(sample_rate * FRAME_SECONDS)
    size = _transform_size(hop)
    frequency = np.fft.rfftfreq(size, 1 / sample_rate)
    resonance = _formant_gain(formants, nasal, speaker.tract, frequency)
    voice_gain = voiced[:, None] * resonance
    # Fricatives and bursts keep their own band; aspiration is filtered by the tract.
    centre = np.array([sound.noise_centre for sound in sounds])[owner][:, None]
    width = np.array([sound.noise_width for sound in sounds])[owner][:, None]
    band = np.exp(-0.5 * ((frequency[None, :] - centre) / width) ** 2)
    noise_gain = noise[:, None] * np.where(centre > 0, band, 0.4 * resonance)
    noise_gain += speaker.breath * voice_gain

    samples = frames * hop
    progress = np.linspace(0.0, 1.0, samples)
    # Falling sentence melody, a slow wander and a little jitter.
    wander = np.interp(progress, np.linspace(0, 1, 6), rng.normal(0, 0.04, 6))
    pitch = speaker.pitch * rng.uniform(0.94, 1.06) * (1.08 - 0.18 * progress + wander)
    voice = short_time_filter(pulse_train(pitch, sample_rate), voice_gain, hop)
    breath = short_time_filter(rng.standard_normal(samples), noise_gain, hop)
    # A pulse of unit area every 1 / pitch seconds is far weaker than unit-variance noise.
    mix = voice / max(float(np.sqrt(np.mean(voice**2))), 1e-9) + 0.9 * breath
    return mix / np.abs(mix).max()


def pulse_train(pitch: Array, sample_rate: int) -> Array:
    """Band-limited pulses at the pitch track [S] in Hz, by the closed form of 1 + 2 sum_k cos(2 pi k phase)."""
    phase = np.cumsum(pitch) / sample_rate
    harmonics = int(0.48 * sample_rate / pitch.max())
    distance = phase - np.round(phase)
    near = np.abs(distance) < 1e-6
    safe = np.where(near, 0.5, distance)
    ratio = np.sin((2 * harmonics + 1) * np.pi * safe) / np.sin(np.pi * safe)
    return np.where(near, 2.0 * harmonics + 1.0, ratio) / (2 * harmonics + 1)


def short_time_filter(source: Array, gain: Array, hop: int) -> Array:
    """Zero-phase filter that changes every `hop` samples.

    source [S] with S = frames * hop, gain [frames, bins] with bins of `_transform_size(hop)`; returns [S].
    Hann windows of four hops sum to a constant, so a gain of 1 returns the source (faded over the first and
    last two hops).
    """
    frames, size = gain.shape[0], _transform_size(hop)
    window = np.hanning(4 * hop + 1)[:-1] / 2
    padded = np.pad(source, 2 * hop)
    pieces = np.lib.stride_tricks.sliding_window_view(padded, 4 * hop)[::hop][:frames]
    margin = (size - 4 * hop) // 2
    block = np.zeros((frames, size))
    block[:, margin : margin + 4 * hop] = pieces * window
    filtered = np.fft.irfft(np.fft.rfft(block) * gain, n=size)
    result = np.zeros(len(padded) + 2 * size)
    for frame in range(frames):
        result[frame * hop : frame * hop + size] += filtered[frame]
    start = margin + 2 * hop
    return result[start : start + len(source)]


def _transform_size(hop: int) -> int:
    # At least twice the window, so that the filter can ring on both sides.
    return 1 << (8 * hop - 1).bit_length()


def _formant_gain(formants: Array, nasal: Array, tract: float, frequency: Array) -> Array:
    """Magnitude [frames, bins] of five second-order resonances and a source of -6 dB per octave, at unit power."""
    frames = formants.shape[0]
    upper = np.broadcast_to(np.array([3500.0, 4500.0]) * tract, (frames, 2))
    centres = np.concatenate([formants, upper], axis=1)
    widths = np.array([70.0, 95.0, 140.0, 220.0, 280.0]) * (1 + 1.5 * nasal[:, None])
    gain = np.ones((frames, len(frequency)))
    squared = frequency**2
    for index in range(centres.shape[1]):
        centre, width = centres[:, index, None], widths[:, index, None]
        gain *= centre**2 / np.sqrt((squared - centre**2) ** 2 + (width * frequency) ** 2)
    gain *= 1 / (1 + frequency / 300.0)
    return gain / np.sqrt(np.mean(gain**2, axis=1, keepdims=True))


def _smooth(track: Array, width: int) -> Array:
    """Moving Hann average over `width` frames; the ends are held."""
    kernel = np.hanning(width + 2)[1:-1]
    padded = np.pad(track, width // 2, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid")
