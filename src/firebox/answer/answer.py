"""One answer under way: the engine's deltas become text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from firebox.answer.params import SamplingParams
from firebox.engine.client import Delta, RequestStream, TokenLogprobs
from firebox.errors import StepFailed
from firebox.text.stream import TextStream
from firebox.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """What a step or more added. `text` may be empty (held back, or a special token). `finish_reason`: on the
    last piece.
    """

    text: str
    ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


class Answer:
    """One answer under way: an async iterator of pieces. Its fields tell what has come so far.

    `finish_reason`: "stop" or "length" once ended. `stop_reason`: the stop string, or the stop token that is
    not an end-of-sequence token. `cached_tokens`: prompt tokens that came from the prefix cache. `ids` has
    every token that was generated, also the one that ended the answer and is not part of the text.
    """

    def __init__(
        self, stream: RequestStream, tokenizer: Tokenizer, params: SamplingParams, eos_ids: frozenset[int]
    ) -> None:
        self.stream = stream
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._failure: StepFailed | None = None  # once what came before it has been shown
        self._texts: list[str] = []
        self._eos_ids = eos_ids
        self._shows_stop = params.include_stop_str_in_output
        self._text = TextStream(
            tokenizer,
            stops=params.stops(),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            search_after_ids=params.min_tokens,
        )

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. Raises StepFailed if its step failed, EngineDied if the engine process ends before
        the answer does."""
        if self.finish_reason is not None:
            raise StopAsyncIteration
        if self._failure is not None:
            raise self._failure
        piece = self._take(await self.stream.next_deltas())
        self.ids += piece.ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason
        self._texts.append(piece.text)
        return piece

    async def complete(self) -> Answer:
        """Waits for the end."""
        async for _ in self:
            pass
        return self

    def abort(self) -> None:
        """Gives the answer up: the engine frees its pages within a step. Harmless when it has ended."""
        self.stream.abort()

    def _take(self, deltas: list[Delta]) -> Piece:
        if deltas[-1].finish_reason == "error":
            self._failure = StepFailed(f"the step that computed this request failed: {deltas[-1].error}")
            deltas = deltas[:-1]
            if not deltas:
                raise self._failure
        last = deltas[-1]
        ids, logprobs = last.ids, last.logprobs or []
        if len(deltas) > 1:
            ids = [token_id for delta in deltas for token_id in delta.ids]
            logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        if not self.ids:
            self._take_first(deltas[0])
        stop_id = last.stop_token_id
        hides_last = stop_id is not None and not self._shows_stop
        text = self._text.feed(ids[:-1] if hides_last else ids)
        if self._text.matched is not None:
            return self._stopped_by_string(text, ids, logprobs)
        if last.finish_reason is None:
            return Piece(text, ids, logprobs, None)
        text += self._text.finish()
        self.stop_reason = self._text.matched or (None if stop_id in self._eos_ids else stop_id)
        return Piece(text, ids, logprobs, "stop" if self._text.matched else last.finish_reason)

    def _take_first(self, delta: Delta) -> None:
        self.cached_tokens = delta.cached_tokens or self.cached_tokens
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs

    def _stopped_by_string(self, text: str, ids: list[int], logprobs: list[TokenLogprobs]) -> Piece:
        """Tokens after the one that completed the stop string are not part of the answer."""
        self.abort()
        self.stop_reason = self._text.matched
        used = self._text.used_ids - len(self.ids)
        return Piece(text, ids[:used], logprobs[:used], "stop")


@contextlib.contextmanager
def aborting(answers: list[Answer]) -> Iterator[None]:
    """Whatever ends the block, no answer goes on behind it."""
    try:
        yield
    finally:
        for answer in answers:
            answer.abort()
