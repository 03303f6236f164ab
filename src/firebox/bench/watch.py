"""All streams of a phase under all guards, and the guards for afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import cast

import msgspec

from firebox import find
from firebox.bench.base import Answer, Finding, Piece
from firebox.bench.guards.base import BLOCK, PhaseGuard, Reference, StreamGuard


class Watch:
    """Watches the streams of one phase, named by their numbers (`Answer.number`).

    What was found stays, whether its stream runs, has ended or never does; each guard speaks once
    a stream and channel. The cost is a list append a piece, and the guards' once in BLOCK characters.
    """

    def __init__(self) -> None:
        self._guards = [module for module in _modules() if hasattr(module, "Guard")]
        self._running: dict[int, _Stream] = {}
        self._ended: set[int] = set()
        self._found: list[Finding] = []

    def see(self, number: int, piece: Piece) -> Finding | None:
        """Takes the next piece of stream `number`; the first thing that is wrong with it, the moment it is
        known."""
        assert number not in self._ended, f"stream {number} has ended"
        stream = self._running.get(number)
        if stream is None:
            stream = self._running[number] = _Stream(number, self._guards)
        found = stream.see(piece)
        self._found += found
        return found[0] if found else None

    def end(self, number: int, answer: Answer) -> Finding | None:
        """Judges the last stretch of the stream, and all of it if it was short. A stream without a
        piece counts too. A failed request is judged by what it brought."""
        assert number not in self._ended, f"stream {number} has ended twice"
        self._ended.add(number)
        stream = self._running.pop(number, None) or _Stream(number, self._guards)
        found = stream.end(failed=answer.error is not None)
        self._found += found
        return found[0] if found else None

    def findings(self) -> list[Finding]:
        """All so far. Streams that still run are judged as if they ended here, for looping and garbage."""
        open_ends = [found for stream in self._running.values() for found in stream.end(failed=True)]
        return [*self._found, *open_ends]


def judge(answers: Sequence[Answer], references: Mapping[str, Reference] | None = None) -> list[Finding]:
    """What the guards of a whole phase find in its answers, failed ones included. `references`: by prompt."""
    guards = [cast(PhaseGuard, module) for module in _modules() if hasattr(module, "judge")]
    return [found for guard in guards for found in guard.judge(answers, references or {})]


class _Stream:
    """One stream: its channels and the guard that sees both as one."""

    def __init__(self, number: int, guards: Sequence[ModuleType]) -> None:
        self._number = number
        self._apart = [module for module in guards if not hasattr(module, "WHOLE_ANSWER")]
        self._channels: dict[bool, _Channel] = {}
        self._whole = _Channel([module for module in guards if hasattr(module, "WHOLE_ANSWER")])

    def see(self, piece: Piece) -> list[Finding]:
        channel = self._channels.get(piece.reasoning)
        if channel is None:
            channel = self._channels[piece.reasoning] = _Channel(self._apart)
        return self._named(self._whole.see(piece.text), False) + self._named(
            channel.see(piece.text), piece.reasoning
        )

    def end(self, *, failed: bool) -> list[Finding]:
        found = [
            item
            for reasoning, channel in self._channels.items()
            for item in self._named(channel.end(), reasoning)
        ]
        return found if failed else self._named(self._whole.end(), False) + found

    def _named(self, found: list[Finding], reasoning: bool) -> list[Finding]:
        where = "reasoning: " if reasoning else ""
        return [
            msgspec.structs.replace(item, why=where + item.why, answers=(self._number,)) for item in found
        ]


class _Channel:
    """Cuts text anew into blocks, and asks each guard until it has found something."""

    def __init__(self, modules: Sequence[ModuleType]) -> None:
        self._guards: list[StreamGuard] = [module.Guard() for module in modules]
        self._pending: list[str] = []
        self._characters = 0

    def see(self, text: str) -> list[Finding]:
        self._pending.append(text)
        self._characters += len(text)
        if self._characters < BLOCK:
            return []
        pending = "".join(self._pending)
        whole = len(pending) - len(pending) % BLOCK
        self._pending, self._characters = [pending[whole:]], len(pending) - whole
        blocks = [pending[start : start + BLOCK] for start in range(0, whole, BLOCK)]
        return [found for block in blocks for found in self._block(block)]

    def end(self) -> list[Finding]:
        rest = "".join(self._pending)
        return [found for guard in self._guards if (found := guard.end(rest))]

    def _block(self, block: str) -> list[Finding]:
        said = [(guard, guard.see(block)) for guard in self._guards]
        self._guards = [guard for guard, found in said if found is None]
        return [found for _, found in said if found]


def _modules() -> list[ModuleType]:
    return [find.load("bench.guards", name) for name in find.names("bench.guards")]
