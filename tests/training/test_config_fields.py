"""Every field of the configuration: refuses what it cannot use in one line that names it, and keeps what it takes."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agrepa_fast.errors import UserError
from agrepa_fast.fields import AT_LEAST_ONE, Allowed, Section, between, hints
from agrepa_fast.training.config import RunConfig, TeacherConfig, dump_config, load_config, override_config, reference

BASE = load_config("demo", ["train.name=x"])
SECTIONS: list[type[Section]] = [type(getattr(BASE, field.name)) for field in dataclasses.fields(RunConfig)]
FIELDS = [
    (section, field.name)
    for section in [*SECTIONS, TeacherConfig]
    for field in dataclasses.fields(section)  # type: ignore[arg-type]
]
NAMES = [f"{section.section}.{name}" for section, name in FIELDS if section is not TeacherConfig]


def leaves(hint: Any) -> list[tuple[type, list[Allowed]]]:
    """The plain types in a hint, with what the values of each may be."""
    if typing.get_origin(hint) is Annotated:
        inner, *notes = typing.get_args(hint)
        allowed = [note for note in notes if isinstance(note, Allowed)]
        found = leaves(inner)
        return [(found[0][0], found[0][1] + allowed)] if len(found) == 1 and inner is found[0][0] else found
    arguments = [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
    return [leaf for a in arguments for leaf in leaves(a)] if arguments else [(hint, [])]


def wrong_values(hint: Any) -> list[Any]:
    """Values of a field's own type that no field may take; of a bool another type."""
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if origin is tuple:
        size = 1 if arguments[-1] is Ellipsis else len(arguments)
        return [(wrong,) * size for wrong in wrong_values(arguments[0])]
    if origin is dict:
        # No name is good for every mapping: the value is what is wrong.
        return [{"spectral": wrong} for wrong in wrong_values(arguments[1])] + [{"\0": wrong_values(arguments[1])[0]}]
    if type(None) in arguments:
        return [wrong for a in arguments if a is not type(None) for wrong in wrong_values(a)]
    if arguments:
        return [{}, math.nan]
    wrong: dict[type, list[Any]] = {
        bool: [2, "perhaps"],
        int: [-(10**12), 10**12],
        float: [math.nan, math.inf, -math.inf, -1e300, 1e300],
        str: ["\0", "a\nb", "a\u2028b", "\ud800", "x" * 5000],
    }
    return wrong.get(bare, [3, {"no_such_field": 1}])


@pytest.mark.parametrize("section, name", FIELDS, ids=lambda value: getattr(value, "section", value))
def test_no_field_takes_a_wrong_value(section, name):
    """In Python, when the section is made: the same checks as from a file."""
    for wrong in wrong_values(hints(section)[name]):
        with pytest.raises(UserError, match=re.escape(f"{section.section}.{name}")) as caught:
            section(**{name: wrong})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section, name", FIELDS, ids=lambda value: getattr(value, "section", value))
def test_every_field_has_a_range_and_a_line_of_help(section, name):
    hint = hints(section)[name]
    if hint != dict[str, TeacherConfig]:
        assert [note for note in typing.get_args(hint)[1:] if isinstance(note, str)], "one line of help"
    for kind, allowed in leaves(hint):
        # An int has a range. A float may be left finite where an option of a teacher is meant; text is always bounded.
        assert kind is not int or allowed or name == "options"


RANDOM = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(-2, 70)
    | st.floats()
    | st.floats(0, 1)
    | st.text(max_size=8)
    | st.sampled_from(
        ["", " ", ".", "..", "a/b", "no", "2024-12-13", "2024-13-45", "1e5", "0x1f", "null", "é", "x" * 9000]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def fitting(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field is likely to take: of its type, and within its range where that is known."""
    options: list[Allowed] = []
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        options = [note for note in notes if isinstance(note, Allowed)]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(fitting(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(fitting, arguments)).map(list)
    if origin is dict:
        names = st.sampled_from(["spectral", "speech", "text", "layer", "a"])
        return st.dictionaries(names, fitting(arguments[1]), max_size=2)
    if arguments:
        return st.one_of(
            [st.none() if a is type(None) else fitting(Annotated[a, *options] if options else a) for a in arguments]
        )
    if dataclasses.is_dataclass(hint):
        inner = hints(hint)
        return st.fixed_dictionaries({}, optional={name: fitting(each) for name, each in inner.items()})
    choices = [says.split(", ") for says in (o.says.removeprefix("one of ") for o in options if o.says[:6] == "one of")]
    plain: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(1, 64) | st.sampled_from([0, 256, 1000, 65_536, 10**6, 10**9]),
        float: st.floats(0, 1) | st.floats(0, 1e6) | st.sampled_from([-1.0, 1e-300, 1e30]),
        str: st.text(max_size=12) | st.sampled_from(["speech", "cpu", "cuda:1"]),
    }
    return st.sampled_from(choices[0]) if choices else plain[hint]


def holds(change: str, config: RunConfig) -> None:
    """A configuration that was accepted can be written, read back, and gives the sizes of everything."""
    text = dump_config(config)
    again = override_config(RunConfig(**yaml_values(text)), [])
    assert again == config, change
    assert config.dit.width == config.model.width
    assert config.bucket_frames[-1] == config.max_frames <= 16_384
    assert config.mel.minimum_samples <= config.mel.samples(config.max_frames)


def yaml_values(text: str) -> dict[str, Any]:
    from agrepa_fast.training.config.parse import parse

    return parse(text, "config.yaml")


def refused_or_held(name: str, make: Any) -> None:
    try:
        config = make()
    except UserError as error:
        message = str(error)
        assert name in message, message
        assert "\n" not in message
        assert len(message) < 500
        return
    holds(name, config)


@settings(max_examples=700, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_value_is_refused_by_name_or_held(data):
    """In Python, and as YAML on the command line."""
    section, name = data.draw(st.sampled_from([pair for pair in FIELDS if pair[0] is not TeacherConfig]))
    value = data.draw(fitting(hints(section)[name]) | RANDOM)
    full = f"{section.section}.{name}"

    def in_python() -> RunConfig:
        changed = dataclasses.replace(getattr(BASE, section.section), **{name: value})
        return dataclasses.replace(BASE, **{section.section: changed})

    refused_or_held(full, in_python)
    written = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=False).removesuffix("...\n")
    refused_or_held(full, lambda: override_config(BASE, [f"{full}={written}"]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(NAMES), st.text(max_size=12) | st.text("[]{}:,&*!<#'\"- \n\t01e.%@`|>?~", max_size=16))
def test_any_text_is_refused_by_name_or_held(name, text):
    refused_or_held(name, lambda: override_config(BASE, [f"{name}={text}"]))


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "-" + "9" * 5000,
        "[" * 3000,
        "{a: " * 500,
        "[" * 30 + "]" * 30,
        "&a [*a]",
        "&a {<<: *a}",
        "!!int 3",
        "*x",
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("name", ["train.steps", "optimizer.lr", "data.train", "alignment.teachers"])
def test_text_that_could_exhaust_the_machine_is_refused(name, text):
    with pytest.raises(UserError, match=f"^{name}") as caught:
        override_config(BASE, [f"{name}={text}"])
    assert len(str(caught.value)) < 400


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=30) | st.text("trainmodel.=[]{}: 3", max_size=20))
def test_any_change_is_refused_in_one_line_or_held(change):
    refused_or_held("", lambda: override_config(BASE, [change]))


def test_the_documented_fields_are_the_fields():
    text = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == reference.page(), "run: python -m agrepa_fast.training.config.reference > docs/configuration.md"


def test_the_words_of_a_type():
    """As a reader of docs/configuration.md sees them."""
    hint = Annotated[tuple[Annotated[float, between(0, 1)], ...], AT_LEAST_ONE, "help | of docs/data.md"]
    assert reference._allowed(hint) == "list of (number, at least 0, at most 1), at least one"
    assert reference._help(hint) == "help | of [data.md](data.md)"
    assert reference._allowed(dict[str, int] | None) == "{name: whole number} or null"
    assert reference._written({"a": (None, True, 0.5, "")}) == '{a: [null, true, 0.5, ""]}'
