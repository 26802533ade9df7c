"""`agrepa sample`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import UserError
from .options import number, overrides, seed

HELP = "Generate audio from text with a checkpoint's EMA weights."
EXAMPLES = """\
examples:
  agrepa sample runs/demo --text "seven" --seconds 0.8 --out seven.wav
  agrepa sample runs/codec --text "seven" --decoder mycodec:decode --out seven.npy
  agrepa sample runs/demo --text "seven" --reference voice.wav --reference-text "one two" --out seven.wav
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument("--text", required=True, help="what to say, or a caption of the sound")
    parser.add_argument("--domain", default="speech", help="decides the token vocabulary (default: speech)")
    parser.add_argument("--seconds", type=number, default=1.0, help="length of what is generated")
    parser.add_argument("--reference", metavar="FILE", help="audio, or latents, to continue in voice and manner")
    parser.add_argument("--reference-text", default="", help="what the reference says")
    parser.add_argument("--out", type=Path, default="sample.wav", help="WAV file to write; .npy for latents")
    parser.add_argument("--decoder", metavar="MODULE:FUNCTION", help="makes a waveform of latents; imported and run")
    parser.add_argument("--points", type=int, help="grid points of the sampler")
    parser.add_argument("--guidance", type=number, help="strength of classifier-free guidance")
    parser.add_argument("--method", choices=("euler", "midpoint"), help="solver of the sampler")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(arguments: argparse.Namespace) -> int:
    from ..data.audio import write_audio
    from ..data.latents import LatentGrid
    from ..data.mel import LogMel
    from ..training.config import override_config
    from ..training.environment import pick_device
    from ..training.inference import generate, load_backbone, text_batch
    from ..training.latents import load_decoder, write_latents
    from ..training.vocoder import build_vocoder

    folder = arguments.out.parent
    if arguments.out.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--out {arguments.out}: expected a file in an existing folder that can be written")
    device = pick_device(arguments.device, "--device")
    backbone, checkpoint = load_backbone(arguments.checkpoint, device)
    changes = {
        "flow.points": arguments.points,
        "flow.guidance": arguments.guidance,
        "flow.method": arguments.method,
    }
    config = override_config(checkpoint.config, overrides(changes))
    decode = None
    if arguments.decoder is not None:
        if not config.data.latents:
            raise UserError(f"--decoder: only for a run of latents; {arguments.checkpoint} models mels")
        # The checkpoint names a decoder, too. It is not imported, because the checkpoint may come from somebody else.
        decode = load_decoder(arguments.decoder, "--decoder")
    batch = text_batch(
        config,
        arguments.text,
        arguments.domain,
        arguments.seconds,
        arguments.reference,
        arguments.reference_text,
    )
    mel = generate(backbone, batch.to(device), config, arguments.seed)[0].cpu()
    if not mel.isfinite().all():
        raise UserError(
            f"{arguments.checkpoint}: what it generates is not finite: give a smaller --guidance, or the run diverged"
        )
    shown = int(batch.prompt.sum())
    if isinstance(config.grid, LatentGrid):
        mel = config.grid.denormalised(mel)
        file = arguments.out.with_suffix(".npy")
        write_latents(file, mel[shown:])
        print(f"{file}: latents {list(mel[shown:].shape)} float32 at {config.grid.frame_rate:g} a second")
        if decode is None:
            if config.latents.decoder:
                print(f"for audio, give --decoder {config.latents.decoder} if you trust it", file=sys.stderr)
            return 0
    else:
        decode = build_vocoder(config.train.vocoder, LogMel(config.mel))
    waveform = decode(mel)[config.grid.first_sample(shown) :]
    if waveform.numel() == 0 or not waveform.isfinite().all():
        raise UserError(f"{arguments.checkpoint}: the audio is not finite: give a smaller --guidance, or it diverged")
    out = arguments.out if not config.data.latents else arguments.out.with_suffix(".wav")
    write_audio(out, waveform, config.mel.sample_rate)
    print(f"{out}: {waveform.shape[0] / config.mel.sample_rate:.2f} s at {config.mel.sample_rate} Hz")
    return 0
