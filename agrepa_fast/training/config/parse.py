"""YAML text to plain values: dicts, lists, quoted text as str, and other scalars as `Plain`, which the field converts.

It differs from YAML 1.1 where that surprises: a date or `no` stays text where text is expected, and a key that occurs
twice is an error. Input that could exhaust the machine is refused: huge files, deep nesting, aliases of aliases.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...fields import Plain, shown

MOST_BYTES = 1 << 18
MOST_NODES = 20_000  # aliases count as often as they are used
DEEPEST = 20
_WORD = re.compile(r"[+-]?\.?\w[\w.+-]*", re.ASCII)  # one unquoted scalar in YAML, whatever stands around it


def read_text(path: Path) -> str:
    """The text of a small regular file.

    Raises:
        OSError: it cannot be read. UserError: not a file, too large, or not UTF-8.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # a null byte, or characters that no file name can hold
        raise UserError(f"{shown(str(path))}: not a file name") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: larger than {MOST_BYTES:,} bytes; is it a configuration?")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8") from None


def parse(text: str, source: str, *, is_file: bool = True) -> Any:
    """The value of a YAML text. Messages begin with `source`: a file, or a field on the command line.

    Raises:
        UserError: no YAML, a key that occurs twice, a tag, or more than is allowed; with the line of a file.
    """
    if not is_file and _WORD.fullmatch(text):  # most changes are one word or number, and need no PyYAML
        return Plain(text)
    import_yaml()
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves the type of unquoted scalars open."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    try:
        # Events are read without recursion, so that a nesting too deep for composing is found first.
        depth = 0
        for event in yaml.parse(text, Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                mark = event.start_mark if is_file else None
                raise UserError(f"{_at(source, mark)}: nested too deeply, at most {DEEPEST} levels are read")
        node = yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        if not is_file:
            raise UserError(f"{source}: {shown(text)} is not a YAML value ({problem})") from None
        raise UserError(f"{_at(source, getattr(error, 'problem_mark', None))}: not YAML ({problem})") from None
    return Plain("") if node is None else _Values(source, is_file).of(node)


class _Values:
    """The values of a tree of YAML nodes."""

    def __init__(self, source: str, is_file: bool) -> None:
        self.source, self.is_file = source, is_file
        self.nodes = 0

    def of(self, node: Any, depth: int = 0) -> Any:
        """The value of a node. Depth and number of nodes are limited, because an alias may hold itself."""
        self.nodes += 1
        if depth > DEEPEST:
            self.refuse(node, f"nested too deeply, at most {DEEPEST} levels are read")
        if self.nodes > MOST_NODES:
            self.refuse(node, f"too many values, at most {MOST_NODES:,} are read (aliases count each time)")
        kind = {"scalar": "str", "sequence": "seq", "mapping": "map"}[node.id]
        if node.tag != f"tag:yaml.org,2002:{kind}" and not (node.tag == "!" and node.id == "scalar"):
            self.refuse(node, f"the tag {shown(node.tag)} is not read; remove it")
        if node.id == "scalar":
            return Plain(node.value) if node.style is None and node.tag != "!" else node.value
        if node.id == "sequence":
            return [self.of(item, depth + 1) for item in node.value]
        return self._mapping(node, depth)

    def _mapping(self, node: Any, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.id != "scalar":
                self.refuse(key_node, "a key must be a name, not a list or a mapping")
            key = str(self.of(key_node, depth + 1))
            value = self.of(value_node, depth + 1)
            if key == "<<" and key_node.style is None:
                for item in value if isinstance(value, list) else [value]:
                    if not isinstance(item, dict):
                        self.refuse(value_node, "<< takes a mapping, or a list of mappings")
                    merged = item | merged  # the first of several mappings wins
                continue
            if key in values:
                self.refuse(key_node, f"the key {shown(key)} occurs twice; keep one")
            values[key] = value
        return merged | values

    def refuse(self, node: Any, problem: str) -> None:
        raise UserError(f"{_at(self.source, node.start_mark if self.is_file else None)}: {problem}")


def _at(source: str, mark: Any) -> str:
    return f"{source}:{mark.line + 1}" if mark is not None else source


def import_yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError("PyYAML is not installed: pip install 'agrepa-fast[train]'") from error
    return yaml
