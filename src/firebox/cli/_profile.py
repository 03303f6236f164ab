"""`serve --profile FILE`: settings from a TOML file, under those given on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from firebox.config import Config, check_choice
from firebox.errors import ConfigError


def with_profile(config: Config, file: Path, context: typer.Context) -> Config:
    """`config` with the file's settings where the command line is silent. Keys are the names of the config's
    fields. Raises ConfigError for a file, a key or a value that cannot be."""
    settings = _read(file)
    groups = {group.name: getattr(config, group.name) for group in dataclasses.fields(config)}
    known = {field.name for group in groups.values() for field in dataclasses.fields(group)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "docs/config.md lists all settings"
            raise ConfigError(f"{file} has {name!r}, which is no setting", hint=hint)
    open_ = {name: value for name, value in settings.items() if not _given(context, name)}
    return dataclasses.replace(
        config, **{name: _with_settings(group, open_, file) for name, group in groups.items()}
    )


def _read(file: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--profile {file} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--profile {file} is not TOML: {error}") from error


def _given(context: typer.Context, name: str) -> bool:
    """Does it stand on the command line?"""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _with_settings(group: Any, settings: Mapping[str, Any], file: Path) -> Any:
    kinds = typing.get_type_hints(type(group))
    changed = {}
    for field in dataclasses.fields(group):
        if field.name in settings:
            value = settings[field.name]
            changed[field.name] = _checked(value, kinds[field.name], f"{file}: {field.name}")
            if field.metadata["choices"]:
                check_choice(type(group), field.name, value)
    return dataclasses.replace(group, **changed)


def _checked(value: Any, kind: Any, where: str) -> Any:
    allowed = tuple(k for k in (typing.get_args(kind) or (kind,)) if k is not type(None))
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:  # not isinstance: true is an int to Python
        names = " or ".join(each.__name__ for each in allowed)
        raise ConfigError(f"{where} is {value!r}", hint=f"{names} is meant")
    return value
