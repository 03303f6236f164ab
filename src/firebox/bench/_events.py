"""The events of an OpenAI-compatible stream. Servers write them in these ways:

    text        choices[0].text or choices[0].delta.content
    reasoning   delta.reasoning_content (SGLang, llama.cpp, vLLM until 0.11) or delta.reasoning
    ids         choices[0].token_ids (vLLM and SGLang when asked)
    logprobs    choices[0].logprobs, of a completion {token_logprobs}, of a chat {content: [{logprob}]}
    usage       in the last event; accepted drafts in completion_tokens_details (OpenAI), timings (llama.cpp)

Other fields are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from firebox.bench.base import Piece, Usage

DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _TokenLogprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: tuple[_TokenLogprob, ...] | None = None
    token_logprobs: tuple[float | None, ...] | None = None

    def values(self) -> tuple[float, ...]:
        if self.content is not None:
            return tuple(token.logprob for token in self.content)
        return tuple(value for value in self.token_logprobs or () if value is not None)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: _Logprobs | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    accepted_prediction_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Timings(msgspec.Struct):
    prompt_n: int = 0
    predicted_n: int | None = None
    cache_n: int | None = None
    draft_n_accepted: int | None = None


class Event(msgspec.Struct):
    """One `data:` line."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None

    def piece(self, at_s: float) -> Piece | None:
        """What it brings: text, or tokens whose text is held back; None if neither."""
        if not self.choices:
            return None
        choice, delta = self.choices[0], self.choices[0].delta
        thought = (delta.reasoning_content or delta.reasoning) if delta is not None else None
        said = choice.text if delta is None else delta.content
        if not (said or thought or choice.token_ids):
            return None
        reasoning = bool(thought and not said)
        logprobs = None if choice.logprobs is None else choice.logprobs.values()
        return Piece(at_s, said or thought or "", reasoning, choice.token_ids, logprobs)

    def count(self) -> Usage | None:
        """The server's own count, if this event tells it."""
        if self.usage is not None and self.usage.completion_tokens is not None:
            prompt, completion = self.usage.prompt_tokens_details, self.usage.completion_tokens_details
            return Usage(
                self.usage.prompt_tokens,
                self.usage.completion_tokens,
                None if prompt is None else prompt.cached_tokens,
                None if completion is None else completion.accepted_prediction_tokens or self._accepted,
            )
        if self.timings is not None and self.timings.predicted_n is not None:
            t = self.timings
            return Usage(t.prompt_n + (t.cache_n or 0), t.predicted_n or 0, t.cache_n, t.draft_n_accepted)
        return None

    @property
    def _accepted(self) -> int | None:
        return None if self.timings is None else self.timings.draft_n_accepted


_decode = msgspec.json.Decoder(Event).decode


class EventReader:
    """Bytes as they come, to events: `data:` lines end with a newline and may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are whole now. Raises msgspec.DecodeError for a line that is no event."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # comments, event names, blank lines
            payload = line[5:].strip()
            if payload == DONE:
                self.done = True
            elif payload:
                yield _event(payload)


def _event(payload: bytes) -> Event:
    try:
        return _decode(payload)
    except UnicodeDecodeError:  # shown as U+FFFD, so that the guard for it sees it
        return _decode(payload.decode(errors="replace").encode())
