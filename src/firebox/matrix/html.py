"""The report as one HTML file: no script, no request, everything in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from firebox.matrix.base import Verdict
from firebox.matrix.profiles import command_line
from firebox.matrix.report import Outcome, Report, heat_maps, placed, speed

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td.heat { text-align: right; } td.failed { font-size: .8rem; text-align: center; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; white-space: pre-wrap; }
"""
FAILED_COLOURS = {
    Verdict.GARBAGE: "#e9c6ef",
    Verdict.REPETITION: "#f3daf6",
    Verdict.INFEASIBLE: "#e4e4e4",
    Verdict.HANG: "#f8dfb0",
    Verdict.STARTUP_TIMEOUT: "#f8ebc8",
}
CRASH_COLOUR = "#f6c8c4"


def html(report: Report) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(report.spec.name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(_body(report))
        + "\n</body></html>\n"
    )


def _body(report: Report) -> Iterator[str]:
    counts = ", ".join(f"{number} {verdict}" for verdict, number in report.counts())
    yield f"<h1>{escape(report.spec.name)}</h1><p>{len(report.outcomes)} cells: {escape(counts)}.</p>"
    yield "<h2>Which values explain the failures</h2><ul>"
    yield from (f"<li>{escape(rule.sentence)}</li>" for rule in report.rules)
    yield from (f"<li>no pattern: {escape(e.cell)}: {e.verdict}</li>" for e in report.single)
    yield "</ul>"
    for title, columns, rows in heat_maps(report):
        yield f"<h2>{escape(title)}</h2>" + _heat(columns, rows, len(report.spec.axes) - 1)
    for n, places in report.places.items():
        lines = [(placed(place), speed(place), place.cell) for place in places]
        yield f"<h2>Ranking at concurrency {n}</h2>" + _table(("place", "tokens/s", "cell"), lines)
    for n, best in report.best().items():
        yield f"<h2>Best at concurrency {n}</h2><pre>{escape(command_line(best))}</pre>"
    yield "<h2>Cells</h2>"
    yield from (_cell(outcome) for outcome in report.outcomes)


def _heat(columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    speeds = [float(cell) for row in rows for cell in row[labels:] if _is_number(cell)]
    lines = [f"<tr>{''.join(f'<th>{escape(c)}</th>' for c in columns)}</tr>"]
    for row in rows:
        heads = "".join(f"<th>{escape(cell)}</th>" for cell in row[:labels])
        lines.append(f"<tr>{heads}{''.join(_heat_cell(cell, speeds) for cell in row[labels:])}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _heat_cell(shown: str, speeds: Sequence[float]) -> str:
    if _is_number(shown):
        share = float(shown) / max(speeds) if max(speeds) else 1.0
        colour = f"hsl(130 55% {92 - 42 * share:.0f}%)"
        return f'<td class="heat" style="background:{colour}">{shown}</td>'
    failed = next((verdict for verdict in Verdict if verdict == shown), None)
    colour = "transparent" if failed is None else FAILED_COLOURS.get(failed, CRASH_COLOUR)
    return f'<td class="failed" style="background:{colour}">{escape(shown)}</td>'


def _cell(outcome: Outcome) -> str:
    worst = outcome.worst
    head = f"<summary>{escape(outcome.cell.id)}: {outcome.verdict or 'not run'}</summary>"
    lines = [f"<p>{escape(outcome.cause)}</p>", f"<pre>{escape(command_line(outcome.cell))}</pre>"]
    if worst is not None and outcome.verdict is not Verdict.STABLE:
        evidence = worst.evidence
        lines.append(f"<p>Remedy: {escape(worst.remedy or 'unknown')}</p>")
        if evidence.source:
            lines.append(f'<p>See <a href="{escape(evidence.source)}">{escape(evidence.source)}</a></p>')
        if evidence.matched:
            lines.append(f"<pre>{escape(evidence.matched)}</pre>")
        lines.append(f"<pre>{escape(chr(10).join(evidence.last_lines))}</pre>")
    return f"<details>{head}{''.join(lines)}</details>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _is_number(shown: str) -> bool:
    return shown.replace(".", "", 1).isdigit()
