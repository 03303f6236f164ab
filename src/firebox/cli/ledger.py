"""`firebox ledger diff A B`: what runs differently in two servers, or in one before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from firebox.errors import ConfigError

ledger = typer.Typer(no_args_is_help=True, help="Ledgers of servers: `firebox ledger diff A B`.")


@ledger.callback()
def _verbs() -> None:
    """Keeps `diff` a word of its own: with a single command typer would drop it."""


@ledger.command()
def diff(
    first: Annotated[str, typer.Argument(help="a server's address, or a file that /ledger was saved to")],
    second: Annotated[str, typer.Argument(help="the other")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document as the last line")] = False,
) -> None:
    """Lists the operations, settings and versions in which two ledgers differ. Exit 1 if any does."""
    import msgspec

    from firebox.engine.ledger_diff import diff as differences

    changes = differences(_read(first), _read(second))
    if as_json:
        print(json.dumps({"changes": [msgspec.to_builtins(change) for change in changes]}))
    else:
        for change in changes:
            print(f"{change.what} {change.name}")
            print(f"  - {'(absent)' if change.first is None else change.first}")
            print(f"  + {'(absent)' if change.second is None else change.second}")
    raise typer.Exit(1 if changes else 0)


def _read(source: str) -> dict[str, Any]:
    """A ledger. Raises ConfigError for what is none."""
    try:
        text = _fetch(source) if source.startswith(("http://", "https://")) else Path(source).read_text()
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is no ledger: {error}", hint="an address, or a saved /ledger") from error
    if not isinstance(document, dict) or not isinstance(document.get("ledger"), list):
        raise ConfigError(f"{source} is no ledger: it has no rows", hint="an address, or a saved /ledger")
    return document


def _fetch(url: str) -> str:
    import httpx

    try:
        reply = httpx.get(f"{url.rstrip('/').removesuffix('/ledger')}/ledger", timeout=30)
        reply.raise_for_status()
    except httpx.HTTPError as error:
        raise ConfigError(f"{url} serves no ledger: {error}") from error
    return reply.text
