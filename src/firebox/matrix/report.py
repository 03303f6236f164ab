"""What a grid has shown: the document of `firebox matrix report --json`, and the report in Markdown.

verdict of a cell     STABLE if all its rounds were; else the failure that occurred most often
heat map              every cell, with its throughput where it is stable
failures              which axis values explain them (explain.py), with remedies
ranking               at each concurrency, with ties (ranking.py)
best                  at each concurrency, as a command line and as a profile
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from firebox.matrix.base import Row, Verdict
from firebox.matrix.cells import Cell
from firebox.matrix.explain import Judged, Rule, explain, unexplained
from firebox.matrix.profiles import command_line, profile
from firebox.matrix.ranking import Place, ranking
from firebox.matrix.spec import Spec, parse
from firebox.matrix.store import Attempt, Result, Store

SHOWN_PLACES = 10


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A cell with what its rounds came to. `verdict` None: not run yet. `worst`: the result that the verdict
    is about."""

    cell: Cell
    verdict: Verdict | None
    cause: str
    worst: Result | None
    attempts: tuple[Attempt, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of all rounds."""
        return tuple(row for attempt in self.attempts if attempt.result for row in attempt.result.rows)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    spec: Spec
    outcomes: tuple[Outcome, ...]
    rules: tuple[Rule, ...]
    single: tuple[Judged, ...]
    places: Mapping[int, tuple[Place, ...]]
    unfinished: int

    def document(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "name": self.spec.name,
            "cells": [_cell(outcome) for outcome in self.outcomes],
            "explanations": [{"sentence": rule.sentence, **msgspec.to_builtins(rule)} for rule in self.rules],
            "unexplained": [each.cell for each in self.single],
            "ranking": {str(n): msgspec.to_builtins(places) for n, places in self.places.items()},
            "best": {
                str(n): {"cell": best.id, "command": command_line(best)} for n, best in self.best().items()
            },
            "unfinished_attempts": self.unfinished,
        }

    def best(self) -> dict[int, Cell]:
        """The first cell of each concurrency's ranking; those that it is tied with stand beside it there."""
        known = {outcome.cell.id: outcome.cell for outcome in self.outcomes}
        return {n: known[places[0].cell] for n, places in self.places.items() if places}

    def profiles(self) -> dict[str, str]:
        """A profile file for each concurrency: name → text."""
        return {
            f"concurrency-{n}.toml": profile(cell, f"{self.spec.name}: best stable cell at concurrency {n}")
            for n, cell in self.best().items()
        }

    def counts(self) -> list[tuple[str, int]]:
        """How many cells have which verdict, the most frequent first."""
        return Counter(str(outcome.verdict or "not run") for outcome in self.outcomes).most_common()


def report(store: Store) -> Report:
    """The report of a grid as far as it has been run. Raises ConfigError if none was planned."""
    spec = parse(store.spec())
    attempts = store.attempts()
    outcomes = tuple(_outcome(cell, attempts) for cell in store.cells())
    judged = [Judged(o.cell.id, o.cell.axes, o.verdict) for o in outcomes if o.verdict is not None]
    rules = explain(judged)
    stable = [(o.cell.id, o.rows) for o in outcomes if o.verdict is Verdict.STABLE]
    return Report(
        spec=spec,
        outcomes=outcomes,
        rules=rules,
        single=unexplained(judged, rules),
        places={n: ranking(stable, n) for n in spec.load.concurrency},
        unfinished=sum(attempt.state != "finished" for attempt in attempts),
    )


def markdown(report: Report) -> str:
    """The report as Markdown."""
    counts = ", ".join(f"{number} {verdict}" for verdict, number in report.counts())
    parts = [f"# {report.spec.name}", f"{len(report.outcomes)} cells: {counts}."]
    parts += ["## Which values explain the failures", "\n".join(_explanations(report)) or "There are none."]
    for title, columns, rows in heat_maps(report):
        parts += [f"## {title}", _table(columns, rows)]
    for n, places in report.places.items():
        parts += [f"## Ranking at concurrency {n}", "\n".join(_ranking(places)) or "No stable cell."]
    for n, best in report.best().items():
        parts += [f"## Best at concurrency {n}", f"```\n{command_line(best)}\n```"]
    parts += ["## Cells", _table(("cell", "verdict", "cause", "remedy"), _causes(report))]
    return "\n\n".join(parts) + "\n"


def heat_maps(report: Report) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, headings and rows of one table for each concurrency: the last axis across, the others down."""
    *down, across = report.spec.axes
    columns = report.spec.values[across]
    known = {tuple(o.cell.axes.items()): o for o in report.outcomes}
    rows = list(dict.fromkeys(tuple(o.cell.axes[a] for a in down) for o in report.outcomes))
    for n in report.spec.load.concurrency:
        speeds = {place.cell: place.tok_s.value for place in report.places[n]}
        table = []
        for row in rows:
            keys = [(*zip(down, row, strict=True), (across, column)) for column in columns]
            table.append((*map(str, row), *(_shown(known.get(key), speeds) for key in keys)))
        headings = (*down, *(f"{across}={column}" for column in columns))
        yield f"Tokens/s at concurrency {n}", headings, table


def _outcome(cell: Cell, attempts: Sequence[Attempt]) -> Outcome:
    own = tuple(a for a in attempts if a.cell == cell.id)
    results = [a.result for a in own if a.result is not None]
    failures = [result for result in results if result.verdict is not Verdict.STABLE]
    if not results:
        return Outcome(cell=cell, verdict=None, cause="", worst=None, attempts=own)
    if not failures:
        return Outcome(cell=cell, verdict=Verdict.STABLE, cause="", worst=results[0], attempts=own)
    verdict = Counter(result.verdict for result in failures).most_common(1)[0][0]
    worst = next(result for result in failures if result.verdict is verdict)
    same = sum(result.verdict is verdict for result in results)
    cause = worst.cause if same == len(results) else f"in {same} of {len(results)} rounds: {worst.cause}"
    return Outcome(cell=cell, verdict=verdict, cause=cause, worst=worst, attempts=own)


def _cell(outcome: Outcome) -> dict[str, Any]:
    worst = outcome.worst
    finished = [attempt for attempt in outcome.attempts if attempt.result is not None]
    return {
        "cell": outcome.cell.id,
        "axes": dict(outcome.cell.axes),
        "verdict": outcome.verdict,
        "cause": outcome.cause,
        "remedy": worst.remedy if worst else "",
        "rows": [
            {"round": attempt.round, **msgspec.to_builtins(row)}
            for attempt in finished
            if attempt.result is not None
            for row in attempt.result.rows
        ],
        "rounds": len(finished),
        "evidence": msgspec.to_builtins(worst.evidence) if worst else None,
    }


def _explanations(report: Report) -> Iterator[str]:
    known = {outcome.cell.id: outcome for outcome in report.outcomes}
    for rule in report.rules:
        outcome = known[rule.cells[0]]
        remedy = f" Remedy: {outcome.worst.remedy}." if outcome.worst and outcome.worst.remedy else ""
        yield f"- {rule.sentence}: {outcome.cause}.{remedy}"
    for each in report.single:
        yield f"- no pattern: {each.cell}: {each.verdict}"


def _ranking(places: Sequence[Place]) -> Iterator[str]:
    if places and places[0].tok_s.half_width is None:
        yield "One measurement of a cell orders nothing: more load.repeats or repeat.rounds would."
        yield ""
    if places:
        yield "| place | tokens/s | cell |"
        yield "|---|---|---|"
    for place in places[:SHOWN_PLACES]:
        yield f"| {placed(place)} | {speed(place)} | {place.cell} |"
    if len(places) > SHOWN_PLACES:
        yield f"| … | | {len(places) - SHOWN_PLACES} more |"


def placed(place: Place) -> str:
    """ "=1" is a shared first place."""
    return f"{'=' if place.shared else ''}{place.place}"


def speed(place: Place) -> str:
    """The mean with its interval."""
    half = place.tok_s.half_width
    return f"{place.tok_s.value:.1f}" + ("" if half is None else f" ± {half:.1f}")


def _causes(report: Report) -> list[tuple[str, ...]]:
    return [
        (o.cell.id, str(o.verdict or "not run"), o.cause, o.worst.remedy if o.worst else "")
        for o in report.outcomes
    ]


def _shown(outcome: Outcome | None, speeds: Mapping[str, float]) -> str:
    if outcome is None:
        return "skipped"
    if outcome.cell.id in speeds:
        return f"{speeds[outcome.cell.id]:.1f}"
    return str(outcome.verdict or "not run")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
