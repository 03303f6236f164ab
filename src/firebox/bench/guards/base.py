"""The contract of a guard. Two kinds, told apart by what the file holds:

    Guard     a class: one object a stream and channel; it sees the text as it comes
    judge     a function: it sees the answers of a whole phase, afterwards

The text reaches a `Guard` cut anew into blocks of exactly BLOCK characters, whatever the pieces of the stream
were. So what a guard says depends on the text alone, never on how a server cut it, and no guard pays for each
piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from firebox.bench.base import Answer, Finding

BLOCK = 256  # characters: some 64 tokens of prose; a bad stream is known that much later at most
EXCERPT = 48  # characters of the text that a finding shows


class StreamGuard(Protocol):
    """Watches one channel (content or reasoning) of one stream. `Watch` adds the numbers."""

    def see(self, block: str) -> Finding | None:
        """Takes the next BLOCK characters; says what is wrong with the stream up to here."""

    def end(self, rest: str) -> Finding | None:
        """Judges the stream as if `rest`, fewer than BLOCK characters, were its end. Changes nothing, so that
        a stream that still runs can be judged too."""


class Reference(msgspec.Struct, frozen=True):
    """What a server known to be right answered. `perplexity`: of its own tokens, None where it was not
    recorded."""

    prompt: str
    answer: str
    perplexity: float | None = None


class PhaseGuard(Protocol):
    """A module with `judge`: reads all answers of a phase. `references`: by prompt; empty where none
    are given."""

    def judge(self, answers: Sequence[Answer], references: Mapping[str, Reference]) -> list[Finding]:
        """What is wrong with the phase; [] where nothing is. Failed requests are in `answers` too."""


def excerpt(text: str) -> str:
    """The end of `text`, short and printable, for a finding."""
    return ascii(text[-EXCERPT:])
