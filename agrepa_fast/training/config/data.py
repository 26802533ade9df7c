"""Section `data`: the clips of a run and their batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...errors import UserError
from ...fields import AT_LEAST_ONE, NOT_EMPTY, Allowed, Section, between, from_below, inside, one_of
from ...teachers.tokenizers import split_source
from .names import MODULE_NAME

Source = Annotated[str, NOT_EMPTY]
Name = Annotated[str, NOT_EMPTY]
VocabularySize = Annotated[int, between(1, 1_000_000)]
STREAMS = Allowed("one size, or two for two token streams", lambda sizes: len(sizes) in (1, 2))
PROMPT_SHARE = Allowed("[low, high] with low <= high", lambda shares: shares[0] <= shares[1])


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """Where clips come from and how they are batched."""

    train: Annotated[
        tuple[Source, ...], AT_LEAST_ONE, 'manifests or folders (docs/data.md); "builtin": the built-in corpus'
    ] = ("builtin",)
    valid: Annotated[
        tuple[Source, ...], "manifests or folders for validation; empty: valid_share of train is held out"
    ] = ()
    valid_share: Annotated[float, inside(0, 1), "share of each domain's clips that is held out"] = 0.1
    max_seconds: Annotated[float, between(0.001, 3600), "length of a crop; longer clips: see long"] = 10.0
    long: Annotated[
        str,
        one_of(("crop", "windows")),
        "clips longer than max_seconds: a random crop of each in an epoch (crop), or all of it in windows of equal "
        "length (windows); held-out clips are cropped",
    ] = "crop"
    buckets: Annotated[int, between(1, 256), "number of batch lengths, evenly spaced up to max_seconds"] = 4
    frames_per_batch: Annotated[int, between(1, 262_144), "mel frames of a batch, padding included"] = 4096
    prompt_share: Annotated[
        tuple[Annotated[float, from_below(0, 1)], Annotated[float, from_below(0, 1)]],
        PROMPT_SHARE,
        "length of the reference as a share of the crop, drawn between the two",
    ] = (0.0, 0.5)
    balance_domains: Annotated[bool, "whether every domain is drawn equally often"] = True
    vocabularies: Annotated[
        dict[Annotated[str, MODULE_NAME], Annotated[tuple[VocabularySize, ...], STREAMS]],
        AT_LEAST_ONE,
        "token vocabularies: {name: [size]}, or {name: [size, size]} for two token streams",
    ] = field(default_factory=lambda: {"text": (256,)})
    vocabulary_of: Annotated[dict[Name, str], 'vocabulary of each domain; "text" for a domain that is not named'] = (
        field(default_factory=dict)
    )
    tokens: Annotated[
        dict[Name, str], "{domain: s3:FILE or beats:FILE}, extracted tokens (agrepa extract --tokens); else text bytes"
    ] = field(default_factory=dict)
    unreadable_share: Annotated[float, between(0, 1), "more unreadable files than this share stop the run"] = 0.05
    allow_outside: Annotated[bool, "a manifest may name files outside its folder"] = False
    features: Annotated[str, "folder of what `agrepa extract` writes; empty: features in train.out"] = ""
    latents: Annotated[
        str,
        "latents in place of mels: beside (files beside the audio), column (of the manifest) or a store's folder; "
        "empty: mels (docs/paradigms.md)",
    ] = ""
    workers: Annotated[int, between(0, 128), "processes that read ahead; 0: the training process reads"] = 0

    def check(self) -> None:
        """Check the vocabularies against each other."""
        if len({len(streams) for streams in self.vocabularies.values()}) > 1:
            raise UserError(
                f"data.vocabularies: expected the same number of streams in all, got {plain(self.vocabularies)}"
            )
        if len({streams[1:] for streams in self.vocabularies.values()}) > 1:
            raise UserError(
                f"data.vocabularies: expected one size of the second stream in all, got {plain(self.vocabularies)}"
            )
        for domain, source in self.tokens.items():
            try:
                split_source(source)
            except UserError as error:
                raise UserError(f"data.tokens.{domain}: {error}") from error
        for domain, vocabulary in self.vocabulary_of.items():
            if vocabulary not in self.vocabularies:
                known = ", ".join(self.vocabularies)
                raise UserError(
                    f"data.vocabulary_of.{domain}: expected one of data.vocabularies ({known}), got {vocabulary!r}"
                )


def plain(vocabularies: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """The vocabularies as a user writes them."""
    return {name: list(streams) for name, streams in vocabularies.items()}
