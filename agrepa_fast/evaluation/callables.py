"""`module:function` as a metric's model, and what goes wrong with a user's function or model, in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..imports import foreign_code, import_module


def is_function_name(name: str) -> bool:
    """Whether a name means module:function rather than a model's folder or hub name."""
    return ":" in name and "/" not in name and not Path(name).exists()


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function of `module:function`; whatever it raises when it is called is a UserError that names it.

    Raises:
        UserError: no such module or function; begins with `option`."""
    module_name, _, attribute = name.partition(":")
    function = getattr(import_module(module_name, f"{option} {name}"), attribute, None)
    if not callable(function):
        raise UserError(f"{option} {name}: the module {module_name} has no function {attribute!r}")

    def guarded(*arguments: Any) -> Any:
        with foreign_code(name):
            return function(*arguments)

    return guarded


@contextmanager
def model_error(option: str, source: str) -> Iterator[None]:
    """Turn what a library raises for a model that it cannot load into one line that names option and model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise UserError(
            f"{option} {source}: cannot be loaded ({reason}); give a model's folder or hub name, or module:function"
        ) from error
