"""Teachers from transformers: Whisper, wav2vec 2.0 and its kin (HuBERT, WavLM, MERT, ...), AST and CLAP.

Audio [B, n] -> one hidden state [B, T', width]. T' counts the frames that carry audio.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .base import LayeredTeacher, torch_dtype

# Encoders that read the waveform through strided convolutions, and share Wav2Vec2FeatureExtractor.
WAVEFORM = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio")
# Those of them that obey an attention mask everywhere if their feature encoder has no group norm.
# (data2vec-audio normalises between its stacked positional convolutions, which reads the padding.)
MASKED = ("wav2vec2", "hubert", "wavlm")
CLAP = ("clap", "clap_audio_model")
SUPPORTED = ("whisper", "audio-spectrogram-transformer", *WAVEFORM, *CLAP)


class TransformersTeacher(LayeredTeacher):
    """A frozen audio encoder of the transformers library.

    - Whisper gets the window it was trained on (30 s, padded with silence). The ceil(n / 320) frames with audio are
      returned, at 50 Hz.
    - wav2vec 2.0, HuBERT and WavLM give floor((n - 400) / 320) + 1 frames at 50 Hz; a clip too short for one frame gets
      none.
      Frame i is centred 2.5 ms after (i + 0.5) / rate. Encoders whose group norm would include the padding, and
      relatives that cannot mask it, run one clip at a time.
    - AST's class and distillation tokens are dropped, and its patches averaged over frequency: one frame per
      `time_stride` of 10 ms (10 Hz as published), in a window of `max_length` of 10 ms. Patches overlap; a frame is
      centred 37.5 ms after (i + 0.5) / rate.
    - MERT, if HuBERT's classes can load its configuration (the 95M one), counts as HuBERT, at 24 kHz and 75 Hz.
    - CLAP's audio tower: its last grid is averaged over frequency, 3.2 Hz. A clip shorter than its window of 10 s is
      repeated to fill it, as in its training. It has no `layer`.

    Preprocessing is the model's own, from `preprocessor_config.json` beside the weights. If that is missing, or for a
    model object, it is the library's default for the architecture.

    Args:
        model: a folder, a hub name, or a built model (its head or decoder is left out). A built model is frozen in
            place.
        layer: index into `hidden_states`: 0 is the input of the first block, k the output of block k - 1; negative ones
            count from the end. None: the encoder's final output, after its last norm.
        revision: branch, tag or commit on the hub; only with a hub name.
        dtype: "float32", "bfloat16", "float16" or a torch dtype for the encoder. None: float32, or the dtype of a built
            model.
            Features are float32 in any case.

    Raises:
        UserError: transformers is not installed; nothing can be loaded at `model`; the weights are pickled or do not
            fill the encoder; the architecture is not supported; or there is no such layer or dtype.
    """

    def __init__(
        self,
        model: Any,
        *,
        layer: int | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        if isinstance(dtype, str):
            dtype = torch_dtype(dtype)
        if revision is not None and (not isinstance(model, str) or Path(model).is_dir()):
            raise UserError(f"teacher revision {revision!r}: only a model named on the hub has revisions")
        source: str | None = None
        if isinstance(model, (str, Path)):
            source = str(model)
            model = _load(source, revision, dtype or torch.float32)
        name = source or type(model).__name__
        config = model.config
        _check_architecture(name, config)
        model = model.base_model
        if config.model_type == "whisper":
            model = getattr(model, "encoder", model)
        if config.model_type in CLAP:
            model = getattr(model, "audio_model", model)
            config = model.config
            if layer is not None:
                raise UserError(f"teacher {name!r}: CLAP's hidden states differ in their grids: leave layer out")
        extractor = _extractor(source, revision, config)
        stride = _stride(config, extractor)
        width = config.d_model if config.model_type == "whisper" else config.hidden_size
        rate = extractor.sampling_rate
        super().__init__(
            name,
            layers=config.num_hidden_layers,
            layer=layer,
            width=width,
            rate=rate / stride,
            sample_rate=rate,
            longest=_longest(config, extractor),
        )
        self.stride = stride
        self.extractor = extractor
        self.model = model if dtype is None else model.to(dtype)
        self.freeze()

    def encode_states(self, audio: Tensor, lengths: Tensor, layers: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """See `LayeredTeacher`. UserError for a clip longer than the window of Whisper or AST."""
        counts = lengths.tolist()
        clips = [clip[:count].cpu().numpy() for clip, count in zip(audio, counts)]
        kind = self.model.config.model_type
        if kind == "whisper":
            return self._whisper(clips, audio.device, layers)
        if kind == "audio-spectrogram-transformer":
            return self._ast(clips, audio.device, layers)
        if kind in CLAP:
            return self._clap(clips, audio.device, layers)
        return self._waveform(clips, audio.device, layers)

    def _hidden(self, inputs: Tensor, layers: Sequence[int | None], **masks: Tensor) -> Tensor:
        """Hidden states beside each other, [B, N, layers * width], for the encoder's own input."""
        inputs = inputs.to(next(self.model.parameters()).dtype)
        if all(layer is None for layer in layers):
            last = self.model(inputs, **masks).last_hidden_state
            return torch.cat([last] * len(layers), -1)
        output = self.model(inputs, output_hidden_states=True, **masks)
        states = [output.last_hidden_state if layer is None else output.hidden_states[layer] for layer in layers]
        return torch.cat(states, -1)

    def _whisper(self, clips: list, device: torch.device, layers: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        self._refuse_longer(clips)
        window = self.model.config.max_source_positions * self.stride
        inputs = self.extractor(
            clips,
            sampling_rate=self.sample_rate,
            max_length=window,
            return_tensors="pt",
            device=str(device),
        )
        return self._carrying_audio(
            self._hidden(inputs.input_features.to(device), layers), [-(-len(clip) // self.stride) for clip in clips]
        )

    def _ast(self, clips: list, device: torch.device, layers: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        config = self.model.config
        # Kaldi filter banks: whole windows of 25 ms only, every 10 ms.
        hop, span = self.sample_rate // 100, self.sample_rate // 40
        self._refuse_longer(clips)
        banks = [max(0, (len(clip) - span) // hop + 1) for clip in clips]
        silence = torch.zeros(span).numpy()
        inputs = self.extractor(
            [clip if bank else silence for clip, bank in zip(clips, banks)],
            sampling_rate=self.sample_rate,
            return_tensors="pt",
        )
        tokens = self._hidden(inputs.input_values.to(device), layers)
        bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        patches = tokens[:, 2:]  # after the class and the distillation token
        grid = patches.unflatten(1, (bands, patches.shape[1] // bands))
        return self._carrying_audio(grid.float().mean(1), [-(-bank // config.time_stride) for bank in banks])

    def _clap(self, clips: list, device: torch.device, layers: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        self._refuse_longer(clips)
        silence = torch.zeros(self.sample_rate // 10).numpy()
        # A shorter clip is repeated until it fills the window, as in training.
        inputs = self.extractor(
            [clip if len(clip) else silence for clip in clips],
            sampling_rate=self.sample_rate,
            padding="repeatpad",
            truncation="fusion" if self.model.config.enable_fusion else "rand_trunc",
            return_tensors="pt",
        )
        mels = inputs.input_features.to(device, next(self.model.parameters()).dtype)
        # No clip is longer than the window; the extractor calls a random one so.
        longer = (
            torch.zeros(len(clips), 1, dtype=torch.bool, device=device) if self.model.config.enable_fusion else None
        )
        grid = self.model(input_features=mels, is_longer=longer).last_hidden_state  # [B, width, bands, T']
        frames = grid.float().mean(2).transpose(1, 2)
        return self._carrying_audio(frames.repeat(1, 1, len(layers)), [-(-len(clip) // self.stride) for clip in clips])

    def _waveform(self, clips: list, device: torch.device, layers: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        config = self.model.config
        counts = [self._frames(len(clip)) for clip in clips]
        frames = max(1, *counts)
        features = torch.zeros(len(clips), frames, len(layers) * self.width, device=device)
        carrying = [index for index, count in enumerate(counts) if count > 0]
        batched = (
            config.model_type in MASKED
            and config.feat_extract_norm != "group"
            and not getattr(config, "conv_pos_batch_norm", False)
        )
        for group in [carrying] if batched and carrying else [[index] for index in carrying]:
            inputs = self.extractor(
                [clips[index] for index in group],
                sampling_rate=self.sample_rate,
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            masks = {"attention_mask": inputs.attention_mask.to(device)} if batched else {}
            hidden = self._hidden(inputs.input_values.to(device), layers, **masks).float()
            features[group, : hidden.shape[1]] = hidden
        return self._carrying_audio(features, counts)

    def _frames(self, samples: int) -> int:
        """Number of frames of the convolutional feature encoder; 0 for a clip shorter than its receptive field."""
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples

    def _carrying_audio(self, features: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Cut [B, T, W] to the largest count, and mark each sample's own frames."""
        frames = min(features.shape[1], max(1, *counts))
        index = torch.arange(frames, device=features.device)
        return features[:, :frames], index < torch.tensor(counts, device=features.device).unsqueeze(1)

    def _refuse_longer(self, clips: list) -> None:
        longest = max(len(clip) for clip in clips)
        if self.longest is not None and longest > round(self.longest * self.sample_rate):
            raise UserError(
                f"teacher {self.name!r} hears at most {self.longest:g} s, a clip has "
                f"{longest / self.sample_rate:g} s: crop the clips or choose another teacher"
            )


def without_weights(source: str | Path, *, revision: Any = None, **options: Any) -> TransformersTeacher:
    """The teacher of a folder or a hub name on the meta device: its sizes, from its configuration alone.

    Raises:
        UserError: as `TransformersTeacher`, as far as it shows without weights.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise UserError(f"teacher {str(source)!r} needs transformers: pip install 'agrepa-fast[teachers]'") from error
    try:
        config = _mert_config(Path(source)) or AutoConfig.from_pretrained(source, revision=revision)
        _check_architecture(str(source), config)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"teacher {str(source)!r}: its configuration cannot be read ({reason})") from error
    return TransformersTeacher(model, **options)


def _check_architecture(name: str, config: Any) -> None:
    if config.model_type not in SUPPORTED:
        raise UserError(
            f"teacher {name!r}: architecture {config.model_type!r} is not supported "
            f"({', '.join(SUPPORTED)}); wrap it in a Teacher of your own and call register_teacher"
        )
    if getattr(config, "add_adapter", False):
        raise UserError(
            f"teacher {name!r} has a convolutional adapter (add_adapter), which changes the frame rate; "
            "give the model without it"
        )


def _load(source: str, revision: str | None, dtype: torch.dtype) -> Any:
    """The model in a folder or on the hub, from safetensors, with every weight of the encoder filled."""
    try:
        from transformers import AutoConfig, AutoModel, HubertModel
    except ImportError as error:
        raise UserError(f"teacher {source!r} needs transformers: pip install 'agrepa-fast[teachers]'") from error
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"teacher {source!r}: the folder has no config.json")
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"teacher {source!r}: no *.safetensors in the folder; pickled weights (.bin) can run code "
                "and are not read: convert them with model.save_pretrained(folder, safe_serialization=True)"
            )
    try:
        config = _mert_config(folder) or AutoConfig.from_pretrained(source, revision=revision)
        _check_architecture(source, config)
        kind: Any = HubertModel if config.model_type == "hubert" else AutoModel
        model, report = kind.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"teacher {source!r} cannot be loaded ({reason}); without a network, "
            "download the model elsewhere and give the path of its folder"
        ) from error
    # transformers fills missing weights with random numbers. The masking vector is used only in training.
    lacking = [key for key in report["missing_keys"] if key != "masked_spec_embed" and "decoder." not in key]
    if lacking:
        raise UserError(
            f"teacher {source!r}: the file lacks {len(lacking)} weights of the encoder, {sorted(lacking)[0]!r} first"
        )
    return model


def _mert_config(folder: Path) -> Any:
    """HuBERT's configuration for a folder of MERT, None for other models.

    MERT comes with code of its own, which is not run: without the options below its network is HuBERT's.
    """
    from transformers import HubertConfig

    try:
        facts = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # AutoConfig says what is wrong
    if not isinstance(facts, dict) or facts.get("model_type") != "mert_model":
        return None
    wanted = {"feature_extractor_cqt": False, "deepnorm": False, "attention_relax": -1.0}
    for option, value in wanted.items():
        if facts.get(option, value) != value:
            raise UserError(f"teacher {str(folder)!r}: MERT with {option} {facts[option]!r} needs code that is not run")
    rest = {name: value for name, value in facts.items() if name not in ("model_type", "architectures", "auto_map")}
    return HubertConfig.from_dict(rest)


def _extractor(source: str | None, revision: str | None, config: Any) -> Any:
    """The model's feature extractor, or the defaults of its architecture."""
    from transformers import (
        ASTFeatureExtractor,
        AutoFeatureExtractor,
        ClapFeatureExtractor,
        Wav2Vec2FeatureExtractor,
        WhisperFeatureExtractor,
    )

    if source is not None:
        try:
            return AutoFeatureExtractor.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            if (Path(source) / "preprocessor_config.json").is_file():
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"teacher {source!r}: preprocessor_config.json is unusable ({reason})") from error
            warnings.warn(
                f"teacher {source!r} has no preprocessor_config.json: using the defaults of {config.model_type}",
                stacklevel=3,
            )
    if config.model_type == "whisper":
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    if config.model_type == "audio-spectrogram-transformer":
        return ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    if config.model_type in CLAP:
        return ClapFeatureExtractor()
    return Wav2Vec2FeatureExtractor()


def _stride(config: Any, extractor: Any) -> int:
    """Samples from one feature frame to the next."""
    if config.model_type == "whisper":
        return 2 * extractor.hop_length  # the second convolution has stride 2
    if config.model_type == "audio-spectrogram-transformer":
        return extractor.sampling_rate // 100 * config.time_stride
    if config.model_type in CLAP:
        # The window's mel is laid out as a square of spec_size in rows, 4 of them for 64 bands; each stage halves it.
        rows = config.spec_size // config.num_mel_bins
        frames = rows * config.spec_size // config.patch_stride[1] // 2 ** (len(config.depths) - 1)
        return extractor.max_length_s * extractor.sampling_rate // frames
    stride = 1
    for step in config.conv_stride:
        stride *= step
    return stride


def _longest(config: Any, extractor: Any) -> float | None:
    """Seconds of the longest clip that the model takes."""
    rate = extractor.sampling_rate
    if config.model_type == "whisper":
        return config.max_source_positions * _stride(config, extractor) / rate
    if config.model_type == "audio-spectrogram-transformer":
        return ((config.max_length - 1) * (rate // 100) + rate // 40) / rate
    return float(extractor.max_length_s) if config.model_type in CLAP else None
