"""Run by `make newest` in an environment that holds the installed wheel and its base dependencies alone.

The newest torch and Triton that pip finds: the package imports away from the checkout, scores layers, and every
kernel compiles.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def main() -> None:
    import torch
    import triton

    import agrepa_fast as ag
    from agrepa_fast.kernels import compile_matrix

    assert Path(ag.__file__).parent != CHECKOUT / "agrepa_fast", "the checkout was imported, not the installed wheel"
    installed = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    extras = installed & {"torchaudio", "soundfile", "transformers", "safetensors", "pyyaml", "matplotlib", "tqdm"}
    assert not extras, f"not a base installation: {sorted(extras)}"

    torch.manual_seed(0)
    model = ag.DiT(ag.DiTConfig(depth=3, width=16, heads=2, mels=4, cond=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = {"x_t": torch.randn(2, 5, 4), "t": torch.rand(2)}
    scores, checked = (ag.attribute_layers(model, inputs, engine=engine) for engine in ("auto", "loop"))
    torch.testing.assert_close(scores.by_sample, checked.by_sample, rtol=1e-5, atol=0)

    # Every kernel and direction in one norm: what a newer compiler refuses, it refuses in any of them.
    some = [c for c in compile_matrix.cases() if c.width in (1024, compile_matrix.SPILL_FREE) and c.norm != "rms"]
    rows = compile_matrix.matrix(some, targets=["sm90"])
    kernels = {row.kernel for row in rows}
    spilled = [row for row in rows if row.spills and row.case.width <= 4096]
    assert not spilled, spilled
    print(
        f"agrepa-fast {ag.__version__} with torch {torch.__version__}, Triton {triton.__version__}: "
        f"{len(kernels)} kernels compiled in {len(rows)} forms for sm90"
    )


if __name__ == "__main__":
    # Neither the checkout's root nor this folder may be on the path; the environment may lie inside the checkout.
    own = {CHECKOUT, Path(__file__).resolve().parent}
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in own]
    main()
