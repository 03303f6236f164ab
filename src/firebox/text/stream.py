"""Ids to text while they come: never half a code point, never part of a stop string, the same text at every
split.

    ids ─ token bytes ─▶ UTF-8 decoder ─ whole code points ─▶ stop search ─ cannot begin a stop string ─▶ text
                         (holds ≤ 3 bytes)                    (holds < the longest stop string)

`finish()` lets go of what both hold. Each step costs the same however long the text has become.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from firebox.errors import RequestError
from firebox.text.tokenizer import Tokenizer

MAX_STOP_CHARACTERS = 4096


def require_stops(stops: Sequence[str]) -> None:
    """Raises RequestError for a stop string that is empty or longer than the search is meant for."""
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop has a string of {len(stop)} characters; it may have 1 to {MAX_STOP_CHARACTERS}",
                param="stop",
            )


class StopSearch:
    """Finds the first stop string to be completed in a text that comes in pieces (Knuth, Morris, Pratt; one
    state a string).

    Where two are completed by the same character, the longer one is the match. `matched` is None until then.
    A character is held back only while the text's end is the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.matched: str | None = None
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first_characters = frozenset(stop[0] for stop in self._stops)
        self._include = include
        self._held = ""

    def feed(self, text: str) -> str:
        """What of the text so far can be shown now, beyond what was; nothing more once `matched`."""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            self._advance(character)
            if self.matched is not None:
                self._held = ""
                return pending[: end if self._include else end - len(self.matched)]
        kept = len(pending) - max(self._states)
        self._held = pending[kept:]
        return pending[:kept]

    def finish(self) -> str:
        """What was held back in case a stop string came."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> None:
        for index, stop in enumerate(self._stops):
            state, borders = self._states[index], self._borders[index]
            while state and stop[state] != character:
                state = borders[state - 1]
            if stop[state] == character:
                state += 1
            self._states[index] = state
            if state == len(stop):
                self.matched = stop
                return


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix too."""
    borders = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = borders[length - 1]
        if stop[index] == stop[length]:
            length += 1
        borders[index] = length
    return borders


class TextStream:
    """The text of one answer. `used_ids`: ids taken in, up to and with the one that completed a stop string
    (`matched`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        search_after_ids: int = 0,
    ) -> None:
        self.used_ids = 0
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._search = StopSearch(stops, include=include_stop) if stops else None
        self._search_after_ids = search_after_ids

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._search.matched if self._search else None

    def feed(self, ids: Sequence[int]) -> str:
        """What these ids add to the text that can be shown; takes no id in after the one that completed a
        stop string.
        """
        if self._search is None:
            self.used_ids += len(ids)
            return self._utf8.decode(self._bytes(ids))
        shown = []
        for token_id in ids:
            if self._search.matched is not None:
                break
            self.used_ids += 1
            shown.append(self._searched(self._utf8.decode(self._bytes((token_id,)))))
        return "".join(shown)

    def finish(self) -> str:
        """What was held back: the text has ended. An unfinished code point becomes U+FFFD."""
        if self._search is None:
            return self._utf8.decode(b"", final=True)
        if self._search.matched is not None:
            return ""
        shown = self._searched(self._utf8.decode(b"", final=True))
        return shown if self._search.matched is not None else shown + self._search.finish()

    def _bytes(self, ids: Iterable[int]) -> bytes:
        if not self._skipped:
            return b"".join(map(self._token_bytes, ids))
        return b"".join([self._token_bytes(id) for id in ids if id not in self._skipped])

    def _searched(self, text: str) -> str:
        """Text of the first `search_after_ids` ids (min_tokens) is shown unsearched."""
        assert self._search is not None
        return text if self.used_ids <= self._search_after_ids else self._search.feed(text)
