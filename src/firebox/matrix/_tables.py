"""Reading tables of a TOML file strictly: every key is known, or refused with the one that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from firebox.errors import ConfigError

T = TypeVar("T")


def table(found: Any, where: str, known: Iterable[str]) -> Mapping[str, Any]:
    """`found` as a table with known keys only. Raises ConfigError."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is {found!r}", hint=f"{where} is a table")
    refuse_unknown(found, where, known)
    return found


def refuse_unknown(found: Iterable[str], where: str, known: Iterable[str]) -> None:
    """ConfigError for the first key that is not known, with the near miss."""
    known = tuple(known)
    for key in found:
        if key not in known:
            raise ConfigError(f"{where} has no {key!r}", hint=meant(key, known))


def meant(word: str, known: Iterable[str]) -> str:
    """What was probably meant, or all there is."""
    known = [str(name) for name in known]
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"


def struct(found: Any, where: str, kind: type[T]) -> T:
    """A table as a struct of `kind`, types checked. Raises ConfigError."""
    names = msgspec.structs.fields(kind)  # type: ignore[arg-type]
    given = table(found, where, [field.encode_name for field in names])
    try:
        return msgspec.convert(given, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def at_least(where: str, value: float | None, least: float) -> None:
    """ConfigError for a number below its least sensible value."""
    if value is not None and value < least:
        raise ConfigError(f"{where} is {value}", hint=f"at least {least}")
