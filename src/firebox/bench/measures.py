"""What one run of a phase measured: rates in tokens per second, times in milliseconds.

    wall        output tokens of all answers / time from the first request to the last token. The throughput.
    sum         concurrency × the mean rate of one answer while it decodes. What some tools call throughput;
                larger than wall, because it leaves out waiting, prefill and the tail.
    steady      tokens that came while all places were taken / that time
    peak        most tokens within any one second
    decode      tokens after each answer's first event / time from the first token of all to the last of all
    TTFT        from sending to the first event with content; for reasoning the same, apart
    TPOT        time from an answer's first event to its last / the tokens that came after the first event
    ITL         time between an answer's successive events, however many tokens they hold
    e2e         from sending to the last event
    queue       from when a request was due to when it was sent: the client's own places were taken

Only whole answers count, also for wall: the time that lost ones took is in it, their tokens are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from firebox.bench.base import Answer
from firebox.bench.drive import Run
from firebox.bench.tokens import told_ids

PEAK_WINDOW_S = 1.0
Array = npt.NDArray[np.float64]


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """One run; tokens per second unless named otherwise. None: it could not be said."""

    output_tok_s_wall: float
    output_tok_s_sum: float | None
    output_tok_s_steady: float | None
    output_tok_s_peak: float
    decode_tok_s: float | None
    input_tok_s: float
    requests_per_s: float
    duration_s: float


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """One run; milliseconds, one number an answer (an event for ITL)."""

    ttft_ms: list[float]
    ttft_reasoning_ms: list[float]
    tpot_ms: list[float]
    itl_ms: list[float]
    e2e_ms: list[float]
    queue_ms: list[float]


def whole(run: Run) -> list[Answer]:
    """The answers that came to their end and were counted."""
    return [a for a in run.answers if a.error is None and a.output_tokens is not None]


def rates(run: Run) -> Rates:
    """Of a run with at least one whole answer."""
    answers = whole(run)
    duration_s = run.ended_s - run.began_s
    tokens = sum(answer.output_tokens or 0 for answer in answers)
    single = [rate for answer in answers if (rate := decode_rate(answer)) is not None]
    at_s, weights = token_times(answers)
    return Rates(
        output_tok_s_wall=tokens / duration_s,
        output_tok_s_sum=run.phase.concurrency * float(np.mean(single)) if single else None,
        output_tok_s_steady=_steady(run, at_s, weights),
        output_tok_s_peak=_peak(at_s, weights),
        decode_tok_s=_decode(answers),
        input_tok_s=sum(a.usage.prompt_tokens if a.usage else a.ask.prompt_tokens or 0 for a in answers)
        / duration_s,
        requests_per_s=len(answers) / duration_s,
        duration_s=duration_s,
    )


def times(run: Run) -> Times:
    """Of the whole answers."""
    answers = whole(run)
    return Times(
        ttft_ms=[1e3 * (first - a.sent_s) for a in answers if (first := _first(a, False)) is not None],
        ttft_reasoning_ms=[
            1e3 * (first - a.sent_s) for a in answers if (first := _first(a, True)) is not None
        ],
        tpot_ms=[1e3 / rate for a in answers if (rate := decode_rate(a)) is not None],
        itl_ms=[
            1e3 * (b.at_s - p.at_s) for a in answers for p, b in zip(a.pieces, a.pieces[1:], strict=False)
        ],
        e2e_ms=[1e3 * (a.ended_s - a.sent_s) for a in answers],
        queue_ms=[1e3 * (a.sent_s - a.due_s) for a in answers],
    )


def decode_rate(answer: Answer) -> float | None:
    """Tokens per second after the first event. None for an answer of a single event."""
    if len(answer.pieces) < 2:
        return None
    span_s = answer.pieces[-1].at_s - answer.pieces[0].at_s
    return _after_first(answer) / span_s if span_s > 0 else None


def token_times(answers: Sequence[Answer]) -> tuple[Array, Array]:
    """When events came, in order, and how many tokens each brought: as told by ids, else an even share."""
    at_s = [piece.at_s for answer in answers for piece in answer.pieces]
    weights = [weight for answer in answers for weight in _weights(answer)]
    order = np.argsort(np.asarray(at_s), kind="stable")
    return np.asarray(at_s)[order], np.asarray(weights)[order]


def _weights(answer: Answer) -> list[float]:
    if told_ids(answer) is not None:
        return [float(len(piece.ids or ())) for piece in answer.pieces]
    even = (answer.output_tokens or 0) / max(1, len(answer.pieces))
    return [even] * len(answer.pieces)


def _after_first(answer: Answer) -> float:
    return sum(_weights(answer)[1:])


def first_event_tokens(answer: Answer) -> float | None:
    """Tokens that an answer's first event brought; None for an answer without events."""
    return _weights(answer)[0] if answer.pieces else None


def _first(answer: Answer, reasoning: bool) -> float | None:
    return next((piece.at_s for piece in answer.pieces if piece.reasoning == reasoning), None)


def _steady(run: Run, at_s: Array, weights: Array) -> float | None:
    """Until the first place ran out of sessions; None if that left nothing."""
    until = run.steady_s
    inside = float(weights[at_s <= until].sum())
    return inside / (until - run.began_s) if inside and until > run.began_s else None


def _peak(at_s: Array, weights: Array) -> float:
    """Most tokens in any window that begins with an event; of a shorter run all of them, per second."""
    if not len(at_s):
        return 0.0
    total = np.concatenate([[0.0], np.cumsum(weights)])
    ends = np.searchsorted(at_s, at_s + PEAK_WINDOW_S, side="left")
    return float((total[ends] - total[np.arange(len(at_s))]).max()) / PEAK_WINDOW_S


def _decode(answers: Sequence[Answer]) -> float | None:
    spans = [a for a in answers if len(a.pieces) > 1]
    if not spans:
        return None
    span_s = max(a.pieces[-1].at_s for a in spans) - min(a.pieces[0].at_s for a in spans)
    return sum(_after_first(a) for a in spans) / span_s if span_s > 0 else None
