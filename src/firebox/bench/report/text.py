"""A report as Markdown and as CSV."""

from __future__ import annotations

import csv
import io

from firebox.bench.report.base import Report
from firebox.bench.report.columns import table

NUMBERS = (
    "output_tok_s_wall",
    "output_tok_s_sum",
    "output_tok_s_steady",
    "output_tok_s_peak",
    "decode_tok_s",
    "input_tok_s",
    "prefill_tok_s",
    "requests_per_s",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "tokens_per_event",
    "accept_length",
    "roof_share",
)
PERCENTILES = ("ttft_ms", "ttft_reasoning_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms")


def markdown(report: Report) -> str:
    """The table, what is wrong with rows that have no number, and the notes."""
    shown = table(report.rows)
    lines = [
        f"# {report.model} at {report.url}",
        "",
        f"Workload {report.profile}, {report.began}, Firebox {report.firebox}, seed {report.seed}. "
        f"{shown.caption}.",
        "",
        f"| {' | '.join(shown.headers)} |",
        f"|{'---|' * len(shown.headers)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in shown.cells),
        "",
    ]
    for row in report.rows:
        lines += [f"- concurrency {row.concurrency}, {row.verdict}: {why}" for why in row.why + row.notes]
    return "\n".join([*lines, *(f"- {note}" for note in report.notes), ""])


def as_csv(report: Report) -> str:
    """One line a row; columns are the JSON's names, percentiles as ttft_ms_p50."""
    axes = sorted({name for row in report.rows for name in row.axes})
    points = [(name, point) for name in PERCENTILES for point in ("p50", "p90", "p99", "mean")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["workload", "concurrency", *axes, "verdict", "requests", "failed", *NUMBERS]
    writer.writerow([*head, *(f"{name}_{point}" for name, point in points), "tokens_counted_by"])
    for row in report.rows:
        cells = [row.workload, row.concurrency, *(row.axes.get(name, "") for name in axes)]
        cells += [row.verdict, row.requests, row.failed, *(_cell(getattr(row, name)) for name in NUMBERS)]
        cells += [_cell((getattr(row, name) or {}).get(point)) for name, point in points]
        writer.writerow([*cells, row.tokens_counted_by])
    return out.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
