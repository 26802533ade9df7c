"""docs/configuration.md, made from the fields of the sections: their types, what is allowed, defaults and meaning.

`python -m agrepa_fast.training.config.reference > docs/configuration.md` writes it.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Annotated, Any

from ...fields import Allowed, hints
from . import alignment, run

KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}

PAGE = """\
# Configuration

<!-- Written by `python -m agrepa_fast.training.config.reference > docs/configuration.md`. -->

All fields of a run. They are set in a YAML file (`section: {{field: value}}`) or on the command line
(`section.field=value`); the presets `demo`, `small`, `base` and `paper` change some of the defaults below.
[Training](training.md) says what happens in a run.

{sections}
"""


def page() -> str:
    """The text of docs/configuration.md."""
    sections = []
    for field in dataclasses.fields(run.RunConfig):
        sections.append(_section(hints(run.RunConfig)[field.name]))
        if field.name == "alignment":
            sections.append(_section(alignment.TeacherConfig, "alignment.teachers.NAME"))
    return PAGE.format(sections="\n\n".join(sections))


def _section(section: Any, name: str = "") -> str:
    lines = [f"## {name or section.section}", "", (section.__doc__ or "").partition("\n")[0], ""]
    lines += ["| field | value | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        hint = hints(section)[field.name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        cells = (f"`{field.name}`", _allowed(hint), f"`{_written(default)}`", _help(hint))
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines)


def _help(hint: Any) -> str:
    """The one line of help among the notes of a field."""
    notes = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    text = next((note for note in notes if isinstance(note, str)), "")
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


def _allowed(hint: Any) -> str:
    """What a field takes, in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, *notes = options
        conditions = [note.says for note in notes if isinstance(note, Allowed)]
        # A condition on text, or one that says what null is, stands for the type too.
        enough = conditions and (base is str or "null" in conditions[0])
        return ", ".join(conditions if enough else [_allowed(base), *conditions])
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if option is types.NoneType else _allowed(option) for option in options)
    if origin is tuple:
        count = "" if options[-1] is Ellipsis else f"{len(options)} "
        return f"list of {count}({_allowed(options[0])})"
    if origin is dict:
        return f"{{name: {_allowed(options[1])}}}"
    return KINDS.get(hint, "fields of its own, see below")


def _written(value: Any) -> str:
    """A default as a user writes it."""
    if dataclasses.is_dataclass(value):
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _written({name: item for name, item in entries.items() if item})
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    print(page(), end="")
