"""WebDataset: `wds:shards-{000..099}.tar`, tar archives in which the members of one key form a sample.

An archive is listed once, without reading its sounds; the list is kept in the cache folder with the archive's size and
time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import UserError
from .clip import Clip, check_domain
from .columns import ALIASES, CAPTIONS, check_spelling
from .latents import NAME as LATENTS
from .latents import SUFFIXES as LATENT_SUFFIXES
from .layouts import AUDIO_SUFFIXES
from .packs import Member
from .verdicts import cache_folder, load_checked, save_checked

VERSION = 3  # of a kept list
TOKEN_KINDS = ("npy", "pt", "tokens.npy", "tokens.pt")
LATENT_KINDS = tuple(f"{LATENTS}{suffix}" for suffix in LATENT_SUFFIXES)
FILES = {"tokens": "a second token file of one key", "latents": "a second file of latents of one key"}
MOST_TEXT = 1 << 20  # bytes of a .txt or .json member
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def read_archives(pattern: str) -> list[Clip]:
    """The clips of all archives of a pattern, in order.

    pattern: a path with ranges {000..099} and the wildcards of a shell. A sample is a sound file and, under
    the same key, a `.txt` (the text) or a `.json` (an object with columns of a list: text, caption, domain, speaker);
    it may have a token file (`TOKEN_KINDS`) and a file of latents (`LATENT_KINDS`) too.

    Raises:
        UserError: an archive is missing, compressed or damaged, or a sample has no text, or two files for one thing.
    """
    clips = [clip for archive in _expand(pattern) for clip in _clips(archive)]
    if not clips:
        raise UserError(f"wds:{pattern}: the archives hold no sound files ({', '.join(AUDIO_SUFFIXES)})")
    return clips


def _expand(pattern: str) -> list[Path]:
    pieces = _RANGE.split(pattern)
    # Plain text, first, last, plain text, first, last, ..., plain text.
    choices: list[list[str]] = [[pieces[0]]]
    for first, last, text in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        if int(last) < int(first) or int(last) - int(first) > 100_000:
            raise UserError(f"wds:{pattern}: the range {{{first}..{last}}} does not count up")
        choices += [[str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)], [text]]
    names = ["".join(parts) for parts in product(*choices)]
    paths = []
    for name in names:
        found = sorted(glob(name, recursive=True)) if re.search(r"[*?\[]", name) else [name]
        if not found:
            raise UserError(f"wds:{name}: no file fits")
        paths += [Path(path) for path in found]
    return paths


def _clips(archive: Path) -> Iterator[Clip]:
    for row in _listed(archive):
        place = f"{archive.name}:{row['name']}"
        yield Clip(
            path=archive / row["name"],
            text=row["text"],
            domain=check_domain(place, row["domain"]),
            speaker=row["speaker"] or None,
            tokens=archive / row["tokens"][0] if row["tokens"] else None,
            source=place,
            pack=Member(archive.absolute(), row["offset"], row["size"]),
            token_pack=Member(archive.absolute(), *row["tokens"][1:]) if row["tokens"] else None,
            latents=archive / row["latents"][0] if row["latents"] else None,
            latent_pack=Member(archive.absolute(), *row["latents"][1:]) if row["latents"] else None,
        )


def _listed(archive: Path) -> list[dict[str, Any]]:
    """One row for each sample; from the cache if the archive has not changed."""
    try:
        facts = os.stat(archive)
        stamp = [VERSION, str(archive.absolute()), facts.st_size, facts.st_mtime_ns]
    except OSError as error:
        raise UserError(f"{archive}: no such archive ({error.strerror})") from error
    folder = cache_folder()
    name = hashlib.blake2b(os.fsencode(archive.absolute()), digest_size=12).hexdigest()
    index = folder and folder / f"archive-{name}.json"
    known = load_checked(index)
    if isinstance(known, dict) and known.get("stamp") == stamp:
        return known["rows"]
    rows = list(_scan(archive))
    if index is not None:
        save_checked(index, {"stamp": stamp, "rows": rows})
    return rows


def _scan(archive: Path) -> Iterator[dict[str, Any]]:
    """Read the samples of an archive from its headers and small members."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                if member.issparse():
                    raise UserError(f"{archive}: {member.name} is stored sparse: write the archive without --sparse")
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, _, kind = base.partition(".")
                kind = kind.lower()
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if f".{kind}" in AUDIO_SUFFIXES:
                    if "name" in sample:
                        raise UserError(f"{archive}: {member.name}: a second sound of one key, after {sample['name']}")
                    sample |= {"name": member.name, "offset": member.offset_data, "size": member.size}
                elif kind in TOKEN_KINDS or kind.endswith(LATENT_KINDS):
                    meaning = "tokens" if kind in TOKEN_KINDS else LATENTS
                    if meaning in sample:
                        raise UserError(f"{archive}: {member.name}: {FILES[meaning]}, after {sample[meaning][0]}")
                    sample[meaning] = (member.name, member.offset_data, member.size)
                elif kind in ("txt", "json"):
                    if member.size > MOST_TEXT:
                        raise UserError(f"{archive}: {member.name}: {member.size} bytes are no text of a clip")
                    content = tar.extractfile(member)
                    assert content is not None  # it is a regular file
                    sample[kind] = content.read()
            if file.seek(0, os.SEEK_END) < tar.offset:
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError, EOFError) as error:
        packed = archive.name.endswith((".gz", ".tgz", ".zst", ".xz", ".bz2"))
        why = "compressed archives are not read: unpack it to .tar" if packed else f"not a whole tar archive ({error})"
        raise UserError(f"{archive}: {why}") from error
    for key, sample in samples.items():
        if "name" in sample:
            facts = {"text": "", "domain": "", "speaker": ""} | _described(archive, key, sample)
            files = {name: sample.get(name) for name in FILES}
            yield {name: sample[name] for name in ("name", "offset", "size")} | facts | files


def _described(archive: Path, key: str, sample: dict[str, Any]) -> dict[str, str]:
    """Text, domain and speaker of a sample, if its .txt and .json have them."""
    facts: dict[str, str] = {}
    if "json" in sample:
        place = f"{archive}: {key}.json"
        try:
            values = json.loads(sample["json"])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise UserError(f"{place}: expected an object, got {type(values).__name__}")
        for meaning in FILES:
            if values.get(meaning) is not None:
                raise UserError(f"{place}: {meaning} are not read from here: write {key}.{meaning}.npy")
        for meaning in ("text", "domain", "speaker"):
            for name in ALIASES[meaning]:
                if values.get(name) is not None and meaning not in facts:
                    if type(values[name]) not in (str, int):
                        raise UserError(f"{place}: {name} is {type(values[name]).__name__}, expected text")
                    facts[meaning] = str(values[name])
                    if name in CAPTIONS:
                        facts.setdefault("domain", "audio")
        present = {"audio_file", *facts, *sample, *(["text"] if "txt" in sample else [])}
        check_spelling(list(values), present, place)
    if "txt" in sample:
        facts["text"] = sample["txt"].decode("utf-8", "surrogateescape").strip()
    if "text" not in facts:
        raise UserError(
            f"{archive}: {key} has no text: add {key}.txt, or {key}.json with one of {', '.join(ALIASES['text'])}"
        )
    return facts
