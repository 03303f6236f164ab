"""Two ledgers side by side: which operation runs by another kernel, in another format or over other token
counts, and which settings and versions stand behind it. Ledgers are documents as /ledger serves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec


class Change(msgspec.Struct, frozen=True):
    """`what`: operation, setting or version. `first`, `second`: its value in each, None where absent."""

    what: str
    name: str
    first: str | None
    second: str | None


def diff(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Change]:
    """Everything that differs: operations first, in the order of the first ledger."""
    parts = (
        ("operation", _operations(first), _operations(second)),
        ("setting", dict(_flat(first.get("settings", {}))), dict(_flat(second.get("settings", {})))),
        ("version", dict(_flat(first.get("versions", {}))), dict(_flat(second.get("versions", {})))),
    )
    return [
        Change(what, name, a.get(name), b.get(name))
        for what, a, b in parts
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    ]


def _operations(ledger: Mapping[str, Any]) -> dict[str, str]:
    """Operation and token range → what runs. Several rows of one operation are told apart by their number."""
    found: dict[str, str] = {}
    for row in ledger["ledger"]:
        name = f"{row['op']} [{row['tokens'][0]}, {row['tokens'][1]}]"
        number = sum(known == name or known.startswith(f"{name} #") for known in found)
        fallback = ", a fallback" if row.get("fallback") else ""
        said = f"{row['kernel']} ({row['format']}){fallback}{_launch(row)}: {row['why']}"
        found[f"{name} #{number + 1}" if number else name] = said
    return found


def _launch(row: Mapping[str, Any]) -> str:
    """What a launch's row says besides; nothing of an operation's."""
    if row.get("how") is None:
        return ""
    tile = " ".join(f"{name}={value}" for name, value in row["config"].items())
    shared = None if row["shared_bytes"] is None else f"{row['shared_bytes']} bytes shared"
    native = "emulated" if row["native"] is False else None
    parts = [f"{row['layers']} layers", tile, shared, row["instruction"], native, row["mode"], row["how"]]
    return "".join(f", {part}" for part in parts if part)


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", str(value)
