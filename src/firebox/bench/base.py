"""What a benchmark asks of a server and what it got: the records that all files of this room share.

    Ask       one request
    Session   requests that follow each other; the later ones carry the answers to the earlier ones
    Phase     sessions that load the server together: one row of the report, measured several times
    Answer    what one Ask brought, piece by piece, with times
    Finding   why the output of a phase cannot be believed

Times are seconds of `timer.now`; "tokens" are those of the model, never pieces of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec


class Message(msgspec.Struct, frozen=True):
    """One turn of a chat. `role`: system, user, assistant."""

    role: str
    content: str


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request: either `prompt`, as text or as token ids, or `messages`.

    `prompt_tokens`: how long the workload made it, None where it does not know. `open_ended`: the model may
    end where it likes; otherwise exactly `max_tokens` are asked for, and a stop for length says nothing.
    `prefix`: requests with the same prefix share the beginning of their prompts. `logprobs`: those of the
    answer's tokens are wanted.
    """

    max_tokens: int
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] = ()
    prompt_tokens: int | None = None
    open_ended: bool = False
    prefix: str = ""
    logprobs: bool = False


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Requests one after another. `starts_s`: after the phase began, where arrivals are timed; None: as soon
    as one of the phase's places is free. `pause_s`: between an answer and the next request.

    With more than one, the requests are chat turns: each is sent with all earlier turns and answers.
    """

    asks: tuple[Ask, ...]
    starts_s: float | None = None
    pause_s: float = 0.0


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """What one row of the report measures. `axes`: the row's place in its workload, such as prompt_tokens
    or depth_tokens. `concurrency`: the most sessions at once; for timed arrivals the places there are.
    `warm`: sessions to run first, one by one and unmeasured, so that their prompts are in the server's cache.
    """

    workload: str
    concurrency: int
    sessions: tuple[Session, ...]
    axes: Mapping[str, int | float | str] = {}
    warm: tuple[Session, ...] = ()

    @property
    def requests(self) -> int:
        """How many it sends."""
        return sum(len(session.asks) for session in self.sessions)


class Piece(NamedTuple):
    """What one event of a stream brought. `ids`: token ids, `logprobs`: natural, of those tokens; both
    where the server tells them."""

    at_s: float
    text: str
    reasoning: bool = False
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


class Usage(msgspec.Struct, frozen=True):
    """The server's own count, in tokens. `accepted`: draft tokens that were accepted, where it tells."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    accepted: int | None = None


class Answer(msgspec.Struct, kw_only=True):
    """What one Ask brought.

    `due_s`: when it should have been sent; `sent_s`: when it was; `first_byte_s`: the first byte of the body.
    `pieces`: events with text, in order. `error`: why there is no whole answer, None if there is one; what
    came before the error stays in `pieces`. `output_tokens` as `counted_by` says: usage, ids or tokenizer;
    None until they are counted, and for a failed request.
    """

    ask: Ask
    number: int
    due_s: float
    sent_s: float
    ended_s: float
    first_byte_s: float | None = None
    pieces: list[Piece] = []
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None
    output_tokens: int | None = None
    counted_by: str = ""

    @property
    def text(self) -> str:
        """All of it, reasoning first as it came."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def content(self) -> str:
        """Without the reasoning."""
        return "".join(piece.text for piece in self.pieces if not piece.reasoning)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Why output cannot be believed. `guard`: the file in `guards/` that found it. `verdict`: "garbage",
    "repetition", "empty" or "suspicious". `why`: with the number and its limit, and a short excerpt.
    `answers`: the numbers of the answers it is about; empty: all of the phase."""

    guard: str
    verdict: str
    why: str
    answers: tuple[int, ...] = ()
