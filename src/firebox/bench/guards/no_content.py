"""Answers that count tokens and have no content: numbers without anything to read.

Two cases, and the finding says which. Nothing at all came, or only blanks and names of special tokens:
garbage. Reasoning came and no content: "empty"; the model spent `max_tokens` on thinking, or its end-of-
reasoning tag is not parsed. Such a row may be a true speed, but it is not the answers that were asked for.

Threshold: more than SHARE of the finished requests. A single request may end without a word; good models do
so less than once in a hundred. Would have caught: `content: null` of gpt-oss on SM121 (vllm#37030), chunks
without text that were counted as tokens (eugr/llama-benchy#11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from firebox.bench.base import Answer, Finding
from firebox.bench.guards._text import visible
from firebox.bench.guards.base import Reference

SHARE = 0.02


def judge(answers: Sequence[Answer], references: Mapping[str, Reference]) -> list[Finding]:
    """At most one finding for each of the two cases."""
    finished = [answer for answer in answers if answer.error is None]
    mute = [answer for answer in finished if not visible(answer.content)]
    thought = [answer for answer in mute if visible(answer.text)]
    nothing = [answer for answer in mute if not visible(answer.text)]
    return [
        finding
        for finding in (
            _finding(nothing, len(finished), "garbage", "nothing to read came"),
            _finding(
                thought, len(finished), "empty", "only reasoning came: max_tokens ended before the answer"
            ),
        )
        if finding
    ]


def _finding(mute: Sequence[Answer], of: int, verdict: str, what: str) -> Finding | None:
    if len(mute) <= SHARE * of:
        return None
    tokens = sum(answer.output_tokens or 0 for answer in mute)
    why = f"{len(mute)} of {of} answers have no content (limit {SHARE:.0%}) and count {tokens} tokens: {what}"
    return Finding(
        guard="no_content", verdict=verdict, why=why, answers=tuple(answer.number for answer in mute)
    )
