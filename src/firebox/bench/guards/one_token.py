"""One token or character over and over: "!!!!", "GGGG", " the the the", "+".

A stretch with a period of at most UNIT characters. Within a text it counts from RUN characters on; at the
end of the stream from LAST on, or LAST_RULER if only of what rulers, padding and zeros are made of; an
answer that is nothing else from ALONE repeats on, wherever that many do not write a number. Two or three
tokens in any order are found by their characters: at most FEW different ones in WINDOW. Nearest good text:
rulers and rows of dashes (200 characters in wide tables), "AAAA" in base64 of zeros (76 a line), rows of
zeros in a dump.

Would have caught: "!!!!" of NVFP4 experts under expert parallelism, at a higher rate than text (sgl#20011,
sgl#20869); "+" alone (sgl#24321). Cannot tell an answer that was asked to repeat a word from one that does.
"""

from __future__ import annotations

from firebox.bench.base import Finding
from firebox.bench.guards.base import excerpt

UNIT = 16  # characters; longer periods are suffix_loop's
RUN = 256  # characters, anywhere in the text
LAST = 48  # characters, at the end of the stream
LAST_RULER = 128
ALONE = 12  # repeats, where they are the whole answer
RULERS = frozenset(" \t\n\r-=_*#~.·+|─━═│")
FEW, WINDOW = 4, 512  # no more different characters than FEW in the last WINDOW
DATA = frozenset("0123456789ACGTUacgtu") | RULERS  # of which data may be made: bits, Morse, DNA
_KEPT = WINDOW


class Guard:
    """One channel of one stream. Keeps the last characters."""

    def __init__(self) -> None:
        self._tail = ""
        self._seen = 0  # characters

    def see(self, block: str) -> Finding | None:
        """Whether the text ends in RUN characters of one token."""
        self._tail = (self._tail + block)[-_KEPT - len(block) :]
        self._seen += len(block)
        for end in range(len(self._tail), max(0, len(self._tail) - len(block)), -UNIT * 4):
            if found := _period(self._tail[:end], RUN):
                return _finding(self._tail[:end], found, RUN)
        return _few(self._tail)

    def end(self, rest: str) -> Finding | None:
        """The same with the limits of an end."""
        text = (self._tail + rest).rstrip("\ufffd")  # a character that was cut
        if found := _period(text, LAST):
            padding = RULERS.issuperset(text[-found:]) or text[-found:].strip() == "0"
            if not padding or _period(text, LAST_RULER):
                return _finding(text, found, LAST)
        return self._alone(text) if self._seen + len(rest) == len(text) else _few(text)

    def _alone(self, text: str) -> Finding | None:
        text = text.strip()
        for unit in range(1, UNIT + 1):
            limit = unit * ALONE
            if len(text) >= limit and text[unit:] == text[:-unit] and not text[:unit].isdigit():
                return _finding(text, unit, limit)
        return None


def _period(text: str, length: int) -> int | None:
    """The smallest period of the last `length` characters, if it is at most UNIT."""
    if len(text) < length:
        return None
    last = text[-length:]
    at = last.rfind(last[-UNIT:], 0, -1)
    unit = length - UNIT - at
    return unit if at >= 0 and unit <= UNIT and last[unit:] == last[:-unit] else None


def _few(text: str) -> Finding | None:
    """A handful of characters in any order."""
    used = set(text[-WINDOW:])
    if len(text) < WINDOW or len(used) > FEW or used <= DATA:
        return None
    why = (
        f"only {len(used)} different characters in the last {WINDOW} (at most {FEW} "
        f"is too few): …{excerpt(text)}"
    )
    return Finding(guard="one_token", verdict="garbage", why=why)


def _finding(text: str, unit: int, limit: int) -> Finding:
    why = f"{text[-unit:]!a} over and over, for at least {limit} characters: …{excerpt(text)}"
    return Finding(guard="one_token", verdict="garbage", why=why)
