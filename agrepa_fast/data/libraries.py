"""torchaudio and soundfile, imported on first use, with an error that says what to install."""

from __future__ import annotations

from types import ModuleType

import torch

from ..errors import UserError


def import_torchaudio() -> ModuleType:
    """torchaudio, imported on first use.

    Raises:
        UserError: it is not installed, or it was built for another torch.
    """
    try:
        import torchaudio.functional
    except ModuleNotFoundError as error:
        raise UserError(
            f"torchaudio is not installed ({first_line(error)}): pip install 'agrepa-fast[audio]'"
        ) from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"torchaudio does not fit torch {torch.__version__} ({first_line(error)}): "
            "install the two together, in versions built for each other, from one index"
        ) from error
    return torchaudio


def import_soundfile() -> ModuleType:
    """soundfile, imported on first use.

    Raises:
        UserError: it or its C library is missing.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise UserError(
            f"soundfile cannot be imported ({first_line(error)}): pip install 'agrepa-fast[audio]'"
        ) from error
    return soundfile


def first_line(error: BaseException) -> str:
    """The first line of an error's message; of libsndfile's without the file's name, which the caller gives."""
    return (getattr(error, "error_string", "") or str(error) or type(error).__name__).splitlines()[0]
