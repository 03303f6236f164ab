"""What runs: one row per operation, with the kernel, its reasons and the losers. Shown by --explain, served
at /ledger."""

from __future__ import annotations

from collections.abc import Sequence

from firebox.engine.messages import LedgerRow
from firebox.errors import ConfigError
from firebox.kernels.select import TORCH, Choice


def ledger_rows(choices: Sequence[Choice], max_tokens: int, dtype: str) -> list[LedgerRow]:
    """One row per distinct choice (layers of a kind choose alike), in the order the model met them."""
    rows: dict[tuple[str, str], LedgerRow] = {}
    for choice in choices:
        is_fallback = choice.name == TORCH and choice.why != "asked for"
        row = LedgerRow(
            choice.op, (1, max_tokens), choice.name, dtype, choice.why, choice.losers, is_fallback
        )
        rows.setdefault((choice.op, choice.name), row)
    return list(rows.values())


def refuse_fallbacks(rows: Sequence[LedgerRow]) -> None:
    """For --strict: ConfigError if any row is a fallback, naming it and what would have run."""
    for row in rows:
        if row.fallback:
            losers = "; ".join(f"{name} {reason}" for name, reason in row.losers.items())
            raise ConfigError(
                f"--strict: {row.op} falls back to {TORCH} ({losers})", hint="see serve --explain"
            )
