"""Where the extracted features and tokens of a run lie, and what they must have been made with."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from ..data.dataset import TokenSource
from ..errors import UserError
from ..teachers.cache import FeatureKey
from ..teachers.shards import store_name
from ..teachers.store import Store
from ..teachers.tokenizers import StoredTokens, split_source
from .config import RunConfig, TeacherConfig
from .identity import file_digest

WEIGHTS = ("config.json", "preprocessor_config.json", "*.safetensors")  # of a model's folder, what decides features


def features_root(config: RunConfig) -> Path:
    """The folder of the stores of a run."""
    return Path(config.data.features or Path(config.train.out) / "features")


def feature_key(teacher: TeacherConfig, rate: float = 0.0) -> FeatureKey:
    """What decides the teacher's features."""
    options = dict(teacher.options)
    revision, layer = str(options.pop("revision", "")), str(options.pop("layer", ""))
    return FeatureKey(teacher.source, revision, layer, json.dumps(options, sort_keys=True) if options else "", rate)


def weights_digest(source: str) -> str:
    """Digest of a teacher's local files; "" for a registered name or a name on the hub."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted({file for pattern in WEIGHTS for file in path.glob(pattern)})
    digests = "".join(str(file_digest(file)) for file in files)
    return hashlib.blake2b(digests.encode(), digest_size=8).hexdigest() if files else ""


def token_key(source: str, rate: float = 0.0) -> FeatureKey:
    """What decides the tokens of "s3:FILE"."""
    return FeatureKey(":".join(split_source(source)), rate=rate)


def open_store(folder: Path, source: str, place: str) -> Store:
    """The store at `folder`, with a warning for each part that cannot be read.

    Raises:
        UserError, beginning with `place`: no store, or made with other weights than `source` has now.
    """
    store = Store(folder)
    for reason in store.broken.values():
        warnings.warn(reason, stacklevel=2)
    now = weights_digest(source)
    if now and now != store.info.weights:
        raise UserError(
            f"{place}: {folder} was made with other weights than {source} has now: delete it and extract again"
        )
    return store


def open_named_store(folder: Path, source: str, place: str) -> Store:
    """`open_store`, where the folder's name says what its content must have been made with.

    Raises:
        UserError: also where its store.json says something else.
    """
    store = open_store(folder, source, place)
    if store.info.folder_name() != folder.name:
        made = store.info.key.teacher
        raise UserError(
            f"{place}: {folder}/store.json is of another store ({store.info.folder_name()}, made by {made}): "
            "delete the folder and extract again"
        )
    return store


def stored_tokens(config: RunConfig) -> dict[str, TokenSource]:
    """{domain: extracted tokens} of data.tokens. UserError where they have not been extracted."""
    sources: dict[str, TokenSource] = {}
    for domain, source in config.data.tokens.items():
        name, file = split_source(source)
        folder = features_root(config) / store_name(token_key(source), config.mel.sample_rate, pooled=False)
        if not (folder / "store.json").exists():
            raise UserError(f"data.tokens.{domain}: no tokens in {folder}: run agrepa extract CONFIG --tokens {name}")
        sources[domain] = StoredTokens(open_named_store(folder, file, f"data.tokens.{domain}"))
    return sources
