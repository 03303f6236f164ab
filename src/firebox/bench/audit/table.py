"""Tables as people and tools write them: Markdown, CSV, TSV, JSON and JSON lines, into rows of named cells.

A nested JSON object becomes cells with dotted names ("ttft_ms.p50"); lists inside one are raw samples and are
left out. Where a document has several tables, all are read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from firebox.errors import ConfigError

Cells = Mapping[str, str]
_RULE = re.compile(r"^\s*\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*\|?\s*$")
_NUMBER = r"[-+]?(?:\d{1,3}(?:[,_ '’\u202f\u00a0]\d{3})+|\d+)(?:[.,]\d+)?(?:[eE][-+]?\d+)?"
_CELL = re.compile(
    rf"^[~≈<>≥≤]?\s*(?P<value>{_NUMBER})\s*(?P<kilo>[kKM](?![a-zA-Z/]))?"
    rf"\s*(?:\(?\s*(?:±|\+/-|\+-)\s*(?P<half>{_NUMBER})\s*\)?)?"
    r"\s*\(?(?P<unit>[a-zA-Zµμ%×][\w/%µμ. ]*)?\)?$"
)
_UNIT = re.compile(
    r"|ms|[uµμ]s|s|secs?|seconds?|min|(tok(en)?s?|t|tk|req(uest)?s?|r)( ?/ ?s(ec)?(ond)?)?|tps|users?"
)
ROWS = ("rows", "benchmarks", "results", "data")
"""Names under which JSON documents keep their rows: our own, llama-benchy's, and common ones."""


class Table(msgspec.Struct, frozen=True):
    """Rows under a header; every row has the cells that are not empty."""

    headers: tuple[str, ...]
    rows: tuple[Cells, ...]


class Number(msgspec.Struct, frozen=True):
    """A cell's number. `half_width`: what stood behind ±. `unit`: as it stood, in lower case."""

    value: float
    half_width: float | None = None
    unit: str = ""


def read(text: str) -> tuple[Table, ...]:
    """All tables of a document with at least one row. Raises ConfigError where there is none."""
    tables = tuple(table for table in _tables(text) if table.rows)
    if not tables:
        raise ConfigError(
            "there is no table in this file",
            hint="a Markdown pipe table, CSV, TSV, a JSON list of objects, or JSON lines",
        )
    return tables


def number(cell: str) -> Number | None:
    """ "**1,234.5** tok/s", "12.3 ± 0.4", "1.2k", "[850](x) ms"; None for anything that is not one number
    or has a unit that no benchmark has. A comma before other than three digits is a decimal one."""
    found = _CELL.match(plain(cell))
    if found is None:
        return None
    scale = {"k": 1e3, "K": 1e3, "M": 1e6, None: 1.0}[found["kilo"]]
    half = None if found["half"] is None else _float(found["half"]) * scale
    unit = (found["unit"] or "").strip().lower()
    return Number(_float(found["value"]) * scale, half, unit) if _UNIT.fullmatch(unit) else None


def plain(cell: str) -> str:
    """A cell without Markdown and HTML: emphasis, code, links (their text), footnotes, tags."""
    text = re.sub(r"\[\^[^\]]*\]", "", cell)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[a-zA-Z/][^>]*>", " ", text)
    return re.sub(r"[*`]|~~|(?<!\w)_+|_+(?!\w)", "", text).replace("\\", "").strip()


def _float(text: str) -> float:
    text = re.sub(r"(?<=\d)[_ '’\u202f\u00a0](?=\d)", "", text)
    text = re.sub(r",(?=\d{3}(?:\D|$))", "", text)
    return float(text.replace(",", "."))


def _tables(text: str) -> Iterable[Table]:
    stripped = text.strip()
    if stripped[:1] in ("{", "["):
        return _json(stripped)
    found = list(_markdown(stripped.splitlines()))
    return found or _separated(stripped)


def _markdown(lines: Sequence[str]) -> Iterator[Table]:
    for number, line in enumerate(lines[1:], 1):
        header = lines[number - 1]
        if not _RULE.match(line) or "|" not in header:
            continue
        body = []
        for row in lines[number + 1 :]:
            if "|" not in row:
                break
            body.append(_pipes(row))
        yield _table(_pipes(header), body)


def _pipes(line: str) -> list[str]:
    line = re.sub(r"^\s*\|", "", re.sub(r"(?<!\\)\|\s*$", "", line.strip()))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]


def _separated(text: str) -> Iterator[Table]:
    """CSV or TSV, blocks apart by empty lines. A block whose first heading is Metric has one metric a line,
    as genai-perf writes it; all such blocks are one row."""
    first = text.partition("\n")[0]
    separator = max("\t;,", key=first.count)
    if separator not in first:
        return
    metrics: dict[str, str] = {}
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        header, *body = list(csv.reader(io.StringIO(block), delimiter=separator, skipinitialspace=True))
        if header[0].strip().lower() == "metric":
            metrics.update(_metrics(header, body))
        else:
            yield _table([cell.strip() for cell in header], body)
    if metrics:
        yield Table(tuple(metrics), (metrics,))


def _metrics(header: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[tuple[str, str]]:
    for name, *values in body:
        for statistic, value in zip(header[1:], values, strict=False):
            yield f"{name} {'' if statistic.lower() == 'value' else statistic}".strip(), value.strip()


def _json(text: str) -> Iterator[Table]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            document = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise ConfigError(f"this is not JSON: {whole}", hint="check the file's end") from whole
    rows = _rows(document)
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError("the JSON rows are not objects", hint="a list of {column: value}")
    cells = [{name: value for name, value in _flat(row) if value != ""} for row in rows]
    yield Table(tuple(dict.fromkeys(name for row in cells for name in row)), tuple(cells))


def _rows(document: Any) -> list[Any]:
    """The list of rows, wherever it stands; an object without one is itself a row."""
    if isinstance(document, list):
        return document
    for name in ROWS:
        if isinstance(document.get(name), list):
            return list(document[name])
    return [document]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names. An object of mean and std, as llama-benchy writes, is one cell with ±."""
    if isinstance(value, dict):
        if name and {"mean", "std", "values"} <= value.keys():
            yield name, f"{value['mean']!r} ± {value['std']!r}"
            return
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, bool):
        yield name, str(value).lower()
    elif value is not None and not isinstance(value, list):
        yield name, str(value)


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> Table:
    names = _unique(plain(cell) for cell in header)
    rows = ({n: c for n, c in zip(names, row, strict=False) if n and c.strip()} for row in body)
    return Table(tuple(names), tuple(row for row in rows if row))


def _unique(names: Iterable[str]) -> list[str]:
    """A heading that occurs again gets a number, so that no column is lost."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 or not name else f"{name} #{seen[name]}")
    return found
