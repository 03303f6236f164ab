"""What runs: one row per operation, with the kernel, its reasons and the losers. Shown by --explain, served
at /ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from firebox.engine.messages import LedgerRow
from firebox.errors import ConfigError
from firebox.kernels.select import TORCH, Choice
from firebox.layers.decoder import Decoder

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels.plan import Setting


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


def refuse_untuned(model: Decoder, setting: Setting, max_tokens: int) -> None:
    """For --strict on an NVIDIA GPU: ConfigError if steps of 1 … `max_tokens` tokens launch anything at a
    default configuration that a tuned file could replace, naming the operations and the missing entries."""
    missing = list(dict.fromkeys(_untuned(model, setting, max_tokens)))
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = "tuned configurations are data: see tuned/README.md; firebox fit --strict lists all of these"
        raise ConfigError(f"--strict: {missing[0]}{more}", hint=hint)


def _untuned(model: Decoder, setting: Setting, max_tokens: int) -> Iterator[str]:
    """One sentence a kind of operation. Layers that no kernel runs are refused before."""
    from firebox.kernels.plan import planned

    layers: list[Any] = [*(layer for block in model.blocks for layer in block), model.head]
    made = (layer.operations(setting) for layer in layers)
    operations = dict.fromkeys(o for found in made if not isinstance(found, str) for o in found)
    for operation in operations:
        if hasattr(operation.source, "TUNED"):
            for row in planned(operation, setting.gpu, max_tokens):
                why = row.untuned(setting.gpu)
                if why is not None:
                    yield f"{operation.name} runs {why}"
