"""From a normalised log-mel [T, M] to a waveform [S]: Griffin-Lim, or Vocos if it is installed and fits the mel.

Latents are decoded by a function of the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data.mel import MEL_PRESETS, LogMel
from ..errors import UserError
from .config import RunConfig
from .latents import load_decoder

VOCOS = "charactr/vocos-mel-24khz"


def build_vocoder(choice: str, log_mel: LogMel) -> Callable[[Tensor], Tensor]:
    """The vocoder `choice`: "griffin-lim"; a folder or hub name of a Vocos for this mel; or "auto".

    "auto" is Vocos mel-24khz if it is installed, its weights are on this machine and the mel is its own; else
    Griffin-Lim. The `__name__` of the returned function says which vocoder it is.

    Raises:
        UserError: a Vocos was asked for and cannot be used.
    """
    if choice == "griffin-lim":
        return _griffin_lim(log_mel)
    fits = log_mel.config == MEL_PRESETS["vocos-24khz"]
    if choice == "auto":
        if not fits:
            return _griffin_lim(log_mel)
        try:
            return _vocos(VOCOS, log_mel)
        except UserError:
            return _griffin_lim(log_mel)
    if not fits:
        raise UserError(f"train.vocoder: {choice!r} needs the mel settings of Vocos mel-24khz; use griffin-lim")
    return _vocos(choice, log_mel)


def build_decoder(config: RunConfig) -> Callable[[Tensor], Tensor] | None:
    """What makes a waveform of a run's mels or latents; None for latents without `latents.decoder`.

    Raises:
        UserError: the vocoder or the decoder cannot be used.
    """
    if not config.data.latents:
        return build_vocoder(config.train.vocoder, LogMel(config.mel))
    return load_decoder(config.latents.decoder, "latents.decoder") if config.latents.decoder else None


def _griffin_lim(log_mel: LogMel) -> Callable[[Tensor], Tensor]:
    """`LogMel.inverse`, also for mels shorter than a window: the last frame is repeated, and the excess cut off."""
    config = log_mel.config
    least = 1 - (-config.minimum_samples // config.hop_length)

    def decode(mel: Tensor) -> Tensor:
        missing = mel[-1:].expand(max(0, least - mel.shape[0]), -1)
        return log_mel.inverse(torch.cat([mel, missing]))[: (mel.shape[0] - 1) * config.hop_length]

    decode.__name__ = "griffin-lim"
    return decode


def _vocos(source: str, log_mel: LogMel) -> Callable[[Tensor], Tensor]:
    try:
        from vocos import Vocos
    except ImportError as error:
        raise UserError("train.vocoder: pip install vocos, or use griffin-lim") from error
    folder = Path(source)
    try:
        if folder.is_dir():
            vocos = Vocos.from_hparams(str(folder / "config.yaml"))
            weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
            vocos.load_state_dict(weights)
        else:
            vocos = Vocos.from_pretrained(source)
    except Exception as error:
        raise UserError(f"train.vocoder: cannot load {source!r} ({str(error).splitlines()[0]})") from error
    vocos.eval().requires_grad_(False)
    config = log_mel.config

    def decode(mel: Tensor) -> Tensor:
        with torch.no_grad():
            return vocos.decode((mel.float() * config.std + config.mean).T.unsqueeze(0)).squeeze(0)

    decode.__name__ = f"vocos {source}"
    return decode
