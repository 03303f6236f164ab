"""One row of a report: what all repetitions of a phase measured together, or why there is no number.

Rates are means over repetitions with their 95 % interval; times are percentiles over all answers of all
repetitions. A row has numbers only if its verdict is "ok":

    failed      a request brought no whole answer
    garbage, repetition, empty, suspicious      a guard found it
    impossible  its numbers contradict each other, the server's own counters or the roof
    uncounted   neither the server nor a tokenizer says how many tokens there were
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from firebox.bench.base import Answer, Finding
from firebox.bench.drive import Run
from firebox.bench.measures import Rates, first_event_tokens, rates, times, whole
from firebox.bench.statistics import mean, percentiles, tied

WORST_FIRST = ("failed", "garbage", "repetition", "empty", "impossible", "suspicious", "uncounted", "ok")
RATES = (
    "output_tok_s_wall",
    "output_tok_s_sum",
    "output_tok_s_steady",
    "output_tok_s_peak",
    "decode_tok_s",
    "input_tok_s",
    "requests_per_s",
)
TIMES = ("ttft_ms", "ttft_reasoning_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms")
SHOWN_ERRORS = 3
WALL = "output_tok_s_wall"
TOLERATED_SHARE = 0.02


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to count as good: milliseconds, None: anything."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


class Row(msgspec.Struct, kw_only=True):
    """`requests` and `failed` of all repetitions. `notes`: what did not take the numbers away. `intervals`:
    the 95 % interval of each rate, where there is more than one repetition. `samples`: each repetition's
    throughput, and its mean ttft_ms and tpot_ms. `roof_share`: of what memory bandwidth allows. `tied`: its
    throughput cannot be told from the best row's. `sensors`: GPU → clock, power and temperature, where the
    GPU is visible from here."""

    workload: str
    axes: Mapping[str, int | float | str]
    concurrency: int
    requests: int
    failed: int
    repetitions: int
    verdict: str
    why: list[str] = []
    errors: list[str] = []
    notes: list[str] = []
    findings: list[Finding] = []
    output_tok_s_wall: float | None = None
    output_tok_s_sum: float | None = None
    output_tok_s_steady: float | None = None
    output_tok_s_peak: float | None = None
    decode_tok_s: float | None = None
    input_tok_s: float | None = None
    requests_per_s: float | None = None
    prefill_tok_s: float | None = None
    intervals: dict[str, tuple[float, float]] = {}
    samples: dict[str, list[float]] = {}
    ttft_ms: dict[str, float] | None = None
    ttft_reasoning_ms: dict[str, float] | None = None
    tpot_ms: dict[str, float] | None = None
    itl_ms: dict[str, float] | None = None
    e2e_ms: dict[str, float] | None = None
    queue_ms: dict[str, float] | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None
    output_tokens: float | None = None
    tokens_counted_by: str = ""
    tokens_per_event: float | None = None
    tokens_in_first_event: float | None = None
    accept_length: float | None = None
    goodput: dict[str, float] | None = None
    roof_share: float | None = None
    tied: bool = False
    sensors: dict[str, dict[str, float]] | None = None


def summarise(runs: Sequence[Run], findings: Sequence[Sequence[Finding]] = (), slo: Slo | None = None) -> Row:
    """The row of at least one run of the same phase, with what guards found in each. Laws are judged later,
    by `measure`."""
    phase = runs[0].phase
    answers = [answer for run in runs for answer in run.answers]
    good = [answer for run in runs for answer in whole(run)]
    errors = [answer.error for answer in answers if answer.error is not None]
    row = Row(
        workload=phase.workload,
        axes=dict(phase.axes),
        concurrency=phase.concurrency,
        requests=len(answers),
        failed=len(errors),
        repetitions=len(runs),
        verdict="ok",
        findings=[finding for found in findings for finding in found],
        errors=sorted(set(errors))[:SHOWN_ERRORS],
        tokens_counted_by="+".join(sorted({answer.counted_by for answer in good})),
    )
    if errors:
        condemn(row, "failed", f"{len(errors)} of {len(answers)} requests failed: {errors[0]}")
    elif len(good) < len(answers):
        condemn(row, "uncounted", "the server tells no usage; give --tokenizer to count")
    for verdict, why in _grouped(_beyond_chance(findings, len(answers), row.notes)):
        condemn(row, verdict, why)
    if good:
        _fill(row, runs, good, slo)
    return row


def _beyond_chance(findings: Sequence[Sequence[Finding]], answers: int, notes: list[str]) -> list[Finding]:
    """Without those about single streams if they are about so few that good text may have brought them: a
    guard flags 3 of 1,000 passages of good text (tests/cpu/bench/guards). They are noted then."""
    everything = [finding for found in findings for finding in found]
    single = [(run, f) for run, found in enumerate(findings) for f in found if len(f.answers) == 1]
    flagged = {(run, finding.answers[0]) for run, finding in single}
    if len(flagged) > TOLERATED_SHARE * answers or not flagged:
        return everything
    first = single[0][1]
    notes.append(f"{len(flagged)} of {answers} answers were flagged: {first.guard}: {first.why}")
    return [finding for finding in everything if len(finding.answers) != 1]


def _grouped(findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """One sentence a guard and verdict, with the first excerpt."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.guard, finding.verdict), []).append(finding)
    for (guard, verdict), found in kinds.items():
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        yield verdict, f"{guard}: {found[0].why}{more}"


def condemn(row: Row, verdict: str, why: str) -> None:
    """Gives `row` this verdict unless it has a worse one."""
    row.verdict = min(row.verdict, verdict, key=WORST_FIRST.index)
    row.why.append(why)


def withhold(row: Row) -> None:
    """Takes the numbers from a row whose verdict is not "ok": a verdict instead of a number."""
    if row.verdict == "ok":
        return
    for name in (
        *RATES,
        *TIMES,
        "prefill_tok_s",
        "tokens_per_event",
        "tokens_in_first_event",
        "accept_length",
        "goodput",
        "roof_share",
    ):
        setattr(row, name, None)
    row.intervals, row.samples, row.tied = {}, {}, False


def mark_ties(rows: list[Row]) -> None:
    """Rows with the same axes but for concurrency compete; those that the intervals do not tell from the
    best are marked, the best among them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.samples:
            groups.setdefault(f"{row.workload} {sorted(row.axes.items())}", []).append(row)
    for group in groups.values():
        best = max(group, key=lambda row: row.output_tok_s_wall or 0.0)
        equal = [row for row in group if row is best or tied(row.samples[WALL], best.samples[WALL])]
        for row in equal if len(equal) > 1 else []:
            row.tied = True


def _fill(row: Row, runs: Sequence[Run], good: Sequence[Answer], slo: Slo | None) -> None:
    measured = [rates(run) for run in runs if whole(run)]
    for name in RATES:
        _rate(row, name, measured)
    pooled = [times(run) for run in runs]
    row.samples = {
        "output_tok_s_wall": [each.output_tok_s_wall for each in measured],
        **{
            name: [float(np.mean(getattr(each, name))) for each in pooled if getattr(each, name)]
            for name in ("ttft_ms", "tpot_ms")
        },
    }
    for name in TIMES:
        values = [value for each in pooled for value in getattr(each, name)]
        setattr(row, name, {**percentiles(values), "mean": float(np.mean(values))} if values else None)
    row.output_tokens = _mean(answer.output_tokens for answer in good)
    row.prompt_tokens = _mean(a.usage.prompt_tokens if a.usage else a.ask.prompt_tokens for a in good)
    row.cached_tokens = _mean(a.usage.cached_tokens if a.usage else None for a in good)
    row.prefill_tok_s = _mean(map(_prefill_rate, good))
    pieces = sum(len(answer.pieces) for answer in good)
    row.tokens_per_event = sum(answer.output_tokens or 0 for answer in good) / pieces if pieces else None
    row.tokens_in_first_event = _mean(first_event_tokens(answer) for answer in good)
    row.accept_length = _accept_length(good)
    row.goodput = None if slo is None else _goodput(slo, runs)


def _rate(row: Row, name: str, measured: Sequence[Rates]) -> None:
    values = [value for each in measured if (value := getattr(each, name)) is not None]
    if not values:
        return
    found = mean(values)
    setattr(row, name, found.value)
    if found.half_width is not None:
        row.intervals[name] = (found.low, found.high)


def _prefill_rate(answer: Answer) -> float | None:
    """Prompt tokens that had to be computed, over the time to the first event."""
    if answer.usage is None or not answer.pieces:
        return None
    computed = answer.usage.prompt_tokens - (answer.usage.cached_tokens or 0)
    return computed / (answer.pieces[0].at_s - answer.sent_s)


def _accept_length(good: Sequence[Answer]) -> float | None:
    """Tokens of a step, drafts accepted and the one that is always there; None where the server is silent."""
    told = [a.usage for a in good if a.usage is not None and a.usage.accepted is not None]
    tokens, accepted = sum(u.completion_tokens for u in told), sum(u.accepted or 0 for u in told)
    return tokens / (tokens - accepted) if tokens > accepted else None


def _goodput(slo: Slo, runs: Sequence[Run]) -> dict[str, float]:
    """Of all requests sent, the share that kept every limit, and how many of those a second."""
    kept, sent, seconds = 0, 0, 0.0
    for run in runs:
        sent += len(run.answers)
        seconds += run.ended_s - run.began_s
        kept += sum(_keeps(answer, slo, run) for answer in whole(run))
    return {"share": kept / sent, "requests_per_s": kept / seconds}


def _keeps(answer: Answer, slo: Slo, run: Run) -> bool:
    alone = times(Run(phase=run.phase, answers=[answer], began_s=0.0, ended_s=1.0, steady_s=1.0))
    limits = ((slo.ttft_ms, alone.ttft_ms), (slo.tpot_ms, alone.tpot_ms), (slo.e2e_ms, alone.e2e_ms))
    return all(limit is None or all(value <= limit for value in values) for limit, values in limits)


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None
