"""What --explain prints: the ledger, the settings' reasons and the memory budget, a row a line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from firebox.engine.client import LedgerRow, Memory, Ready

GRAPH, EAGER = "graph", "eager"


def explanation(ready: Ready) -> str:
    """The ledger as text: what runs and why, what does not and why not, where the settings came from, and
    what memory was planned with and taken."""
    lines = [f"{ready.model_type} in {ready.dtype} on {ready.device}"]
    rows = list(_folded(ready.ledger))
    for row, following in itertools.zip_longest(rows, rows[1:]):
        lines.append(f"  {_said(row)}")
        if following is None or _reasons(row) != _reasons(following):
            lines += [f"    not {loser}: {why}" for loser, why in row.losers.items()]
    return "\n".join([*lines, *(f"  {reason}" for reason in ready.reasons), *map(_line, ready.memory)])


def _folded(rows: Iterable[LedgerRow]) -> Iterator[LedgerRow]:
    """A launch that is the same where graphs end is one row."""
    before: LedgerRow | None = None
    for row in rows:
        if before is not None and _goes_on(before, row):
            mode = f"{GRAPH} up to {before.tokens[1]}"
            yield replace(before, tokens=(before.tokens[0], row.tokens[1]), mode=mode)
            before = None
            continue
        if before is not None:
            yield before
        before = row
    if before is not None:
        yield before


def _goes_on(before: LedgerRow, row: LedgerRow) -> bool:
    follows = before.tokens[1] + 1 == row.tokens[0] and (before.mode, row.mode) == (GRAPH, EAGER)
    return follows and replace(before, tokens=row.tokens, mode=row.mode) == row


def _reasons(row: LedgerRow) -> tuple[object, ...]:
    """What is said once below the launches of one choice."""
    operation = row.op.rpartition("/")[0] or row.op
    return operation, row.tokens, row.losers


def _said(row: LedgerRow) -> str:
    what = f"{row.op} [{row.tokens[0]}, {row.tokens[1]}] tokens: {row.kernel} ({row.format}), "
    if row.how is None:
        return what + row.why
    layers = f"{row.layers} layers" if row.layers != 1 else ""
    tile = " ".join(f"{name}={value}" for name, value in row.config.items())
    why = row.how if row.why == row.how else f"{row.how}: {row.why}"
    return what + ", ".join([*filter(None, [layers, tile, _compiled(row), row.mode]), why])


def _compiled(row: LedgerRow) -> str:
    if row.shared_bytes is None:
        return "a library's kernel"
    emulated = "" if row.native else " instead of its own"
    return f"{row.instruction}{emulated}, {row.shared_bytes} of {row.limit_bytes} bytes shared"


def _line(line: Memory) -> str:
    measured = "" if line.measured_bytes is None else f", measured {line.measured_bytes / 2**20:,.0f} MiB"
    return f"  memory, {line.what}: {line.budget_bytes / 2**20:,.0f} MiB{measured} ({line.why})"
