"""Token streams of the condition: the bytes of a text, or tokens from a file; always int64 [S, K].

K is the number of streams: 1 (a single tokenizer) or 2 (a primary token and its companion at each position).
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .clip import Clip
from .npy import read_npy
from .packs import Pack, open_sound

BYTE_VOCABULARY = 256
# A few bytes of a file may claim a huge shape (an expanded tensor, a header). More tokens are refused.
MOST_TOKENS = 1 << 24
MOST_BYTES = 16 * MOST_TOKENS
# Other dtypes (quantised ones, torch.uint4) have no integers to read.
_INTEGERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def encode_text(text: str) -> Tensor:
    """UTF-8 bytes of `text` as int64 [S, 1], values 0 to 255; an empty text gives [0, 1].

    Raises:
        UserError: a lone surrogate, which is half a character from JSON (\\ud83d), or a byte that was not UTF-8.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python keeps an undecodable byte b as the surrogate 0xdc00 + b.
        what = (
            f"the byte 0x{code - 0xDC00:02x} is not UTF-8"
            if 0xDC80 <= code <= 0xDCFF
            else f"\\u{code:x} is half a character"
        )
        raise UserError(f"the text is not valid: {what} (after {error.start} characters); write it as UTF-8") from error
    return torch.tensor(list(data), dtype=torch.int64).reshape(-1, 1)


def read_tokens(path: str | Path, vocabularies: Sequence[int], pack: Pack | None = None) -> Tensor:
    """Tokens of one clip from a .npy or .pt file as int64 [S, K], K = len(vocabularies).

    One vocabulary: the file holds S integers (or [S, 1]). Two: [S, 2], or flat and interleaved `[t1, b1, t2, b2, ...]`.
    Stream k holds values from 0 to vocabularies[k] - 1. A .pt file may hold a tensor or a list of integers; neither
    kind of file may carry pickled objects. pack: where the file lies in a larger one.

    Raises:
        UserError: the file is missing, unreadable, empty, damaged, of the wrong shape or type, out of range, or has
            more than 2^24 tokens (62 hours at 75 a second).
    """
    if len(vocabularies) not in (1, 2) or any(size < 1 for size in vocabularies):
        raise ValueError(f"vocabularies must be one or two positive sizes, got {list(vocabularies)}")
    path = Path(path)
    tokens = _load(path, pack)
    streams = len(vocabularies)
    if tokens.size == 0:
        raise UserError(f"{path}: holds no tokens")
    if tokens.ndim == 1:
        if tokens.shape[0] % streams:
            raise UserError(
                f"{path}: {tokens.shape[0]} tokens do not divide into two interleaved streams "
                "(primary, companion, primary, companion, ...)"
            )
        tokens = tokens.reshape(-1, streams)
    if tokens.ndim != 2 or tokens.shape[1] != streams:
        wanted = "[S]" if streams == 1 else "[S, 2] or flat interleaved [2 S]"
        raise UserError(f"{path}: tokens must be {wanted}, the file holds shape {list(tokens.shape)}")
    check_range(path, tokens, vocabularies)
    return torch.from_numpy(np.array(tokens, dtype=np.int64, order="C"))


def check_text_vocabulary(clip: Clip, name: str, sizes: Sequence[int]) -> None:
    """Check that a clip without a token file has a vocabulary of text bytes.

    Raises:
        UserError: names the clip and the vocabulary.
    """
    if clip.tokens is None and tuple(sizes) != (BYTE_VOCABULARY,):
        raise UserError(
            f"{clip.source}: {clip.path.name} has no token file, and the vocabulary {name!r} {tuple(sizes)} is not "
            f"byte text ({BYTE_VOCABULARY},): add the column tokens or use byte text"
        )


def check_range(place: Path, tokens: np.ndarray, vocabularies: Sequence[int]) -> None:
    """UserError, beginning with `place`, unless tokens [S, K] have a stream for each vocabulary and lie within it."""
    if tokens.shape[1] != len(vocabularies):
        raise UserError(f"{place}: tokens of {tokens.shape[1]} streams, the vocabulary has {len(vocabularies)}")
    for stream, size in enumerate(vocabularies):
        low, high = (int(tokens[:, stream].min()), int(tokens[:, stream].max())) if len(tokens) else (0, 0)
        if low < 0 or high >= size:
            raise UserError(f"{place}: token {low if low < 0 else high} in stream {stream} is outside 0 to {size - 1}")


def _load(path: Path, pack: Pack | None) -> np.ndarray:
    """The integers of a file, in any width and shape."""
    if pack is None and not path.is_file():
        raise UserError(f"{path}: no such token file")
    if path.suffix not in (".npy", ".pt"):
        raise UserError(f"{path}: tokens are read from .npy or .pt files, not {path.suffix or 'this'}")
    try:
        with open_sound(path, pack) as file:
            size = os.fstat(file.fileno()).st_size if pack is None else pack.size
            return (_load_numpy if path.suffix == ".npy" else _load_torch)(path, file, size)
    except UserError:
        raise
    except Exception as error:
        # A damaged file can fail anywhere in either reader; all failures mean the same to the user.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as tokens ({reason})") from error


def _check_count(path: Path, count: int) -> None:
    if count > MOST_TOKENS:
        raise UserError(f"{path}: claims {count:.3g} tokens, a clip has at most {MOST_TOKENS}: cut it into clips")


def _load_numpy(path: Path, file: BinaryIO, size: int) -> np.ndarray:
    def check(dtype: np.dtype, shape: tuple[int, ...]) -> None:
        if dtype.kind not in "iu":
            raise UserError(f"{path}: tokens must be integers, the file holds {str(dtype)[:60]}")
        _check_count(path, math.prod(shape))

    return read_npy(path, file, size, check)


def _load_torch(path: Path, file: BinaryIO, size: int) -> np.ndarray:
    if zipfile.is_zipfile(file):
        # Records may be compressed.
        with zipfile.ZipFile(file) as archive:
            size = max(size, sum(record.file_size for record in archive.infolist()))
    if size > MOST_BYTES:
        raise UserError(f"{path}: {size} bytes are more than tokens of one clip take ({MOST_BYTES})")
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        if loaded.layout != torch.strided or loaded.is_nested or loaded.is_meta or loaded.dtype not in _INTEGERS:
            kind = "a nested tensor" if loaded.is_nested else f"{loaded.layout} {loaded.dtype} on {loaded.device}"
            raise UserError(f"{path}: tokens must be a dense tensor of integers, the file holds {kind}")
        _check_count(path, loaded.numel())
        return loaded.resolve_neg().numpy()
    if isinstance(loaded, list) and all(type(value) is int for value in loaded):
        _check_count(path, len(loaded))
        try:
            return np.array(loaded, dtype=np.int64)
        except OverflowError as error:
            raise UserError(f"{path}: holds a token beyond 64 bits") from error
    raise UserError(f"{path}: tokens must be a tensor or a list of integers, not {type(loaded).__name__}")
