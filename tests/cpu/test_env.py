"""env.py: types, defaults, and refusals that name the variable."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from firebox import env
from firebox.errors import ConfigError


def test_defaults() -> None:
    environment = env.read({})
    assert environment.cache_dir == Path.home() / ".cache" / "firebox"
    assert environment.smem_limit_bytes is None
    assert environment.log_level == "info"


def test_values_are_typed() -> None:
    environment = env.read(
        {"FIREBOX_CACHE_DIR": "/tmp/x", "FIREBOX_SMEM_LIMIT": "101376", "FIREBOX_LOG_LEVEL": "DEBUG"}
    )
    assert environment == env.Environment(
        cache_dir=Path("/tmp/x"), smem_limit_bytes=101376, log_level="debug"
    )


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert env.read({"FIREBOX_CACHE_DIR": "~/fb"}).cache_dir == Path("/home/someone/fb")
    assert env.read({}).cache_dir == Path("/home/someone/.cache/firebox")


def test_empty_counts_as_not_set() -> None:
    assert env.read({"FIREBOX_SMEM_LIMIT": "", "FIREBOX_LOG_LEVEL": " "}) == env.read({})


def test_the_process_environment_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, value in (("1", 1), (" 2 ", 2), ("", None)):
        monkeypatch.setenv("FIREBOX_SMEM_LIMIT", text)
        assert env.read().smem_limit_bytes == env.smem_limit_bytes() == value
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT")
    assert env.read().smem_limit_bytes is env.smem_limit_bytes() is None
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", "99 KiB")
    with pytest.raises(ConfigError, match="FIREBOX_SMEM_LIMIT"):
        env.smem_limit_bytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("FIREBOX_SMEM_LIMIT", "99 KiB"),
        ("FIREBOX_SMEM_LIMIT", "0"),
        ("FIREBOX_SMEM_LIMIT", "-1"),
        ("FIREBOX_LOG_LEVEL", "loud"),
    ],
)
def test_refusal_names_variable_and_value(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        env.read({name: text})
    assert name in str(caught.value)
    assert text in str(caught.value)
    assert caught.value.hint


def test_every_variable_is_ours_and_documented() -> None:
    for field in dataclasses.fields(env.Environment):
        assert field.metadata["name"].startswith("FIREBOX_")
        assert len(field.metadata["help"]) > 20, field.name


def test_environment_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        env.read({}).log_level = "debug"  # type: ignore[misc]
