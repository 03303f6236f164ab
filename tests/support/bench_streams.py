"""Recorded streams for the tests of `bench/guards`, and how to run them past a guard."""

from __future__ import annotations

import functools
import json  # msgspec reads no lone surrogates
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from firebox.bench.base import Answer, Ask, Finding, Piece
from firebox.bench.guards.base import BLOCK, StreamGuard
from firebox.bench.watch import Watch

FILE = Path(__file__).resolve().parents[1] / "cpu" / "bench" / "guards" / "streams" / "streams.jsonl"


class Record(msgspec.Struct, frozen=True):
    """One stream. `kind`: good, or what is wrong; all_equal: good by itself, wrong beside its `group`."""

    name: str
    kind: str
    origin: str
    source: str
    pieces: list[str]
    group: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@functools.cache
def records() -> tuple[Record, ...]:
    return tuple(msgspec.convert(json.loads(line), Record) for line in FILE.open())


def kind(*wanted: str) -> list[Record]:
    return [record for record in records() if record.kind in wanted]


def answer(number: int = 0, prompt: str = "", pieces: Iterable[Piece] = (), **fields: object) -> Answer:
    ask = Ask(max_tokens=512, prompt=prompt, open_ended=bool(fields.pop("open_ended", True)))
    base = {"due_s": 0.0, "sent_s": 0.0, "ended_s": 9.0, "finish_reason": "stop"}
    return Answer(ask=ask, number=number, pieces=list(pieces), **(base | fields))  # type: ignore[arg-type]


def watched(pieces: Sequence[str]) -> list[Finding]:
    """What a Watch finds in one stream of content."""
    watch = Watch()
    for text in pieces:
        watch.see(0, Piece(0.0, text))
    watch.end(0, answer())
    return watch.findings()


def alone(guard: StreamGuard, text: str) -> Finding | None:
    """What one guard says of a text, at once or at its end."""
    whole = len(text) - len(text) % BLOCK
    for start in range(0, whole, BLOCK):
        if found := guard.see(text[start : start + BLOCK]):
            return found
    return guard.end(text[whole:])
