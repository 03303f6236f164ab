"""Rows of a table into claims: units, defaults, and the two kinds of table where a heading is not enough.

Wide tables have a column for each concurrency ("n=8 tok/s"): such a row makes several claims. llama-bench's
and llama-benchy's have a `test` column, which says what the rate beside it is: "pp2048 @ d16384 (c4)" is of
prompts, "tg128" of output, "ctx_pp" of a context that is sent first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from firebox.bench.audit.columns import Column, columns, is_label, scale
from firebox.bench.audit.table import Cells, Table, number, plain
from firebox.bench.claim import Claim, Spread
from firebox.errors import ConfigError

_TEST = re.compile(
    r"^(?P<context>ctx_)?(?P<kind>pp|tg)\s*(?P<tokens>\d+)?(?:\s*@\s*d(?P<depth>\d+))?\s*\(?(?:c(?P<c>\d+))?\)?$"
)
_TEST_COLUMNS = {
    "rate": ("t/s", "t/s (total)", "t_s_mean", "tok/s", "avg_ts"),
    "request": ("t/s (req)", "t_s_req_mean"),
    "peak": ("peak t/s", "peak_ts_mean"),
    "ttft": ("e2e_ttft (ms)", "e2e_ttft_mean", "ttfr (ms)", "ttfr_mean"),
}
"""In order of preference. llama-benchy's CSV has seconds × 1000, as its Markdown has."""
LABELS = 4
"""How many cells name a row."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A claim and where it stood. `number`: of the row, over all tables, from 1; `label`: its cells that are
    no measurements; `group`: all of those, its table and its test: rows of a group differ in concurrency
    alone. `half_width`: by field, what stood behind ±; `unread`: headings with cells that are no number."""

    number: int
    label: str
    group: tuple[str, ...]
    claim: Claim
    half_width: Mapping[str, float] = {}
    unread: tuple[str, ...] = ()


class Read(msgspec.Struct, frozen=True):
    """All rows, what headings were read as, and those that nothing was made of."""

    rows: tuple[Row, ...]
    meant: Mapping[str, str]
    unmapped: tuple[str, ...]


def read_rows(tables: Sequence[Table], given: Mapping[str, str], defaults: Mapping[str, float]) -> Read:
    """Every row with a number in a column that is understood. `given`: heading → field; `defaults`: field →
    what holds where a row does not say. Raises ConfigError as `columns` does."""
    _check_given(tables, given)
    rows: list[Row] = []
    unmapped: dict[str, None] = {}
    named: dict[str, str] = {}
    start = 1
    for index, table in enumerate(tables):
        found = _test_rows(table, index, start) if _has_tests(table) else None
        if found is None:
            meant = columns(table.headers, given)
            unmapped.update((h, None) for h, what in meant.items() if what is None and h)
            named.update((h, what.field) for h, what in meant.items() if what is not None)
            found = list(_plain_rows(table, meant, index, start))
        rows += found
        start += len(table.rows)
    return Read(tuple(_with_defaults(row, defaults) for row in rows), named, tuple(unmapped))


def _check_given(tables: Sequence[Table], given: Mapping[str, str]) -> None:
    there = dict.fromkeys(header for table in tables for header in table.headers if header)
    for header in given:
        if header not in there:
            raise ConfigError(f"no column is called {header!r}", hint=f"there are: {', '.join(there)}")


def _plain_rows(table: Table, meant: Mapping[str, Column | None], index: int, start: int) -> Iterator[Row]:
    concurrencies = sorted({what.concurrency for what in meant.values() if what and what.concurrency})
    for offset, cells in enumerate(table.rows):
        texts = [plain(cells[h]) for h, what in meant.items() if what is None and h in cells and is_label(h)]
        for concurrency in concurrencies or (None,):
            values, halves, unread = _values(cells, meant, concurrency)
            if concurrency is not None:
                values["concurrency"] = concurrency
            if set(values) <= {"concurrency"}:
                continue
            yield Row(
                number=start + offset,
                label=", ".join([text for text in texts if len(text) < 60][:LABELS]),
                group=(str(index), *texts),
                claim=_claim(values),
                half_width=halves,
                unread=tuple(unread),
            )


def _values(
    cells: Cells, meant: Mapping[str, Column | None], concurrency: int | None
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    values: dict[str, float] = {}
    halves: dict[str, float] = {}
    unread = []
    for header, what in meant.items():
        if what is None or header not in cells or what.concurrency not in (None, concurrency):
            continue
        found = number(cells[header])
        if found is None or found.value < 0:
            unread.append(header)
            continue
        factor = scale(what, found.unit)
        values[what.field] = found.value * factor
        if found.half_width is not None:
            halves[what.field] = found.half_width * factor
    if cells.get("is_context_prefill_phase") == "true":  # llama-benchy: the context is what is sent
        values["input_tokens"] = values.pop("depth_tokens", 0.0)
        values.pop("output_tokens", None)
    return values, halves, unread


def _claim(values: Mapping[str, float]) -> Claim:
    scalars = {field: value for field, value in values.items() if "." not in field}
    spreads: dict[str, dict[str, float]] = {}
    for field, value in values.items():
        name, dot, statistic = field.partition(".")
        if dot:
            spreads.setdefault(name, {})[statistic] = value
    return msgspec.convert({**scalars, **{name: Spread(**found) for name, found in spreads.items()}}, Claim)


def _with_defaults(row: Row, defaults: Mapping[str, float]) -> Row:
    missing = {name: value for name, value in defaults.items() if getattr(row.claim, name) is None}
    return msgspec.structs.replace(row, claim=msgspec.structs.replace(row.claim, **missing))


def _test_column(table: Table) -> str | None:
    return next((h for h in table.headers if h.lower() in ("test", "test_name")), None)


def _has_tests(table: Table) -> bool:
    header = _test_column(table)
    return header is not None and any(_TEST.match(plain(row.get(header, ""))) for row in table.rows)


def _test_rows(table: Table, index: int, start: int) -> list[Row]:
    header = _test_column(table)
    assert header is not None
    rows = []
    for offset, cells in enumerate(table.rows):
        found = _TEST.match(plain(cells.get(header, "")))
        if found is None:
            continue
        values, halves = _test_values(found, cells)
        named = [plain(cells[h]) for h in ("model", "backend", "ngl") if h in cells]
        test = f"{found['context'] or ''}{found['kind']}{found['tokens'] or ''} d{found['depth'] or 0}"
        rows.append(
            Row(
                number=start + offset,
                label=", ".join([*named, plain(cells[header])]),
                group=(str(index), *named, test),
                claim=_claim(values),
                half_width=halves,
            )
        )
    return rows


def _test_values(found: re.Match[str], cells: Cells) -> tuple[dict[str, float], dict[str, float]]:
    prompts, concurrency = found["kind"] == "pp", float(found["c"] or 1)
    rate = "prefill_tok_s" if prompts else "decode_tok_s"
    fields = {"rate": rate, "peak": "peak_tok_s", "ttft": "ttft_ms.mean"}
    if not prompts:
        fields["request"] = "request_tok_s"
    values, halves = {"concurrency": concurrency}, {}
    for what, field in fields.items():
        cell = next((cells[h] for h in _TEST_COLUMNS[what] if h in cells), None)
        read = None if cell is None else number(cell)
        if read is not None:
            values[field] = read.value
            if read.half_width is not None:
                halves[field] = read.half_width
    depth, tokens = float(found["depth"] or 0), found["tokens"]
    if found["context"]:
        depth, tokens = 0.0, found["depth"] if prompts else None
    if tokens is not None:
        values["input_tokens" if prompts else "output_tokens"] = float(tokens)
    values["depth_tokens"] = depth
    return values, halves
