"""Read a configuration from a preset or a YAML file, change it by `section.field=value`, and write it as YAML."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from ...errors import UserError
from ...fields import DECIMAL, build, hints, join, shown, unknown
from .parse import import_yaml, parse, read_text
from .presets import RUN_PRESETS
from .run import RunConfig


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset or a YAML file, changed by `section.field=value` (values are YAML).

    A YAML file may start from a preset with `preset: NAME`; fields that it does not name keep their defaults. Checks
    that concern several fields run after all changes, so the order of the changes does not matter.

    Raises:
        UserError: an unknown preset, file, section or field, or a value that does not fit, by name.
    """
    if str(source) in RUN_PRESETS:
        values = _plain(RUN_PRESETS[str(source)])
        name = str(source)
    else:
        content = _read(Path(source))
        try:
            preset = content.pop("preset", None)
            if preset is not None and (not isinstance(preset, str) or preset not in RUN_PRESETS):
                raise UserError(f"preset: {unknown(preset, RUN_PRESETS)}")
            values = _merge(RunConfig, _plain(RUN_PRESETS[preset] if preset else RunConfig()), content, "")
            if not overrides:
                build(RunConfig, values, "")
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        name = Path(source).stem
    config = _build(values, overrides)
    if not config.train.name:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, name=name))
    return config


def override_config(config: RunConfig, overrides: Sequence[str | tuple[str, Any]]) -> RunConfig:
    """The configuration with changes, checked as a whole: `section.field=value`, or ("section.field", value).

    Raises:
        UserError: an unknown section or field, or a value that does not fit, by name.
    """
    return _build(_plain(config), overrides)


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; `load_config` reads it back."""
    return import_yaml().dump(_plain(config), Dumper=_dumper(), sort_keys=False, allow_unicode=True)


def _build(values: dict[str, Any], overrides: Sequence[str | tuple[str, Any]]) -> RunConfig:
    for override in overrides:
        values = _merge(RunConfig, values, _change(override), "")
    return build(RunConfig, values, "")


class _Entry(dict[str, Any]):
    """A change to one entry of a mapping, written with dots. A plain dict replaces the whole mapping."""


def _change(override: str | tuple[str, Any]) -> dict[str, Any]:
    if isinstance(override, str):
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{shown(override)}: expected section.field=value")
        value = parse(text, join("", key), is_file=False)
    else:
        key, value = override
    for part in reversed(key.split(".", 20)):
        value = _Entry({part: value})
    return value


def _merge(section: Any, current: Mapping[str, Any], changes: Any, where: str) -> dict[str, Any]:
    """The values of a section with some of them replaced. Fields that are not named keep their values."""
    if not isinstance(changes, Mapping):
        build(section, changes, where)  # raises
    merged = dict(current)
    for name, value in changes.items():
        path = join(where, name)
        if name not in hints(section):
            raise UserError(f"{path}: {unknown(name, hints(section))}")
        hint = _bare(hints(section)[name])
        if dataclasses.is_dataclass(hint):
            value = _merge(hint, merged.get(name, {}), value, path)
        elif typing.get_origin(hint) is dict and isinstance(value, Mapping):
            before = merged.get(name, {})
            item = _bare(typing.get_args(hint)[1])
            entries = {
                key: _merge(item, before.get(key, {}), entry, join(path, key))
                if dataclasses.is_dataclass(item)
                else entry
                for key, entry in value.items()
            }
            value = {**before, **entries} if isinstance(value, _Entry) else entries
        elif isinstance(value, _Entry):
            raise UserError(f"{join(path, next(iter(value)))}: {path} holds no fields")
        merged[name] = value
    return merged


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse(read_text(path), str(path))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{unknown(str(path), RUN_PRESETS)} (presets), or give a YAML file") from None
        raise UserError(f"{join('', str(path))}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections like `train:`, got {shown(content)}")
    return content


def _plain(config: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: _plain(item) for key, item in config.items()}
    return [_plain(item) for item in config] if isinstance(config, tuple | list) else config


@functools.cache
def _dumper() -> type:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Also quotes text that this reader, unlike YAML 1.1, would take for a number, such as 1e5."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", DECIMAL, list("-+.0123456789"))
    return Dumper
