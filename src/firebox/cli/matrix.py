"""`firebox matrix run SPEC.toml`, `firebox matrix report DIR`: a grid of server configurations."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from firebox.matrix.base import Measure, Verdict
    from firebox.matrix.cells import Turn
    from firebox.matrix.report import Report

matrix = typer.Typer(
    help="Starts a server in every configuration of a grid, measures it, and says what became of it.",
    no_args_is_help=True,
)
Json = Annotated[bool, typer.Option("--json", help="one JSON document")]


@matrix.command("run")
def run_(
    spec: Annotated[Path, typer.Argument(help="the grid, a TOML file", dir_okay=False)],
    out: Annotated[
        Path | None, typer.Option(help="folder of results, logs and reports; default: SPEC.matrix")
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs the cells that have no verdict yet; may be interrupted and run again at any time. Exit status 0 if
    every planned cell has a verdict."""
    from firebox.matrix.measure import measure

    raise typer.Exit(0 if run_grid(spec, out or Path(f"{spec.stem}.matrix"), measure, as_json) else 1)


@matrix.command()
def report(
    where: Annotated[Path, typer.Argument(help="the folder that `matrix run` wrote, or its matrix.sqlite")],
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="write one self-contained HTML file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the report as Markdown")] = None,
) -> None:
    """What the cells have come to so far: which values explain the failures, and which cell is the best."""
    from firebox.matrix.html import html as as_html
    from firebox.matrix.report import markdown as as_markdown
    from firebox.matrix.report import report as of
    from firebox.matrix.store import Store

    store = Store(where.parent if where.is_file() else where, create=False)
    found = of(store)
    store.close()
    if html is not None:
        html.write_text(as_html(found), encoding="utf-8")
    if markdown is not None:
        markdown.write_text(as_markdown(found), encoding="utf-8")
    if as_json:
        print(json.dumps(found.document()))
    elif html is None and markdown is None:
        print(as_markdown(found), end="")


def run_grid(spec: Path, out: Path, measure: Measure, as_json: bool = False) -> bool:
    """`matrix run` with this measurement. True: every planned cell has a verdict."""
    from firebox.matrix.report import report as of
    from firebox.matrix.run import run
    from firebox.matrix.spec import read
    from firebox.matrix.store import Store

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("firebox").setLevel(logging.INFO)  # not the HTTP client's line for each request
    signal.signal(signal.SIGTERM, _interrupt)
    found = read(spec)
    store = Store(out)
    try:
        done = run(found, spec.read_text(encoding="utf-8"), store, measure, _progress)
        result = of(store)
    finally:
        store.close()
    _write(result, out)
    if as_json:
        print(json.dumps(result.document()))
    else:
        counts = ", ".join(f"{number} {verdict}" for verdict, number in result.counts())
        print(f"{len(result.outcomes)} cells: {counts}; {out}/report.html, {out}/report.md")
    return done


def _write(result: Report, out: Path) -> None:
    """The reports and a profile for each concurrency."""
    from firebox.matrix.html import html
    from firebox.matrix.report import markdown

    (out / "report.html").write_text(html(result), encoding="utf-8")
    (out / "report.md").write_text(markdown(result), encoding="utf-8")
    folder = out / "profiles"
    folder.mkdir(exist_ok=True)
    for name, text in result.profiles().items():
        (folder / name).write_text(text, encoding="utf-8")


def _progress(number: int, of: int, turn: Turn, verdict: Verdict, cause: str) -> None:
    print(f"[{number}/{of}] {turn[0]}: {verdict}{': ' + cause if cause else ''}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM as Ctrl-C: the server of the cell is stopped on the way out."""
    raise KeyboardInterrupt
