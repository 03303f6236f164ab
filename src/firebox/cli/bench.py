"""`firebox bench URL`: measures any OpenAI-compatible server. `firebox bench compare A B`: two reports.
`firebox bench offline MODEL`: the engine alone."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firebox.cli._bench_offline import offline
from firebox.cli._roof import roof_of
from firebox.errors import ConfigError

if TYPE_CHECKING:
    from firebox.bench.compare import Comparison
    from firebox.bench.report.base import Report
    from firebox.bench.row import Slo

STORE = Path("~/.local/share/firebox/results.db")
WIDE_CHARACTERS = 160  # of a table that is not for a terminal


class _UrlFirst(typer.core.TyperGroup):
    """`bench URL` is short for `bench run URL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=_UrlFirst,
    no_args_is_help=True,
    help="Measures an OpenAI-compatible server: `firebox bench URL`; the word `run` may be left out.",
)


bench.command("offline")(offline)


@bench.command()
def run(
    url: Annotated[str, typer.Argument(help="the server's address, such as http://127.0.0.1:30000")],
    profile: Annotated[str, typer.Option(help="what to load it with: a workload")] = "quick",
    concurrency: Annotated[str | None, typer.Option(help="requests at once, such as 1,2,4,8")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="lengths of prompts, such as 512,2048")] = None,
    output_tokens: Annotated[str | None, typer.Option(help="lengths of answers")] = None,
    depth_tokens: Annotated[str | None, typer.Option(help="lengths of contexts before the prompt")] = None,
    rates: Annotated[str | None, typer.Option(help="requests per second of timed arrivals")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="requests a place, in each run")] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="turns of a conversation")] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="runs of every phase")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="ShareGPT JSON or JSON lines, for --profile dataset")
    ] = None,
    model: Annotated[str | None, typer.Option(help="the served model's name; default: the first")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="use /v1/chat/completions throughout")] = False,
    random_ids: Annotated[
        bool, typer.Option("--random-ids", help="prompts of random tokens, not text")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="a model folder or card, to count tokens with")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="sent as a bearer token")] = None,
    temperature: Annotated[float | None, typer.Option(help="sent with every request")] = None,
    extra: Annotated[str | None, typer.Option(help="a JSON object sent with every request")] = None,
    slo: Annotated[
        str | None, typer.Option(help="for goodput: such as ttft=500,tpot=50,e2e=9000 (ms)")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="JSON lines {prompt, answer} that are right")] = None,
    card: Annotated[str | None, typer.Option(help="the model, for its roof; with --gpu")] = None,
    gpu: Annotated[str | None, typer.Option(help="the GPU, for the roof")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many, shared out in any way")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="how many, by tensor parallelism")] = None,
    limit: Annotated[float | None, typer.Option(help="seconds a run of a phase may take")] = None,
    silence: Annotated[float, typer.Option(help="seconds without an event that end a request")] = 300.0,
    warm_up: Annotated[bool, typer.Option(help="send a few requests before measuring")] = True,
    seed: Annotated[int | None, typer.Option(help="of the prompts; default: another each time")] = None,
    db: Annotated[Path, typer.Option(help="where reports are kept")] = STORE,
    name: Annotated[str | None, typer.Option(help="how `bench compare` may call this report")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with plots")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write Markdown")] = None,
    csv: Annotated[Path | None, typer.Option(help="write CSV")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document as the last line")] = False,
) -> None:
    """Measures the server at URL. Exit 1 if a row has no number: garbage, failures, contradictions."""
    from firebox.bench.measure import Settings, measure
    from firebox.bench.report.document import document
    from firebox.bench.store import save

    given = {
        "concurrency": _numbers(concurrency, int, "--concurrency"),
        "prompt_tokens": _numbers(prompt_tokens, int, "--prompt-tokens"),
        "output_tokens": _numbers(output_tokens, int, "--output-tokens"),
        "depth_tokens": _numbers(depth_tokens, int, "--depth-tokens", zero=True),
        "rates_per_s": _numbers(rates, float, "--rates"),
        "requests": requests,
        "turns": turns,
        "repeat": repeat,
        "file": dataset,
    }
    settings = Settings(
        url=url,
        profile=profile,
        choices={key: value for key, value in given.items() if value is not None},
        model=model,
        api_key=api_key,
        chat=chat,
        fields=_fields(temperature, extra),
        tokenizer=tokenizer,
        random_ids=random_ids,
        seed=seed,
        limit_s=limit,
        silence_s=silence,
        warm_up=warm_up,
        slo=_slo(slo),
        references=_references(reference),
        roof=roof_of(card, gpu, gpus, tp),
    )
    with _progress() as on_run:
        report = measure(settings, on_run)
    found = document(report)
    number = save(db, found, name)
    _write(report, html, markdown, csv)
    if not as_json:
        _show(report)
    print(f"kept as report {number} in {db}", file=sys.stderr)
    if as_json:
        print(json.dumps(found))
    raise typer.Exit(0 if report.passed else 1)


@bench.command("compare")
def compare_(
    first: Annotated[str, typer.Argument(help="a report: its number, its name, or a JSON file")],
    second: Annotated[str, typer.Argument(help="the other")],
    db: Annotated[Path, typer.Option(help="where reports are kept")] = STORE,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document as the last line")] = False,
) -> None:
    """What SECOND changed against FIRST, with 95 % intervals."""
    import msgspec

    from firebox.bench.compare import compare
    from firebox.bench.store import find

    comparison = compare(find(db, first), find(db, second))
    if as_json:
        print(msgspec.json.encode(comparison).decode())
    else:
        _show_comparison(comparison)


def _numbers(
    text: str | None, kind: Callable[[str], Any], flag: str, *, zero: bool = False
) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(number > 0 or (zero and number == 0) for number in numbers):
        raise ConfigError(f"{flag} is {text!r}", hint="numbers above 0 with commas between, such as 1,2,4")
    return numbers


def _fields(temperature: float | None, extra: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(extra) if extra else {}
    except ValueError as error:
        raise ConfigError(f"--extra is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--extra is {extra!r}", hint="a JSON object, such as '{\"top_k\": 20}'")
    return fields if temperature is None else {"temperature": temperature, **fields}


def _slo(text: str | None) -> Slo | None:
    from firebox.bench.row import Slo

    if text is None:
        return None
    try:
        limits = {f"{key}_ms": float(value) for key, value in (part.split("=") for part in text.split(","))}
        return Slo(**limits)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--slo is {text!r}", hint="milliseconds, such as ttft=500,tpot=50") from error


def _references(file: Path | None) -> dict[str, Any]:
    from firebox.bench.guards.reference import load

    return {} if file is None else load(file)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where that is a terminal, else a line a run."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)

        def on_run(what: str, number: int, of: int) -> None:
            bar.update(task, description=what, completed=number - 1, total=of)
            if not console.is_terminal:
                print(f"run {number} of {of}: {what}", file=sys.stderr)

        yield on_run


def _write(report: Report, html: Path | None, markdown: Path | None, csv: Path | None) -> None:
    from firebox.bench.report import html as page
    from firebox.bench.report import text

    for file, make in ((html, page.html), (markdown, text.markdown), (csv, text.as_csv)):
        if file is not None:
            file.write_text(make(report), encoding="utf-8")


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from firebox.bench.report.columns import table

    found = table(report.rows)
    shown = Table(title=f"{report.model} at {report.url}: {found.caption}", title_justify="left")
    for index, header in enumerate(found.headers):
        shown.add_column(header, justify="right" if index in found.numeric else "left")
    for row, cells in zip(report.rows, found.cells, strict=True):
        shown.add_row(*cells, style=None if row.verdict == "ok" else "red")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE_CHARACTERS)
    console.print(shown)
    for row in report.rows:
        for why in row.why + row.notes:
            console.print(f"concurrency {row.concurrency}, {row.verdict}: {why}", markup=False)
    for note in report.notes:
        console.print(note, markup=False)


def _show_comparison(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from firebox.bench.compare import MEASURES
    from firebox.bench.report.columns import number

    shown = Table("row", "measure", "first", "second", "change", "")
    for pair in comparison.pairs:
        change = (
            "–" if pair.change is None else _percent(pair.change.value, pair.change.low, pair.change.high)
        )
        verdict = "differs" if pair.told_apart else "tie" if pair.change else " / ".join(pair.verdicts)
        values = (number(pair.first), number(pair.second))
        shown.add_row(pair.row, MEASURES[pair.measure], *values, change, verdict)
    console = Console()
    console.print(shown)
    for measure, gain in comparison.overall.items():
        if gain is not None:
            text = _percent(gain.value, gain.low, gain.high)
            console.print(f"{MEASURES[measure]} over {gain.rows} rows: {text}")
    for row in comparison.alone:
        console.print(f"only in one report: {row}", markup=False)


def _percent(value: float, low: float, high: float) -> str:
    if low == float("-inf"):
        return f"{value:+.1%} (one repetition: no interval)"
    return f"{value:+.1%} [{low:+.1%}, {high:+.1%}]"
