"""`values/` runs real kernels: under Triton's interpreter, or on a CUDA device where there is one.

The interpreter has to be chosen before the kernels are defined, for the whole process. So the plain test run starts
`values/` in a process of its own (test_interpreter.py) and does not collect it here, unless there is a device.
"""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["values"]
if importlib.util.find_spec("triton") is None:
    collect_ignore += ["values", "test_interpreter.py", "test_compile_matrix.py", "test_launch.py"]
elif INTERPRETED:
    # These compile and launch for real, or start this very process.
    collect_ignore += ["test_interpreter.py", "test_compile_matrix.py", "test_dispatch.py", "test_launch.py"]
