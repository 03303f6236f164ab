"""The columns of a report's table: what each is called, and what a row shows in it.

A row without a number shows its verdict where the throughput would stand, and nothing else. Axes that are the
same in all rows stand above the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from firebox.bench.row import Row

NUMBERS = (
    "tok/s wall",
    "tok/s sum",
    "decode tok/s",
    "prefill tok/s",
    "TTFT ms p50 / p99",
    "TPOT ms p50 / p99",
)


class Table(NamedTuple):
    """`caption`: what all rows have in common. `numeric`: which columns hold numbers; the first of them is
    the throughput or the verdict. `cells`: one tuple a row."""

    caption: str
    headers: tuple[str, ...]
    numeric: range
    cells: list[tuple[str, ...]]


def table(rows: Sequence[Row]) -> Table:
    """The table of these rows."""
    names = list(dict.fromkeys(name for row in rows for name in row.axes))
    varying = [name for name in names if len({row.axes.get(name) for row in rows}) > 1]
    common = [f"{name} {rows[0].axes[name]}" for name in names if name not in varying]
    counted = sorted({row.tokens_counted_by for row in rows if row.tokens_counted_by})
    repetitions = max((row.repetitions for row in rows), default=0)
    caption = ", ".join([*common, f"{repetitions} repetitions", f"tokens counted by {' or '.join(counted)}"])
    headers = ("concurrency", *varying, *NUMBERS, "requests")
    numeric = range(1 + len(varying), 1 + len(varying) + len(NUMBERS))
    return Table(caption, headers, numeric, [_cells(row, varying) for row in rows])


def _cells(row: Row, varying: Sequence[str]) -> tuple[str, ...]:
    return (
        str(row.concurrency),
        *(str(row.axes.get(name, "")) for name in varying),
        throughput(row),
        number(row.output_tok_s_sum),
        number(row.decode_tok_s),
        number(row.prefill_tok_s),
        middle_and_tail(row.ttft_ms),
        middle_and_tail(row.tpot_ms),
        f"{row.requests}" + (f", {row.failed} failed" if row.failed else ""),
    )


def throughput(row: Row) -> str:
    """The wall throughput with its interval, or the verdict. `=`: it cannot be told from the best."""
    if row.output_tok_s_wall is None:
        return row.verdict.upper()
    shown = number(row.output_tok_s_wall)
    if (interval := row.intervals.get("output_tok_s_wall")) is not None:
        shown += f" ± {number((interval[1] - interval[0]) / 2)}"
    return shown + (" =" if row.tied else "")


def number(value: float | None) -> str:
    """Three or four digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.3g}"


def middle_and_tail(found: dict[str, float] | None) -> str:
    """The median and the 99th percentile."""
    return "–" if found is None else f"{number(found['p50'])} / {number(found['p99'])}"
