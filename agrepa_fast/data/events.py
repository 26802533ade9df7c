"""Everyday sound events for the built-in corpus: from the name of a class to a waveform [S] float64 and its caption.

An event draws its parameters from the generator; the caption says which (low or high, light or heavy).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .voice import FRAME_SECONDS, Array, short_time_filter

Event = Callable[[np.random.Generator, int, int], tuple[Array, str]]


def bell(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    high = bool(rng.integers(2))
    pitch = rng.uniform(700, 1000) if high else rng.uniform(260, 400)
    time = np.arange(samples) / rate
    # Partials of a church bell: hum, prime, tierce, quint, nominal and higher ones.
    partials = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.66, 3.0, 4.0])
    decay = rng.uniform(2.0, 3.5) * np.sqrt(partials)
    level = rng.uniform(0.6, 1.0, len(partials)) / np.sqrt(partials)
    tone = np.sum(
        level[:, None] * np.exp(-decay[:, None] * time) * np.sin(2 * np.pi * pitch * partials[:, None] * time),
        axis=0,
    )
    return tone, f"a {'high' if high else 'low'} bell rings"


def rain(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    heavy = bool(rng.integers(2))
    bed = _shape(rng.standard_normal(samples), rate, lambda f: (f / 1500) / (1 + (f / 1500) ** 2) ** 0.75)
    drops = _impulses(rng, samples, rate, per_second=150 if heavy else 30)
    drops = _shape(drops, rate, lambda f: np.exp(-0.5 * ((f - 4500) / 1200) ** 2))
    mix = _unit(bed) * (1.0 if heavy else 0.15) + _unit(drops) * (0.5 if heavy else 1.0)
    return mix, f"{'heavy' if heavy else 'light'} rain falls"


def engine(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    fast = bool(rng.integers(2))
    start = rng.uniform(85, 120) if fast else rng.uniform(28, 42)
    firing = np.linspace(start, start * (rng.uniform(1.2, 1.6) if fast else 1.0), samples)
    phase = 2 * np.pi * np.cumsum(firing) / rate
    order = np.arange(1, 16)[:, None]
    level = rng.uniform(0.5, 1.0, order.shape) / order
    tone = np.sum(level * np.sin(order * phase + rng.uniform(0, 6.28, order.shape)), axis=0)
    rattle = _shape(rng.standard_normal(samples), rate, lambda f: np.exp(-f / 700))
    mix = _unit(tone) + 0.4 * _unit(rattle) * (1 + 0.8 * np.sin(phase))
    return mix, "an engine revs up" if fast else "an engine idles"


def knock(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    count = int(rng.integers(2, 5))
    spacing = min(rng.uniform(0.2, 0.3), 0.85 * samples / rate / count)
    times = rng.uniform(0.02, 0.08) + spacing * np.arange(count)
    pitch = rng.uniform(170, 300)
    hit = _damped(rate, pitch, 35, 0.15) + 0.5 * _damped(rate, pitch * 2.3, 60, 0.15)
    hit += 0.3 * _damped(rate, pitch * 4.1, 120, 0.15)
    names = {2: "two", 3: "three", 4: "four"}
    return _place(samples, rate, times, hit, rng), f"{names[count]} knocks on a door"


def bird(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    trill = bool(rng.integers(2))
    length = 0.05 if trill else rng.uniform(0.12, 0.18)
    gap = 0.075 if trill else rng.uniform(0.28, 0.36)
    time = np.arange(int(length * rate)) / rate
    low, high = rng.uniform(2400, 3000), rng.uniform(3800, 5200)
    sweep = low + (high - low) * np.sin(np.pi * time / length)
    chirp = np.sin(2 * np.pi * np.cumsum(sweep) / rate) * np.sin(np.pi * time / length) ** 2
    times = np.arange(0.05, samples / rate - length, gap)
    return _place(samples, rate, times, chirp, rng), "a bird trills" if trill else "a bird chirps"


def alarm(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    fast = bool(rng.integers(2))
    period = rng.uniform(0.14, 0.18) if fast else rng.uniform(0.4, 0.5)
    time = np.arange(samples) / rate
    pitch = rng.uniform(1800, 2200)
    tone = np.sin(2 * np.pi * pitch * time) + 0.35 * np.sin(2 * np.pi * 3 * pitch * time)
    return tone * _gate(time, period, 0.5), f"an alarm beeps {'quickly' if fast else 'slowly'}"


def siren(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    time = np.arange(samples) / rate
    speed = rng.uniform(0.8, 1.4)
    pitch = rng.uniform(850, 950) + rng.uniform(300, 400) * np.sin(2 * np.pi * speed * time + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tone = np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.3 * np.sin(3 * phase)
    return tone, "a siren wails"


def footsteps(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    gravel = bool(rng.integers(2))
    times = np.arange(rng.uniform(0.02, 0.1), samples / rate - 0.1, rng.uniform(0.33, 0.45))
    length = int(0.14 * rate)
    time = np.arange(length) / rate
    if gravel:
        crunch = _impulses(rng, length, rate, per_second=900)
        step = _shape(crunch, rate, lambda f: np.exp(-0.5 * ((f - 3200) / 1400) ** 2))
        step = _unit(step) * np.sin(np.pi * time / time[-1])
    else:
        thud = _shape(rng.standard_normal(length), rate, lambda f: np.exp(-f / 350))
        step = _unit(thud) * np.exp(-35 * time) + 0.4 * _damped(rate, 110, 30, 0.14)[:length]
    return _place(samples, rate, times, step, rng), f"footsteps on {'gravel' if gravel else 'wood'}"


def waves(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    time = np.arange(0, samples / rate, FRAME_SECONDS)
    swell = 0.15 + np.sin(np.pi * (time / rng.uniform(1.1, 1.6) + rng.uniform(0, 1))) ** 2
    edge = 250 + 1400 * swell
    return _moving_noise(rng, samples, rate, swell, lambda f: 1 / (1 + (f / edge[:, None]) ** 2)), ("waves wash ashore")


def clock(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    period = rng.uniform(0.22, 0.3)
    times = np.arange(rng.uniform(0.02, 0.1), samples / rate - 0.05, period)
    pitch = rng.uniform(2600, 3400)
    tick = _damped(rate, pitch, 220, 0.04)
    tock = _damped(rate, pitch * 0.72, 220, 0.04)
    return _place(samples, rate, times[::2], tick, rng) + _place(samples, rate, times[1::2], tock, rng), (
        "a clock ticks"
    )


def wind(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    time = np.arange(0, samples / rate, FRAME_SECONDS)
    speed = rng.uniform(0.5, 0.9)
    centre = rng.uniform(380, 520) * (1 + 0.35 * np.sin(2 * np.pi * (speed * time + rng.uniform(0, 1))))
    swell = 0.4 + 0.6 * (centre / centre.max()) ** 2
    width = 90.0
    return _moving_noise(rng, samples, rate, swell, lambda f: np.exp(-0.5 * ((f - centre[:, None]) / width) ** 2)), (
        "wind howls"
    )


def whistle(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    rising = bool(rng.integers(2))
    low, high = rng.uniform(1050, 1250), rng.uniform(1700, 2000)
    pitch = np.linspace(low, high, samples) if rising else np.linspace(high, low, samples)
    time = np.arange(samples) / rate
    pitch = pitch * (1 + 0.008 * np.sin(2 * np.pi * 5.5 * time))
    breath = _shape(rng.standard_normal(samples), rate, lambda f: np.exp(-0.5 * ((f - 1500) / 500) ** 2))
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / rate) + 0.01 * _unit(breath)
    # At the last sample rounding can take the sine below zero, and its root would be nan.
    swell = np.sin(np.pi * time / time[-1]).clip(min=0) ** 0.5
    return tone * swell, f"a {'rising' if rising else 'falling'} whistle"


def applause(rng: np.random.Generator, samples: int, rate: int) -> tuple[Array, str]:
    claps = _impulses(rng, samples, rate, per_second=90)
    centre = rng.uniform(1200, 1500)
    body = _shape(claps, rate, lambda f: np.exp(-0.5 * ((f - centre) / 500) ** 2))
    tail = np.exp(-np.arange(int(0.03 * rate)) / rate * 120)
    size = samples + len(tail)
    room = np.fft.irfft(np.fft.rfft(rng.standard_normal(samples) * np.abs(body), size) * np.fft.rfft(tail, size), size)
    return _unit(body) + 0.3 * _unit(room[:samples]), "a crowd applauds"


EVENTS: dict[str, Event] = {
    event.__name__: event
    for event in (
        bell,
        rain,
        engine,
        knock,
        bird,
        alarm,
        siren,
        footsteps,
        waves,
        clock,
        wind,
        whistle,
        applause,
    )
}


def sound_event(name: str, rng: np.random.Generator, seconds: float, sample_rate: int) -> tuple[Array, str]:
    """One event of class `name` (a key of EVENTS): waveform [S] float64 with peak 1, and its caption."""
    waveform, caption = EVENTS[name](rng, round(seconds * sample_rate), sample_rate)
    return waveform / np.abs(waveform).max(), caption


def _shape(source: Array, rate: int, gain: Callable[[Array], Array]) -> Array:
    """Filter [S] by a fixed gain over frequency in Hz."""
    frequency = np.fft.rfftfreq(len(source), 1 / rate)
    return np.fft.irfft(np.fft.rfft(source) * gain(frequency), n=len(source))


def _moving_noise(
    rng: np.random.Generator, samples: int, rate: int, swell: Array, gain: Callable[[Array], Array]
) -> Array:
    """Noise [samples] whose level [frames] and spectrum [frames, bins] change over time."""
    hop = round(rate * FRAME_SECONDS)
    source = rng.standard_normal(len(swell) * hop)
    size = 1 << (8 * hop - 1).bit_length()
    shape = gain(np.fft.rfftfreq(size, 1 / rate)[None, :])
    shape = shape / np.sqrt(np.mean(shape**2, axis=1, keepdims=True))
    filtered = short_time_filter(source, swell[:, None] * shape, hop)
    return np.pad(filtered, (0, max(0, samples - len(filtered))))[:samples]


def _impulses(rng: np.random.Generator, samples: int, rate: int, per_second: float) -> Array:
    """Impulses of random strength at random times, [samples]."""
    hits = rng.random(samples) < per_second / rate
    hits[rng.integers(samples)] = True
    return hits * rng.uniform(0.3, 1.0, samples) * rng.choice([-1.0, 1.0], samples)


def _damped(rate: int, pitch: float, decay: float, seconds: float) -> Array:
    """A decaying sine."""
    time = np.arange(int(seconds * rate)) / rate
    return np.exp(-decay * time) * np.sin(2 * np.pi * pitch * time)


def _place(samples: int, rate: int, times: Array, sound: Array, rng: np.random.Generator) -> Array:
    """Copies of `sound` at `times` in seconds, each a little louder or softer, [samples]."""
    result = np.zeros(samples + len(sound))
    for time in times:
        start = int(time * rate)
        if start < samples:
            result[start : start + len(sound)] += rng.uniform(0.7, 1.0) * sound
    return result[:samples]


def _gate(time: Array, period: float, duty: float) -> Array:
    """A square wave that is on for `duty` of each period, with edges of 4 ms."""
    position = time % period
    return np.clip(np.minimum(position, duty * period - position) / 0.004, 0, 1)


def _unit(signal: Array) -> Array:
    return signal / max(float(np.sqrt(np.mean(signal**2))), 1e-12)
