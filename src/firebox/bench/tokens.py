"""Text to token ids and back for the model that is measured: by a tokenizer on this machine, or by the
server's own /tokenize and /detokenize. And the count of an answer's tokens.

Tokens are counted from the server's usage, else from token ids in the stream, else with the tokenizer; never
from the events of a stream, of which one may hold several tokens, or a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx

from firebox.bench.base import Answer
from firebox.errors import ConfigError
from firebox.text.folder import resolve_folder
from firebox.text.tokenizer import Tokenizer


class Vocabulary(Protocol):
    """A tokenizer, wherever it is. `name`: as the report calls it."""

    name: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Their text."""


class LocalVocabulary:
    """The tokenizer.json of a model folder or card. Raises CheckpointError if there is none."""

    def __init__(self, model: str) -> None:
        folder = Path(model) if Path(model).is_dir() else resolve_folder(model)
        self._tokenizer = Tokenizer.load(folder)
        self.name = f"the tokenizer in {folder.name}"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Their text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, first=True)


class ServerVocabulary:
    """/tokenize and /detokenize as vLLM, SGLang and Firebox speak them, or as llama.cpp does."""

    name = "the server's tokenizer"

    def __init__(self, http: httpx.Client, *, llama_cpp: bool) -> None:
        self._http = http
        self._llama_cpp = llama_cpp

    @classmethod
    def find(cls, http: httpx.Client) -> ServerVocabulary | None:
        """The vocabulary behind `http`, None if the server has no such routes."""
        for llama_cpp in (False, True):
            vocabulary = cls(http, llama_cpp=llama_cpp)
            try:
                ids = vocabulary.encode("The quick brown fox.")
                if ids and "quick" in vocabulary.decode(ids):
                    return vocabulary
            except (ConfigError, KeyError, TypeError, ValueError):
                continue
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added. Raises ConfigError."""
        named: dict[str, Any] = (
            {"content": text} if self._llama_cpp else {"prompt": text, "add_special_tokens": False}
        )
        ids = self._post("/tokenize", named)["tokens"]
        return [int(id) for id in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Their text. Raises ConfigError."""
        reply = self._post("/detokenize", {"tokens": list(ids)})
        return str(reply["content" if self._llama_cpp else "prompt"])

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = self._http.post(route, json=body)
            reply.raise_for_status()
            document: dict[str, Any] = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ConfigError(f"{route} of the server fails: {error}") from error
        return document


def count(answers: Sequence[Answer], vocabulary: Vocabulary | None) -> None:
    """Sets `output_tokens` and `counted_by` of every whole answer that can be counted."""
    for answer in answers:
        if answer.error is None:
            answer.output_tokens, answer.counted_by = _count(answer, vocabulary)


def _count(answer: Answer, vocabulary: Vocabulary | None) -> tuple[int | None, str]:
    if answer.usage is not None:
        return answer.usage.completion_tokens, "usage"
    if (told := told_ids(answer)) is not None:
        return told, "ids"
    if vocabulary is not None:
        return len(vocabulary.encode(answer.text)), "tokenizer"
    return None, ""


def told_ids(answer: Answer) -> int | None:
    """How many token ids the stream told; None unless every piece told its own."""
    if not answer.pieces or any(piece.ids is None for piece in answer.pieces):
        return None
    return sum(len(piece.ids or ()) for piece in answer.pieces)
