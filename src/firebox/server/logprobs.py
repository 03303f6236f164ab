"""The engine's logprobs in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from firebox.engine.client import TokenLogprobs
from firebox.server.replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from firebox.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -Infinity; OpenAI writes this


def chat(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """/v1/chat/completions: one object a token, with its bytes."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_candidate(tokenizer, entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[
                    _candidate(tokenizer, token_id, logprob)
                    for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                ],
            )
            for entry in entries
        ]
    )


class CompletionLogprobsWriter:
    """/v1/completions: parallel lists. Keeps the text offset from piece to piece of a stream.

    `skipped`: tokens that the text leaves out; `echo`: the first token begins the text, else it continues the
    prompt.
    """

    def __init__(self, tokenizer: Tokenizer, *, skipped: frozenset[int], echo: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._drops_space = echo and tokenizer.strips_first_space
        self._characters = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The lists for the next `ids`; None stands for the first token of a prompt, which has no logprob."""
        lists = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, entry in zip(ids, entries, strict=True):
            lists.tokens.append(self._name(token_id))
            lists.text_offset.append(self._characters)
            self._characters += self._shown(token_id)
            lists.token_logprobs.append(None if entry is None else max(entry.logprob, LOWEST))
            lists.top_logprobs.append(None if entry is None else self._top(entry))
        return lists

    def _shown(self, token_id: int) -> int:
        """Characters of text that this token completes."""
        if token_id in self._skipped:
            return 0
        data = self._tokenizer.token_bytes(token_id)
        if self._drops_space:
            data, self._drops_space = data.removeprefix(b" "), False
        return len(self._utf8.decode(data))

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The top candidates, and the token itself where it is not among them, as OpenAI does."""
        top = {
            self._name(token_id): max(logprob, LOWEST)
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        }
        if entry.top_ids:
            top.setdefault(self._name(entry.token_id), max(entry.logprob, LOWEST))
        return top

    def _name(self, token_id: int) -> str:
        """The token as text; one that is not UTF-8 as OpenAI writes it, so that names stay distinct."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _candidate(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode("utf-8", "replace"), logprob=max(logprob, LOWEST), bytes=list(data))
