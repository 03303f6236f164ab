"""Open-ended answers that all stop for length: a model that never ends, as broken ones do not.

Only requests with `Ask.open_ended`; where the length was dictated a stop for length is what was asked for.
At least FEWEST of them, every one stopped for length. Suspicious and no more: `max_tokens` may simply be
too small for the workload, and a base model may never end; but then the row measures no answers.

Would have caught: models whose end-of-turn token is lost or never becomes likely (vllm#41477: a lost Harmony
token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from firebox.bench.base import Answer, Finding
from firebox.bench.guards.base import Reference

FEWEST = 4


def judge(answers: Sequence[Answer], references: Mapping[str, Reference]) -> list[Finding]:
    """One finding, about all open-ended answers, or none."""
    free = [answer for answer in answers if answer.error is None and answer.ask.open_ended]
    if len(free) < FEWEST or any(answer.finish_reason != "length" for answer in free):
        return []
    limits = sorted({answer.ask.max_tokens for answer in free})
    why = (
        f"all {len(free)} open-ended answers stop for length (max_tokens {limits[0]} "
        f"to {limits[-1]}); none ends"
    )
    numbers = tuple(answer.number for answer in free)
    return [Finding(guard="all_length", verdict="suspicious", why=why, answers=numbers)]
