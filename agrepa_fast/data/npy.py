"""Read a .npy array out of a file or a pack."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError


def read_npy(path: Path, file: BinaryIO, size: int, check: Callable[[np.dtype, tuple[int, ...]], None]) -> np.ndarray:
    """The array of a .npy file of `size` bytes.

    Its header is checked against its size before memory is taken. `check` may refuse the dtype and shape.

    Raises:
        UserError: the header does not fit the size. NumPy's errors (ValueError, EOFError): it is not a .npy file.
    """
    version = np.lib.format.read_magic(file)
    # Version 3 exists for field names, which plain numbers do not have.
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    check(dtype, shape)
    size -= file.tell()
    if size != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise UserError(
            f"{path}: its header claims {list(shape)} of {dtype}, which does not fit the {size} bytes after it: "
            "the file is damaged, write it again"
        )
    return np.frombuffer(file.read(size), dtype).reshape(shape, order="F" if fortran else "C")
