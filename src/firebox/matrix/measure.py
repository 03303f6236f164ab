"""The guarded benchmark of a cell: `firebox bench` with the grid's load."""

from __future__ import annotations

from collections.abc import Callable

from firebox.bench import measure as bench
from firebox.bench.report.base import Report
from firebox.bench.row import Row as BenchRow
from firebox.bench.server import Silent
from firebox.matrix.base import Load, Measured, Row

SILENT, CUT_OFF = "silent for", "not finished"  # how the benchmark's errors begin


def measure(
    url: str, load: Load, *, deadline_s: float, silence_s: float, alive: Callable[[], bool]
) -> Measured:
    """See `base.Measure`. Raises what the benchmark raises for a server that it cannot talk to."""
    settings = bench.Settings(
        url=url,
        profile="concurrency",
        choices={
            "concurrency": load.concurrency,
            "prompt_tokens": (load.prompt_tokens,),
            "output_tokens": (load.output_tokens,),
            "requests": load.requests,
            "repeat": load.repeats,
        },
        silence_s=silence_s,
        within_s=deadline_s,
        seed=0,
    )
    try:
        report = bench.measure(settings, go_on=alive)
    except Silent:
        return Measured(ended="silent" if alive() else "dead")
    return Measured(
        rows=tuple(_row(row) for row in report.rows),
        findings=tuple(finding for row in report.rows if row.verdict != "ok" for finding in row.findings),
        ended=_ended(report, alive()),
    )


def _row(found: BenchRow) -> Row:
    return Row(
        concurrency=found.concurrency,
        requests=found.requests,
        failed=found.failed,
        verdict=found.verdict,
        output_tok_s_wall=found.output_tok_s_wall,
        output_tok_s_sum=found.output_tok_s_sum,
        ttft_ms=found.ttft_ms,
        tpot_ms=found.tpot_ms,
        tokens_counted_by=found.tokens_counted_by,
        repeats=tuple(found.samples.get("output_tok_s_wall", ())),
        error=found.errors[0] if found.errors else None,
        why=tuple(found.why),
    )


def _ended(report: Report, alive: bool) -> str:
    errors = [error for row in report.rows for error in row.errors]
    if not alive:
        return "dead"
    if any(error.startswith(SILENT) for error in errors):
        return "silent"
    late = report.unfinished or any(error.startswith(CUT_OFF) for error in errors)
    return "deadline" if late else "complete"
