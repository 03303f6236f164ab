"""Settings: each is documented once, and its default is one of its choices."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest

from firebox.config import Config, EngineConfig, kv_format_of
from firebox.find import names


def sections() -> list[tuple[type, dataclasses.Field[Any]]]:
    kinds = [typing.get_type_hints(Config)[field.name] for field in dataclasses.fields(Config)]
    return [(kind, field) for kind in kinds for field in dataclasses.fields(kind)]


def test_every_setting_is_documented_once() -> None:
    names = [field.name for _, field in sections()]
    assert len(set(names)) == len(names), "the flags of two sections would clash"
    assert all(len(field.metadata["help"]) > 10 for _, field in sections())


def test_defaults_are_of_their_type_and_choices() -> None:
    for kind, field in sections():
        hint = typing.get_type_hints(kind)[field.name]
        assert isinstance(field.default, typing.get_args(hint) or hint), field.name
        assert not field.metadata["choices"] or field.default in field.metadata["choices"], field.name


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().engine.strict = True  # type: ignore[misc]


def test_every_kv_choice_is_a_file_of_the_room_and_back() -> None:
    (field,) = (f for f in dataclasses.fields(EngineConfig) if f.name == "kv_cache_dtype")
    choices = set(field.metadata["choices"]) - {"auto"}
    assert {kv_format_of(choice, "float32") for choice in choices} == set(names("formats.kv")) <= choices
