"""Token streams of the condition: text as bytes, or pre-computed tokens from a file; always int64 [S, K].

K is the number of streams: 1 (a single tokenizer) or 2 (a primary token and its companion at each position).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

BYTE_VOCABULARY = 256


def encode_text(text: str) -> Tensor:
    """UTF-8 bytes of `text` as int64 [S, 1], values 0 to 255; an empty text gives [0, 1].

    UserError for a lone surrogate: half a character from JSON (\\ud83d), or a byte that was not UTF-8.
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


def read_tokens(path: str | Path, vocabularies: Sequence[int]) -> Tensor:
    """Tokens of one clip from a .npy or .pt file as int64 [S, K], K = len(vocabularies).

    One vocabulary: the file holds S integers (or [S, 1]). Two: [S, 2], or flat and interleaved
    `[t1, b1, t2, b2, ...]`. Stream k holds values from 0 to vocabularies[k] - 1. A .pt file may hold a
    tensor or a list of integers; neither kind of file may carry pickled objects.

    UserError when the file is missing, unreadable, empty, of the wrong shape or type, or out of range.
    """
    if len(vocabularies) not in (1, 2) or any(size < 1 for size in vocabularies):
        raise ValueError(f"vocabularies must be one or two positive sizes, got {list(vocabularies)}")
    path = Path(path)
    tokens = _load(path)
    streams = len(vocabularies)
    if tokens.size == 0:
        raise UserError(f"{path}: holds no tokens")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{path}: tokens must be integers, the file holds {tokens.dtype}")
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
    for stream, size in enumerate(vocabularies):
        low, high = int(tokens[:, stream].min()), int(tokens[:, stream].max())
        if low < 0 or high >= size:
            raise UserError(f"{path}: token {low if low < 0 else high} in stream {stream} is outside 0 to {size - 1}")
    return torch.from_numpy(tokens.astype(np.int64))


def _load(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such token file")
    if path.suffix not in (".npy", ".pt"):
        raise UserError(f"{path}: tokens are read from .npy or .pt files, not {path.suffix or 'this'}")
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file can fail anywhere in either reader; all of it means the same to the user.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as tokens ({reason})") from error
    if isinstance(loaded, Tensor):
        if loaded.is_floating_point() or loaded.is_complex() or loaded.is_sparse:
            raise UserError(f"{path}: tokens must be integers, the file holds {loaded.dtype}")
        return loaded.numpy()
    if isinstance(loaded, list) and all(type(value) is int for value in loaded):
        # Beyond 64 bits numpy makes objects, which the caller's type check refuses.
        return np.array(loaded) if loaded else np.zeros(0, dtype=np.int64)
    raise UserError(f"{path}: tokens must be a tensor or a list of integers, not {type(loaded).__name__}")
