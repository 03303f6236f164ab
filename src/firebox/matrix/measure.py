"""The guarded benchmark of a cell: `firebox bench` with the grid's load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firebox.find import load as find
from firebox.matrix.base import Load, Measured, Row

PROFILE = "concurrency"
bench = find("bench", "measure")  # at once: a grid does not start with a benchmark that cannot
SILENT, CUT_OFF = "silent for", "not finished"  # how the benchmark's errors begin


def measure(
    url: str, load: Load, *, deadline_s: float, silence_s: float, alive: Callable[[], bool]
) -> Measured:
    """See `base.Measure`. Raises what the benchmark raises for a server that it cannot talk to."""
    silent = find("bench", "server").Silent
    choices = {
        "concurrency": load.concurrency,
        "prompt_tokens": (load.prompt_tokens,),
        "output_tokens": (load.output_tokens,),
        "requests": load.requests,
        "repeat": load.repeats,
    }
    settings = bench.Settings(
        url=url, profile=PROFILE, choices=choices, silence_s=silence_s, within_s=deadline_s, seed=0
    )
    try:
        report = bench.measure(settings)
    except silent:
        return Measured(ended="silent" if alive() else "dead")
    findings = tuple(finding for row in report.rows for finding in row.findings)
    rows = tuple(_row(row) for row in report.rows)
    return Measured(rows=rows, findings=findings, ended=_ended(report.rows, alive()))


def _row(found: Any) -> Row:
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


def _ended(rows: list[Any], alive: bool) -> str:
    errors = [error for row in rows for error in row.errors]
    if not alive:
        return "dead"
    if any(error.startswith(SILENT) for error in errors):
        return "silent"
    return "deadline" if any(error.startswith(CUT_OFF) for error in errors) else "complete"
