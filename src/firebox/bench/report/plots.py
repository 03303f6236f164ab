"""The plots of a report: throughput and latency against concurrency, how the gaps between events are
distributed, and what happened when.

Only rows with a number are drawn. Rows that differ in more than concurrency are lines of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firebox.bench.drive import Run
from firebox.bench.measures import token_times, whole
from firebox.bench.report.base import Report
from firebox.bench.row import Row

COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#6e7781")
MOST_LINES = 12  # of a timeline or a distribution; more cannot be told apart
HEIGHT = 380


def figures(report: Report) -> Iterator[tuple[str, Any]]:
    """(title, plotly figure)."""
    lines = _lines(report.rows)
    if lines:
        yield "Throughput against concurrency", _throughput(lines)
        yield "Latency against concurrency", _latency(lines)
    good = [(row, runs) for row, runs in zip(report.rows, report.runs, strict=True) if row.verdict == "ok"]
    if good:
        yield "Time between events of a stream (share of gaps that are shorter)", _gaps(good[:MOST_LINES])
        row, runs = good[-1]
        yield f"Timeline of the last run at concurrency {row.concurrency}", _timeline(runs[-1])


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.verdict == "ok":
            name = ", ".join(f"{key} {value}" for key, value in row.axes.items())
            lines.setdefault(name, []).append(row)
    return {name: sorted(line, key=lambda row: row.concurrency) for name, line in lines.items()}


def _figure(x: str, y: str, **axes: Any) -> Any:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="plotly_white", height=HEIGHT, margin=dict(l=60, r=20, t=20, b=50), legend=dict(y=1.0)
    )
    figure.update_xaxes(title=x, **axes)
    figure.update_yaxes(title=y, rangemode="tozero")
    return figure


def _concurrency(y: str, lines: dict[str, list[Row]]) -> Any:
    ticks = sorted({row.concurrency for line in lines.values() for row in line})
    return _figure("concurrency", y, type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])


def _throughput(lines: dict[str, list[Row]]) -> Any:
    from plotly.graph_objects import Scatter

    figure = _concurrency("output tokens per second", lines)
    for (name, line), colour in zip(lines.items(), _colours(), strict=False):
        x = [row.concurrency for row in line]
        wall = [row.output_tok_s_wall for row in line]
        halves = [_half(row) for row in line]
        figure.add_trace(
            Scatter(
                x=x,
                y=wall,
                name=f"wall, {name}",
                line=dict(color=colour),
                error_y=dict(array=halves, visible=True),
            )
        )
        total = [row.output_tok_s_sum for row in line]
        figure.add_trace(Scatter(x=x, y=total, name=f"sum, {name}", line=dict(color=colour, dash="dot")))
    return figure


def _half(row: Row) -> float:
    low, high = row.intervals.get("output_tok_s_wall", (0.0, 0.0))
    return (high - low) / 2


def _latency(lines: dict[str, list[Row]]) -> Any:
    from plotly.graph_objects import Scatter

    figure = _concurrency("milliseconds", lines)
    figure.update_yaxes(type="log", rangemode="normal")
    for (name, line), colour in zip(lines.items(), _colours(), strict=False):
        for measure, dash in (("ttft_ms", "solid"), ("tpot_ms", "dot")):
            for point, width in (("p50", 2), ("p99", 1)):
                found = [
                    (row.concurrency, values[point]) for row in line if (values := getattr(row, measure))
                ]
                if found:
                    x, y = zip(*found, strict=True)
                    style = dict(color=colour, dash=dash, width=width)
                    figure.add_trace(
                        Scatter(x=x, y=y, name=f"{measure[:4].upper()} {point}, {name}", line=style)
                    )
    return figure


def _gaps(good: Sequence[tuple[Row, list[Run]]]) -> Any:
    from plotly.graph_objects import Scatter

    figure = _figure("milliseconds between events", "share", type="log")
    shares = np.linspace(0.0, 1.0, 201)
    for (row, runs), colour in zip(good, _colours(), strict=False):
        gaps = [
            1e3 * np.diff([piece.at_s for piece in answer.pieces]) for run in runs for answer in whole(run)
        ]
        values = np.concatenate([np.zeros(0), *gaps])
        if len(values):
            at = np.maximum(np.quantile(values, shares), 1e-3)
            name = f"concurrency {row.concurrency}" + "".join(f", {k} {v}" for k, v in row.axes.items())
            figure.add_trace(Scatter(x=at, y=shares, name=name, line=dict(color=colour)))
    return figure


def _timeline(run: Run) -> Any:
    """Each request from sent to first event (light) to last event, and tokens a second over all of them."""
    from plotly.graph_objects import Scatter

    figure = _figure("seconds", "request")
    figure.update_layout(
        yaxis2=dict(title="tokens per second", overlaying="y", side="right", rangemode="tozero")
    )
    answers = [answer for answer in whole(run) if answer.pieces]
    spans = {
        ("waiting", "#afb8c1"): [(a.sent_s, a.pieces[0].at_s) for a in answers],
        ("decoding", "#0969da"): [(a.pieces[0].at_s, a.ended_s) for a in answers],
    }
    for (name, colour), ends in spans.items():
        x = [t for low, high in ends for t in (low - run.began_s, high - run.began_s, None)]
        y = [t for a in answers for t in (a.number, a.number, None)]
        figure.add_trace(Scatter(x=x, y=y, name=name, mode="lines", line=dict(color=colour, width=3)))
    at_s, weights = token_times(answers)
    if len(at_s):
        step = max(0.1, (run.ended_s - run.began_s) / 100)
        edges = np.arange(run.began_s, run.ended_s + step, step)
        tokens, _ = np.histogram(at_s, edges, weights=weights)
        figure.add_trace(
            Scatter(
                x=edges[:-1] - run.began_s,
                y=tokens / step,
                name="tokens/s",
                yaxis="y2",
                line=dict(color="#bc4c00"),
            )
        )
    return figure


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS
