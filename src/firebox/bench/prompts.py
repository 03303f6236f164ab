"""Prompts of a given length in tokens: passages of real text, or random ids.

The text is Firebox's own source as it once was: prose and code, the same in every installation and version,
so that results can be compared, and long enough that two passages rarely begin alike, so that no prefix
cache answers for the model unless a workload wants it to.
With a vocabulary a prompt is exactly as long as asked; without one its length is estimated from how many
tokens the server counted in a first passage.
"""

from __future__ import annotations

import functools
import gzip
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from firebox.bench.base import Ask, Message
from firebox.bench.tokens import Vocabulary

ENCODE_CHARS = 60_000  # what one call of a server's /tokenize gets
CHARS_PER_TOKEN = 3.5
CORPUS = Path(__file__).resolve().parents[1] / "assets" / "corpus.txt.gz"
T = TypeVar("T")


class Prompts:
    """`chat`: prompts are messages, so text; otherwise token ids if there is a vocabulary. `random_ids`: ids
    drawn evenly from those that occur in the text."""

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        *,
        seed: int,
        chat: bool = False,
        random_ids: bool = False,
        chars_per_token: float = CHARS_PER_TOKEN,
    ) -> None:
        self._vocabulary, self._chat, self._random_ids = vocabulary, chat, random_ids
        self._text = corpus()
        self._ids = [] if vocabulary is None else _encode(vocabulary, self._text)
        self._kinds = sorted(set(self._ids))
        self._chars_per_token = chars_per_token
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """From here on passages are drawn anew."""
        self.draw = random.Random(seed)

    def ask(self, prompt_tokens: int, output_tokens: int, prefix: Prefix | None = None) -> Ask:
        """A request with a prompt of `prompt_tokens` tokens, after those of `prefix`, for exactly
        `output_tokens`."""
        exact = self._ids and not self._chat
        ask = Ask(
            max_tokens=output_tokens,
            prompt_tokens=prompt_tokens + (0 if prefix is None else prefix.tokens) if exact else None,
            prefix="" if prefix is None else prefix.name,
        )
        if self._chat:
            before = () if prefix is None else (Message("system", prefix.text),)
            return replace(ask, messages=(*before, Message("user", self.text(prompt_tokens))))
        if exact:
            return replace(ask, prompt=(() if prefix is None else prefix.ids) + self.ids(prompt_tokens))
        return replace(ask, prompt=("" if prefix is None else prefix.text) + self.text(prompt_tokens))

    def turn(self, prompt_tokens: int, output_tokens: int) -> Ask:
        """A chat turn of the user; open-ended, as turns are."""
        said = Message("user", self.text(prompt_tokens))
        return Ask(messages=(said,), max_tokens=output_tokens, open_ended=True)

    def prefix(self, name: str, tokens: int) -> Prefix:
        """The beginning that several prompts share."""
        if self._ids and not self._chat:
            return Prefix(name, tokens, ids=self.ids(tokens))
        return Prefix(name, tokens, text=self.text(tokens))

    def ids(self, tokens: int) -> tuple[int, ...]:
        """A passage as ids."""
        if self._random_ids:
            return tuple(self.draw.choices(self._kinds, k=tokens))
        return tuple(_passage(self._ids, self.draw.randrange(len(self._ids)), tokens))

    def text(self, tokens: int) -> str:
        """A passage as text; exact only as far as a tokenizer reads back what it wrote."""
        if self._vocabulary is not None:
            return self._vocabulary.decode(self.ids(tokens))
        chars = round(tokens * self._chars_per_token)
        return "".join(_passage(self._text, self.draw.randrange(len(self._text)), chars))


class Prefix:
    """The shared beginning of prompts: its ids, or its text."""

    def __init__(self, name: str, tokens: int, *, ids: tuple[int, ...] = (), text: str = "") -> None:
        self.name, self.tokens, self.ids, self.text = name, tokens, ids, text


@functools.cache
def corpus() -> str:
    """Some of Firebox's Python files of November 2026, 594,349 characters. A change of it makes every result
    another one."""
    return gzip.decompress(CORPUS.read_bytes()).decode()


def _passage(whole: Sequence[T], start: int, length: int) -> list[T]:
    """`length` items from `start` on, from the beginning again after the end."""
    found = list(whole[start : start + length])
    while len(found) < length:
        found += whole[: length - len(found)]
    return found


def _encode(vocabulary: Vocabulary, text: str) -> list[int]:
    ids: list[int] = []
    for start in range(0, len(text), ENCODE_CHARS):
        ids += vocabulary.encode(text[start : start + ENCODE_CHARS])
    return ids
