"""`firebox audit FILE`: which rows of a published table cannot be true, and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firebox.cli._roof import roof_of
from firebox.errors import ConfigError

if TYPE_CHECKING:
    from firebox.bench.audit.judge import Verdict
    from firebox.bench.audit.rows import Read
    from firebox.bench.roofline import Roofline

WIDE_CHARACTERS = 200  # of a table that is not for a terminal


def audit(
    file: Annotated[str, typer.Argument(help="Markdown, CSV, TSV, JSON or JSON lines; - is stdin")],
    card: Annotated[
        str | None, typer.Option(help="the model of all rows: a card, a folder or a Hugging Face id")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="its GPU: gb10, rtx-pro-6000, h200, …")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many, shared out in any way")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="how many, by tensor parallelism")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help='"HEADING=field" for what is not understood, or "=ignore"'),
    ] = None,
    concurrency: Annotated[float | None, typer.Option(help="of rows that do not say")] = None,
    requests: Annotated[float | None, typer.Option(help="of rows that do not say")] = None,
    duration_s: Annotated[float | None, typer.Option(help="of rows that do not say")] = None,
    input_tokens: Annotated[float | None, typer.Option(help="of rows that do not say")] = None,
    output_tokens: Annotated[float | None, typer.Option(help="of rows that do not say")] = None,
    drafts: Annotated[float | None, typer.Option(help="draft tokens a step, of rows that do not say")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Judges every row of a table: possible, impossible (which law, and by which factor), suspicious, tie,
    or unknown where no law could speak. With --card and --gpu also against what the hardware allows. Exit
    status 1 if any row is impossible."""
    from firebox.bench.audit.judge import judge
    from firebox.bench.audit.rows import read_rows
    from firebox.bench.audit.table import read

    defaults = {
        "concurrency": concurrency,
        "requests": requests,
        "duration_s": duration_s,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "drafts": drafts,
    }
    given = {name: value for name, value in defaults.items() if value is not None}
    _check_positive(given)
    roof = roof_of(card, gpu, gpus, tp)
    found = read_rows(read(_text(file)), _columns(column or ()), given)
    _log(found)
    if roof is not None:
        print(f"roofs: {roof.label}, weights as this model stores them, datasheet rates", file=sys.stderr)
    verdicts = judge(found.rows, roof)
    impossible = sum(verdict.verdict == "impossible" for verdict in verdicts)
    if as_json:
        document = {"file": file, "impossible": impossible, "machine": roof and roof.label}
        print(json.dumps({**document, "rows": [verdict.document() for verdict in verdicts]}))
    else:
        _show(verdicts, roof)
    raise typer.Exit(1 if impossible else 0)


def _text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", hint="a text file, or - for stdin") from error


def _columns(options: Iterable[str]) -> dict[str, str]:
    found = {}
    for option in options:
        heading, equals, field = option.rpartition("=")
        if not equals or not heading:
            raise ConfigError(f"--column {option!r}", hint='--column "HEADING=field"')
        found[heading] = field
    return found


def _check_positive(given: Mapping[str, float]) -> None:
    for name, value in given.items():
        if value < 0 or (value == 0 and name != "drafts"):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}", hint="a number above 0")


def _log(found: Read) -> None:
    if found.meant:
        read_as = ", ".join(f"{heading} = {field}" for heading, field in found.meant.items())
        print(f"read as: {read_as}", file=sys.stderr)
    if found.unmapped:
        print(f"no measurements: {', '.join(found.unmapped)} (else --column NAME=field)", file=sys.stderr)
    for row in found.rows:
        if row.unread:
            print(f"row {row.number}: no number in {', '.join(row.unread)}", file=sys.stderr)


def _show(verdicts: Iterable[Verdict], roof: Roofline | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=roof.label if roof else None, title_justify="left")
    for heading in ("row", "concurrency", "claimed", "implied", "factor", "of roof"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("verdict", "law", "label", "why"):
        table.add_column(heading, no_wrap=heading in ("verdict", "law"))
    for verdict in verdicts:
        table.add_row(*_cells(verdict))
    Console(width=None if sys.stdout.isatty() else WIDE_CHARACTERS, highlight=False).print(table)


def _cells(verdict: Verdict) -> Iterable[str]:
    claim, ruling = verdict.row.claim, verdict.laws[0] if verdict.laws else verdict.nearest
    yield str(verdict.row.number)
    yield "" if claim.in_flight is None else f"{claim.in_flight:g}"
    for value in () if ruling is None else (ruling.claimed, ruling.implied, ruling.factor):
        yield f"{value:,.4g}"
    yield from ("", "", "") if ruling is None else ()
    yield "" if verdict.roof_fraction is None else f"{verdict.roof_fraction:.0%}"
    yield verdict.verdict
    yield "" if ruling is None else ruling.law
    yield verdict.row.label
    yield "; ".join(law.why for law in verdict.laws)
