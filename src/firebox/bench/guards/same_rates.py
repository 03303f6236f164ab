"""Lengths or rates that are the same in request after request, where nothing dictated them.

Lengths: of at least FEWEST open-ended answers to different prompts, none stopped for length, SHARE have the
same number of tokens, and it is at least LONG (short answers such as "Yes." agree by nature). Rates: output
tokens over the time from the first piece to the last; at least FEWEST of them, of different lengths, that
spread by less than SPREAD of their mean. A busy machine moves each of them by a thousandth; a millionth is
a formula.

Nearest good case: requests of one batch with the same dictated length, which start and end together. They
are not open-ended and not judged. Would have caught: answers that a cache or a stub replays; per-request
rates that were computed, not measured (the tables that `audit` reads).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from firebox.bench.base import Answer, Finding
from firebox.bench.guards._text import prompt_key
from firebox.bench.guards.base import Reference

FEWEST = 4
SHARE = 0.8
LONG = 16  # tokens
SPREAD = 1e-6


def judge(answers: Sequence[Answer], references: Mapping[str, Reference]) -> list[Finding]:
    """At most one finding about lengths and one about rates."""
    free = [answer for answer in answers if answer.error is None and answer.ask.open_ended]
    return [*_lengths(free), *_rates(free)]


def _lengths(free: Sequence[Answer]) -> list[Finding]:
    ended = {prompt_key(a.ask): a for a in free if a.output_tokens and a.finish_reason != "length"}
    if len(ended) < FEWEST:
        return []
    tokens, count = Counter(answer.output_tokens or 0 for answer in ended.values()).most_common(1)[0]
    if tokens < LONG or count < SHARE * len(ended):
        return []
    same = tuple(answer.number for answer in ended.values() if answer.output_tokens == tokens)
    why = (
        f"{count} of {len(ended)} open-ended answers to different prompts have "
        f"exactly {tokens} tokens (limit {SHARE:.0%})"
    )
    return [_finding(why, same)]


def _rates(free: Sequence[Answer]) -> list[Finding]:
    rated = [(answer, rate) for answer in free if (rate := _rate(answer))]
    if len(rated) < FEWEST or len({answer.output_tokens for answer, _ in rated}) < 2:
        return []
    rates = [rate for _, rate in rated]
    spread = (max(rates) - min(rates)) / (sum(rates) / len(rates))
    if spread >= SPREAD:
        return []
    why = (
        f"{len(rates)} requests of different lengths ran at {rates[0]:.6g} tok/s, "
        f"within {spread:.1e} (limit {SPREAD:.0e})"
    )
    return [_finding(why, tuple(answer.number for answer, _ in rated))]


def _rate(answer: Answer) -> float | None:
    """Tokens a second after the first piece; None for an answer too short to have one."""
    if not answer.output_tokens or answer.output_tokens < LONG or len(answer.pieces) < 2:
        return None
    seconds = answer.pieces[-1].at_s - answer.pieces[0].at_s
    return answer.output_tokens / seconds if seconds > 0 else None


def _finding(why: str, numbers: tuple[int, ...]) -> Finding:
    return Finding(guard="same_rates", verdict="suspicious", why=why, answers=numbers)
