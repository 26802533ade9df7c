"""Meanings of columns: a table of the names that data sets and toolkits use."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from functools import lru_cache

from ..errors import UserError

# F5-TTS writes audio_file and text; Hugging Face audiofolder file_name and transcription; NeMo audio_filepath and
# text; Common Voice path, sentence and client_id; DeepSpeech wav_filename and transcript; caption data sets file_name
# and caption.
ALIASES = {
    "audio_file": (
        *("audio_file", "file_name", "audio_filepath", "path", "audio_path", "audio"),
        *("file", "filename", "filepath", "wav", "wav_filename"),
    ),
    "text": ("text", "transcription", "transcript", "sentence", "caption", "labels"),
    "domain": ("domain",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "tokens": ("tokens",),
    "latents": ("latents",),
    "start": ("offset", "start", "start_time", "start_seconds"),
}
CAPTIONS = ("caption", "labels")  # text that describes a sound: its domain is audio unless the list says otherwise
IDENTIFIER = "id"  # names the stem of a sound file
EXPECTED = "audio_file and text, or what docs/data.md lists for them, with optional domain, speaker, tokens, latents"
_MEANING = {alias: meaning for meaning, aliases in ALIASES.items() for alias in aliases}


def known(names: Sequence[str]) -> int:
    """Number of column names that have a meaning."""
    return sum(name.strip().lower() in _MEANING or name.strip().lower() == IDENTIFIER for name in names)


def find_columns(names: Sequence[str], place: str) -> dict[str, int]:
    """{meaning: position} of the columns. Unknown columns are left out; case does not matter.

    A column "id" takes the place of the audio file if no other column names one.

    Raises:
        UserError: begins with `place`; the audio file or the text is missing, two columns mean the same, or a name
            looks like a misspelt one.
    """
    lowered = [name.strip().lower() for name in names]
    columns: dict[str, int] = {}
    for position, name in enumerate(lowered):
        meaning = _MEANING.get(name)
        if meaning is None:
            continue
        if meaning in columns:
            first = names[columns[meaning]].strip()
            both = f"{first!r} appears twice" if lowered[columns[meaning]] == name else f"{first!r} and {name!r} both"
            raise UserError(f"{place}: {both} give the {meaning}: keep one of the columns")
        columns[meaning] = position
    if "audio_file" not in columns and IDENTIFIER in lowered:
        columns["audio_file"] = lowered.index(IDENTIFIER)
    check_spelling(names, columns, place)
    for meaning in ("audio_file", "text"):
        if meaning not in columns:
            raise UserError(f"{place}: the column {meaning!r} is missing; the columns are {EXPECTED}")
    return columns


def check_spelling(names: Sequence[str], columns: Collection[str], place: str) -> None:
    """UserError, beginning with `place`, for a name that looks like a misspelt one of a meaning not in `columns`."""
    for name in names:
        close = _closest(name.strip().lower())
        if close and _MEANING[close] not in ("start", *columns):
            raise UserError(
                f"{place}: unknown column {name.strip()!r} (did you mean {close!r}?); the columns are {EXPECTED}"
            )


@lru_cache(maxsize=1024)
def _closest(name: str) -> str:
    """The known name that `name` misspells, or empty. The samples of an archive repeat their names."""
    return "" if name in _MEANING else next(iter(difflib.get_close_matches(name, _MEANING, n=1, cutoff=0.8)), "")
