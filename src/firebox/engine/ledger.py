"""What runs: one row per operation, with the kernel, its reasons and the losers; on an NVIDIA GPU also one
per launch of the plan and range of token counts. Shown by --explain, served at /ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from firebox.engine.messages import LedgerRow
from firebox.errors import ConfigError
from firebox.kernels.select import TORCH, Choice
from firebox.layers.decoder import Decoder

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels.plan import Planned, Setting
    from firebox.layers.launches import Launch, Layers

GRAPH, EAGER = "graph", "eager"
# Launches that steps with prompts, or requests with filters or logprobs, make; no graph holds them.
NEVER_CAPTURED = {
    ("attention_extend", ""),
    ("sample", "filters"),
    ("logprobs", ""),
    ("logprobs", "alternatives"),
}


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


def launch_rows(launches: Iterable[Launch], graph_rows: int) -> list[LedgerRow]:
    """One row per launch of the plan and range of token counts, in the order of a step; rows that say the
    same of neighbouring ranges are one, and so are rows of layers that differ in nothing that is shown.
    Decode steps of up to `graph_rows` tokens are replayed from graphs."""
    kinds: dict[Layers, list[LedgerRow]] = {}
    for launch in launches:
        rows = kinds.setdefault(launch.layers, [])
        for row in _by_mode(_launch_row(launch), launch.planned, graph_rows):
            _join(rows, row, _continued)
    found: list[LedgerRow] = []
    for row in (row for rows in kinds.values() for row in rows):
        _join(found, row, _in_more_layers)
    return found


def _join(rows: list[LedgerRow], row: LedgerRow, joined: Callable[[LedgerRow, LedgerRow], Any]) -> None:
    """Adds the row, to another one if it can be `joined`."""
    for i, known in enumerate(rows):
        both = joined(known, row)
        if both is not None:
            rows[i] = both
            return
    rows.append(row)


def _continued(known: LedgerRow, row: LedgerRow) -> LedgerRow | None:
    """One row for neighbouring ranges of which the same is said."""
    tokens = (known.tokens[0], row.tokens[1])
    follows = known.tokens[1] + 1 == row.tokens[0]
    same = replace(known, tokens=tokens) == replace(row, tokens=tokens)
    return replace(known, tokens=tokens) if follows and same else None


def _in_more_layers(known: LedgerRow, row: LedgerRow) -> LedgerRow | None:
    """One row for layers of another kind of which the same is said."""
    both = (known.layers or 0) + (row.layers or 0)
    return replace(known, layers=both) if replace(known, layers=row.layers) == row else None


def _launch_row(launch: Launch) -> LedgerRow:
    planned, compiled = launch.planned, launch.compiled
    names = [launch.layers.op, planned.operation.name, planned.op]
    variant = f" ({planned.compile.variant})" if planned.compile.variant else ""
    row = LedgerRow(
        op="/".join(dict.fromkeys(names)) + variant,
        tokens=(planned.first, planned.last),
        kernel=compiled.kernel if compiled else planned.path,
        format=planned.operation.format,
        why=planned.why,
        losers=dict(planned.losers),
        config=planned.config,
        how=_how(planned.why),
        layers=launch.layers.layers,
    )
    if compiled is None:
        return row
    return replace(
        row,
        shared_bytes=compiled.shared_bytes,
        limit_bytes=compiled.limit_bytes,
        instruction=compiled.instruction,
        native=not launch.emulated,
    )


def _how(why: str) -> str:
    """From the first words of a choice's reason."""
    words = {"measured": "tuned", "partly measured": "tuned", "predicted": "predicted"}
    return next((how for word, how in words.items() if why.startswith(word)), "default")


def _by_mode(row: LedgerRow, planned: Planned, graph_rows: int) -> Iterator[LedgerRow]:
    """The row, cut where graphs end."""
    first, last = row.tokens
    if (planned.op, planned.compile.variant) in NEVER_CAPTURED or first > graph_rows:
        yield row
        return
    yield replace(row, tokens=(first, min(last, graph_rows)), mode=GRAPH)
    if last > graph_rows:
        yield replace(row, tokens=(graph_rows + 1, last))


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
