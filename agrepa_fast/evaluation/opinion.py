"""Predicted opinion scores (MOS) of single clips: DNSMOS offline, or a function of the user's."""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .callables import is_function_name, load_function
from .metric import Metric, packages
from .recognisers import as_numpy
from .recordings import Recording, is_silent


class Dnsmos(Metric):
    """DNSMOS P.835 (signal, background, overall) and P.808 (Reddy et al., ICASSP 2021 and 2022), 1 to 5."""

    key = "mos/dnsmos"
    title = "Predicted opinion score (DNSMOS)"
    columns = {"overall": "higher", "signal": "higher", "background": "higher", "P.808": "higher"}  # noqa: RUF012
    spoken = True
    note = (
        "Trained on noisy telephone speech, 1 to 5. It hears 9.01 s: shorter clips are repeated, as its authors do. "
        "It is no substitute for listeners."
    )

    def __init__(self) -> None:
        from importlib.metadata import version

        with packages("mos", "the opinion score dnsmos"):
            import onnxruntime
            from speechmos import dnsmos
        folder = Path(dnsmos.__file__).parent / "dnsmos_models"
        files = [str(folder / name) for name in ("sig_bak_ovr.onnx", "model_v8.onnx")]
        self._score: Any = dnsmos.DNSMOS(*files)
        # The package's own sessions take every core and spin while they wait.
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._score.onnx_sess, self._score.p808_onnx_sess = (
            onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files
        )
        self.tool = f"speechmos {version('speechmos')}"

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        """[4]: overall, signal, background, P.808."""
        if is_silent(waveform):
            raise UserError("silent: DNSMOS is not defined")
        scores = self._score(as_numpy(waveform.clamp(-1, 1)), self.sample_rate, False)
        names = ("ovrl_mos", "sig_mos", "bak_mos", "p808_mos")
        return _finite(torch.tensor([float(scores[name]) for name in names], dtype=torch.float64), "DNSMOS")


class FunctionOpinion(Metric):
    """`module:function`: function(waveform [S] float32, sample_rate) -> a number, higher is better; of all domains."""

    def __init__(self, name: str) -> None:
        self._function = load_function(name, "--mos")
        self.key, self.title, self.tool = f"mos/{name}", f"Opinion score ({name})", name
        self.columns = {"score": "higher"}

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        """[1]."""
        score = self._function(as_numpy(waveform), self.sample_rate)
        if isinstance(score, Tensor) or hasattr(score, "item"):
            if getattr(score, "size", None) != 1 and not (isinstance(score, Tensor) and score.numel() == 1):
                raise UserError(f"{self.tool}: expected one number, got an array")
            score = score.item()
        if isinstance(score, bool) or not isinstance(score, Real):
            raise UserError(f"{self.tool}: expected a number, got {type(score).__name__}")
        return _finite(torch.tensor([float(score)], dtype=torch.float64), self.tool)


def _finite(scores: Tensor, name: str) -> Tensor:
    if not all(map(math.isfinite, scores.tolist())):
        raise UserError(f"{name} gives NaN or infinity")
    return scores


def build_opinion(name: str) -> Metric:
    """ "dnsmos" or module:function.

    Raises:
        MissingPackage: dnsmos without its package.
        UserError: no such function."""
    if name == "dnsmos":
        return Dnsmos()
    if is_function_name(name):
        return FunctionOpinion(name)
    raise UserError(f"--mos {name}: expected dnsmos, none, or module:function")
