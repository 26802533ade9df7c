"""Result files: one JSON object for each run, checked against schema.json when written and when read.

A run rewrites its file after each problem, so a run that is cut short leaves its results (`complete` is then false).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agrepa_fast.errors import UserError

SCHEMA = Path(__file__).with_name("schema.json")

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def validate(value: Any, schema: Mapping[str, Any] | None = None) -> None:
    """Check a result against schema.json.

    Raises:
        UserError: names the place in the file and what was expected there.
    """
    root = json.loads(SCHEMA.read_text(encoding="utf-8")) if schema is None else schema
    _validate(value, root, root, "result")


def _validate(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> None:
    """The part of JSON Schema 2020-12 that schema.json uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "const" in schema and value != schema["const"]:
        raise UserError(f"{where}: expected {schema['const']!r}, got {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise UserError(f"{where}: expected one of {schema['enum']}, got {value!r}")
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is(value, name) for name in names):
            raise UserError(f"{where}: expected {' or '.join(names)}, got {value!r:.80}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{where}: expected a finite number, got {value!r}")
        if value < schema.get("minimum", value) or value <= schema.get("exclusiveMinimum", value - 1):
            raise UserError(f"{where}: {value!r} is too small")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise UserError(f"{where}: {name!r} is missing")
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        for name, item in value.items():
            if name in known:
                _validate(item, known[name], root, f"{where}.{name}")
            elif others is False:
                raise UserError(f"{where}: unknown key {name!r}")
            elif isinstance(others, Mapping):
                _validate(item, others, root, f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            _validate(item, schema["items"], root, f"{where}[{i}]")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Validate and write a result, so that the file is never there in part."""
    validate(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: str | Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        UserError: the file cannot be read or is no result; names the file and the place.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    try:
        validate(result)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return result
