"""Names that become parts of a run: folders, files, modules of the network."""

from __future__ import annotations

import re

from torch import nn

from ...fields import Allowed


def _names_a_module(name: str) -> bool:
    # A ModuleDict takes no name that is one of its own attributes, such as "keys" or "type".
    return re.fullmatch(r"\w[\w-]{0,63}", name) is not None and not hasattr(nn.ModuleDict(), name)


def _names_a_folder(name: str) -> bool:
    # File systems take names of up to 255 bytes; suffixes need some of them.
    whole = name == name.strip() and "/" not in name and "\\" not in name
    return whole and name not in (".", "..") and len(name.encode(errors="replace")) <= 200


MODULE_NAME = Allowed(
    "a name of at most 64 letters, digits, _ and - that is no attribute of torch's ModuleDict (such as keys or type)",
    _names_a_module,
)
MODULE = Allowed(
    "the dotted name of a Python module, such as package.module",
    lambda name: all(part.isidentifier() for part in name.split(".")),
)
FOLDER_NAME = Allowed("the name of one folder: no / or \\, no spaces around it, at most 200 bytes", _names_a_folder)
