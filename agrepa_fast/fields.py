"""Configuration sections: dataclasses whose fields say what they accept, and check it when one is made.

    @dataclass(frozen=True)
    class OptimizerConfig(Section, name="optimizer"):
        lr: Annotated[float, more_than(0), "peak of the learning rate"] = 1e-4

`Annotated` holds the type, what is allowed, and one line of help. It may be inside a tuple or a dict:
`tuple[Annotated[float, between(0, 1)], ...]`. Every error is a `UserError` that begins with `section.field`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import re
import reprlib
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from .errors import UserError

SHOWN = 80  # longest quotation of a value or a name in a message
LONGEST_TEXT = 4096
UNFIT = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line and paragraph separators
MOST_ITEMS = 10_000
NULL = ("", "~", "null", "Null", "NULL")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WHOLE = re.compile(r"[-+]?([0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+)", re.ASCII)
DECIMAL = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


class Plain(str):
    """An unquoted YAML scalar. The field that receives it decides whether it is text, a number or a boolean."""

    def __repr__(self) -> str:
        """Text in quotes, anything else as the user wrote it."""
        return repr(str(self)) if isinstance(typed(self), str) else str(self) or "null"


@dataclass(frozen=True)
class Allowed:
    """A condition on a value, and its description, which follows "expected" in a message."""

    says: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Allowed:
    """Both ends included."""
    return Allowed(f"at least {low:,}, at most {high:,}", lambda value: low <= value <= high)


def inside(low: float, high: float) -> Allowed:
    """Both ends excluded."""
    return Allowed(f"more than {low:g} and less than {high:g}", lambda value: low < value < high)


def from_below(low: float, high: float) -> Allowed:
    """The lower end included, the upper one excluded."""
    return Allowed(f"at least {low:g} and less than {high:g}", lambda value: low <= value < high)


def more_than(low: float, at_most: float) -> Allowed:
    """The lower end excluded, the upper one included."""
    return Allowed(f"more than {low:g} and at most {at_most:g}", lambda value: low < value <= at_most)


def one_of(choices: Iterable[str]) -> Allowed:
    known = tuple(choices)
    return Allowed("one of " + ", ".join(known), lambda value: value in known)


def matching(pattern: str, says: str) -> Allowed:
    """Text that a regular expression matches from end to end."""
    return Allowed(says, lambda value: re.fullmatch(pattern, value) is not None)


NOT_EMPTY = Allowed("text that is not empty", lambda value: bool(value.strip()))
AT_LEAST_ONE = Allowed("at least one", lambda value: len(value) > 0)
DISTINCT = Allowed("distinct values", lambda value: len(set(value)) == len(value))


class Section:
    """Base class of the configuration's dataclasses. Every field is converted to its type and checked.

    A subclass gives its `name`, with which its messages begin, and may override `check` for conditions on several
    fields.
    """

    section: ClassVar[str]

    def __init_subclass__(cls, name: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.section = name

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():  # type: ignore[arg-type]
            value = convert(getattr(self, name), hint, join(self.section, name))
            object.__setattr__(self, name, value)  # a list becomes a tuple, an int in a float field a float
        self.check()

    def check(self) -> None:
        """Check the fields against each other.

        Raises:
            UserError: names the fields, what is expected and the values.
        """


@functools.cache
def hints(section: Any) -> dict[str, Any]:
    """{field: its type with annotations}."""
    known = typing.get_type_hints(section, include_extras=True)
    return {field.name: known[field.name] for field in dataclasses.fields(section)}


def build(section: Any, values: Mapping[str, Any], path: str) -> Any:
    """Make a section from plain values: mappings, sequences, numbers, text. Messages begin with `path`.

    Raises:
        UserError: an unknown field, or a value that does not fit.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'configuration'}: expected fields of {section.__name__}, got {shown(values)}")
    converted = {}
    for name, value in values.items():
        place = join(path, name)
        if name not in hints(section):
            raise UserError(f"{place}: {unknown(name, hints(section))}")
        converted[name] = convert(value, hints(section)[name], place)
    return section(**converted)


def convert(value: Any, hint: Any, path: str) -> Any:
    """Convert `value` to the type `hint` and check its conditions.

    Raises:
        UserError: begins with `path`; says what was expected and what was given.
    """
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        value = convert(value, hint, path)
        for allowed in notes:
            # The type decides about None; the conditions are for other values.
            if isinstance(allowed, Allowed) and value is not None and not allowed.holds(value):
                raise UserError(f"{path}: expected {allowed.says}, got {shown(value)}")
        return value
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _one_of_types(value, options, path)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else build(hint, value, path)
    if origin is tuple:
        return _tuple(value, options, path)
    if origin is dict:
        if not isinstance(value, Mapping) or len(value) > MOST_ITEMS:
            raise UserError(f"{path}: expected {{name: value}}, got {shown(value)}")
        return {
            convert(key, options[0], path): convert(item, options[1], join(path, key)) for key, item in value.items()
        }
    return _scalar(value, hint, path)


def _one_of_types(value: Any, options: tuple[Any, ...], path: str) -> Any:
    others = [option for option in options if option is not types.NoneType]
    if len(others) < len(options) and (value is None or (isinstance(value, Plain) and value in NULL)):
        return None
    if len(others) == 1:
        return convert(value, others[0], path)
    value = typed(value) if isinstance(value, Plain) else value
    for option in others:
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return _scalar(value, option, path)
    raise UserError(f"{path}: expected {' or '.join(option.__name__ for option in others)}, got {shown(value)}")


def _tuple(value: Any, kinds: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if isinstance(value, Mapping):
        raise UserError(f"{path}: expected a list, got {shown(value)}")
    items = list(value) if isinstance(value, list | tuple) else [value]
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise UserError(f"{path}: expected {len(kinds)} values, got {shown(value)}")
    if len(items) > MOST_ITEMS:
        raise UserError(f"{path}: expected at most {MOST_ITEMS:,} values, got {len(items):,}")
    return tuple(convert(item, kind, path) for item, kind in zip(items, kinds))


def _scalar(value: Any, hint: type, path: str) -> Any:
    """A bool, int, float or str. Numbers of NumPy become Python's, so that YAML can hold them."""
    plain = isinstance(value, Plain)
    if hint is bool:
        if isinstance(value, bool):
            return value
        if plain and value.lower() in TRUTH:
            return TRUTH[value.lower()]
    elif hint is int:
        if plain and WHOLE.fullmatch(value) and len(value) < 100:
            return int(value, 16 if "x" in value else 10)
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif hint is float:
        number = _number(value, path) if not isinstance(value, bool) else None
        if number is not None:
            if not math.isfinite(number):
                raise UserError(f"{path}: expected a finite number, got {shown(value)}")
            return number
    elif hint is str and isinstance(value, str):
        if plain and value in NULL:
            raise UserError(f"{path}: expected str, got null (write '' for empty text)")
        if len(value) > LONGEST_TEXT or any(unicodedata.category(letter) in UNFIT for letter in value):
            limit = f"at most {LONGEST_TEXT:,} characters, none of them a control character"
            raise UserError(f"{path}: expected {limit}, got {shown(value)}")
        return str(value)
    raise UserError(f"{path}: expected {hint.__name__}, got {shown(value)}")


def _number(value: Any, path: str) -> float | None:
    if isinstance(value, Plain):
        return float(value.replace(".inf", "inf").replace(".nan", "nan")) if DECIMAL.fullmatch(value) else None
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path}: expected a finite number, got {shown(value)}") from None
    return None


def typed(value: Plain) -> Any:
    """An unquoted scalar as YAML reads it if no type is expected: null, bool, int, float or text."""
    if value in NULL:
        return None
    if value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return TRUTH[value.lower()]
    if WHOLE.fullmatch(value):
        return _scalar(value, int, "a number") if len(value) < 100 else float("inf")
    number = _number(value, "")
    return str(value) if number is None else number


def join(path: str, name: object) -> str:
    """`section.field`; a name that would break the line is quoted."""
    text = str(name) if isinstance(name, str) and name.isprintable() and len(name) <= SHOWN else shown(name)
    return f"{path}.{text}" if path else text


def shown(value: object) -> str:
    """A value on one line, shortened; a tuple is shown as a list, as users write it."""
    value = list(value) if type(value) is tuple else value
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 10**SHOWN:
        return f"an integer of {int(value).bit_length():,} bits"  # Python refuses to print thousands of digits
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    try:
        text = short.repr(value)
    except Exception:  # whatever an object's own repr raises
        text = f"a {type(value).__name__}"
    text = text.replace("\n", " ")
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def unknown(name: object, known: Iterable[str]) -> str:
    """The message about an unknown name, with the nearest known one."""
    near = difflib.get_close_matches(str(name)[:SHOWN], list(known), n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown name {shown(name)}; {guess}"
